// Instantiates every kernel for one instruction set.
#pragma once

#include "cpu/kernels/activation.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/packed.h"
#include "cpu/kernels/rows.h"
#include "cpu/simd.h"
// ---- attention, rotary, association: begin
#include "cpu/kernels/association.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/rotary.h"
// ---- attention, rotary, association: end

namespace armt::cpu::ARMT_ISA_NAME {

#define ARMT_TEXT_OF(name) #name
#define ARMT_TEXT(name) ARMT_TEXT_OF(name)

extern const Kernels kKernels;
const Kernels kKernels = {
    .name = ARMT_TEXT(ARMT_ISA_NAME),
    .width = kWidth,
    .panel = kPanel,
    .gemm_rows = kGemmRows,
    .gemm_scratch = kGemmScratch,
    .gemm = gemm,
    .layer_norm = layer_norm,
    .rms_norm = rms_norm,
    .activate = activate,
    .exponent = exponent,
    .add = add,
    // ---- attention, rotary, association: begin
    .attend = attend,
    .rotate = rotate,
    .memory_slice = kMemoryVectors * kWidth,
    .features = features,
    .recall = recall,
    .update = update,
    .sigmoid = sigmoid,
    // ---- attention, rotary, association: end
};

}  // namespace armt::cpu::ARMT_ISA_NAME
