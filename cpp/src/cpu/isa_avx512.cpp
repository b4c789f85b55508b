#define ARMT_ISA_NAME avx512
#include "cpu/kernels/table.h"
