// The gated MLP's first product with its activation, where the GPU and the sizes allow (gated.cu).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "armt/config.h"
#include "meta.h"

namespace armt::cuda {

// out[group.scratch + r, :] = act(x W_gate^T) * (x W_up^T), x = in[group.scratch + r, :], all bfloat16.
struct GatedProduct {
  const void* in = nullptr;      // [in_rows, depth]
  const void* weight = nullptr;  // [layers, 2 d_ff, depth]: gate, then up
  void* out = nullptr;           // [in_rows, d_ff]
  int64_t in_rows = 0, weight_rows = 0;
  int64_t depth = 0, d_ff = 0;
  ActivationKind kind = ActivationKind::silu;
};

// Whether the current device and this build can; called once before the first launch.
bool can_fuse_gate();
bool gate_fits(int64_t rows, int64_t depth, int64_t d_ff);
void launch_gated_product(const GatedProduct& product, const Batch& batch, int processors, cudaStream_t stream);

}  // namespace armt::cuda
