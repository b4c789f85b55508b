#define ARMT_ISA_NAME avx2
#include "cpu/kernels/table.h"
