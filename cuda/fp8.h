// Dense layers in 8 bits, for the many rows of a prefill on Hopper GPUs: activations with a scale a row, weights with a
// scale an output channel, both e4m3; sums are float32 as the matrix units keep them (at least 13 bits of mantissa).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "armt/config.h"
#include "backend.h"
#include "meta.h"

namespace armt::cuda {

inline constexpr float kFp8Largest = 448.0f;

// out[r, n] = epilogue(sum_k in[r, k] weight[n, k] * in_scale[r] * weight_scale[n] + bias[n]) for the rows of a batch.
struct Fp8Product {
  const void* in = nullptr;  // [in_rows, depth], by rows of the scratch buffers
  const float* in_scale = nullptr;
  int64_t in_rows = 0;
  const void* weight = nullptr;  // [weight_rows, depth], all layers; layer_rows of each
  const float* weight_scale = nullptr;
  int64_t weight_rows = 0, layer_rows = 0;
  const void* bias = nullptr;  // bfloat16 [weight_rows], or null
  int64_t depth = 0;
  int64_t first = 0, cols = 0;  // channels first .. first+cols-1 of a layer; gated: cols pairs of gate and up
  View out;                     // bfloat16; channel `first + n` in column first + n
  Epilogue epilogue = Epilogue::none;
  bool gated = false;
  ActivationKind kind = ActivationKind::silu;
};

// Whether the current device and this build can; called once before the first launch.
bool can_multiply_fp8();
bool fp8_fits(const Fp8Product& product);
void launch_fp8_product(const Fp8Product& product, const Batch& batch, int processors, cudaStream_t stream);

// A norm on the way; without a weight: none. Vectors are stacked by layer.
struct Fp8Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;
  float eps = 0.0f;
  bool rms = false;
};

// bfloat16 rows [.., width] to e4m3 and a scale each. Widths up to 32768, a multiple of 16.
bool quantises(int64_t width);
// Rows 0 .. count-1.
void launch_quantise(const void* in, void* out, float* scale, int64_t count, int64_t width, cudaStream_t stream);
// The rows of a batch; `out` and `scale` lie parallel to the scratch buffers.
void launch_quantise(const View& in, void* out, float* scale, const Batch& batch, const Fp8Norm& norm,
                     cudaStream_t stream);

}  // namespace armt::cuda
