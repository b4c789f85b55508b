#define ARMT_ISA_NAME baseline
#include "cpu/kernels/table.h"
