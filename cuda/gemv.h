// The decoder's dense layers for a few rows (decoding): bound by reading the weights once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "armt/config.h"

namespace armt::cuda {

// out[r, n] (+)= act(sum_k norm(in[r])[k] weight[n, k] + bias[n]), r < rows; gated: act of row n times row cols + n.
struct FewProduct {
  const void* weight = nullptr;  // [cols (2 cols if gated), depth]
  const void* bias = nullptr;    // [cols (2 cols)] or null
  const void* in = nullptr;
  void* out = nullptr;
  int64_t rows = 0, cols = 0, depth = 0;
  int64_t ld_in = 0, ld_out = 0;
  // Norm of the input rows, float32 [depth]; null: none.
  const float* norm_weight = nullptr;
  const float* norm_bias = nullptr;
  float norm_eps = 0.0f;
  bool rms = false;
  bool add = false, gated = false, activate = false;
  bool float_out = false;  // out is float32; not with `gated`
  ActivationKind kind = ActivationKind::silu;
};

// 16-bit types; false where the sizes do not fit.
bool few_fits(const FewProduct& product);
// Overlaps its start, the reading of weights, with the end of the kernel before it. False, and nothing done, where
// `float_out` is wanted and only the Hopper form could.
bool launch_few_product(DType dtype, const FewProduct& product, int processors, cudaStream_t stream);
// The form for Hopper GPUs; false, and nothing done, elsewhere and where rows need too much shared memory.
bool launch_streamed_product(DType dtype, const FewProduct& product, int processors, cudaStream_t stream);

}  // namespace armt::cuda
