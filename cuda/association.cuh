// What reading and writing the associative memory share: its sizes and the feature map.
#pragma once

#include "armt/config.h"
#include "types.cuh"

namespace armt::cuda {

constexpr int kFeatureWarps = 4;  // rows of a block that makes features

struct MemoryShape {
  int heads = 0, features = 0, padded = 0;  // h, F, F padded to 8
  int values = 0;                           // E
  int keys = 0;                             // d_mem / h
  int rolls = 0;
  int width = 0;          // D
  int raw = 0, gate = 0;  // row of the write's product, and where its gate begins
  bool normalise = false, denominator = false, correction = false, paper = false, gating = false;

  __host__ __device__ int64_t matrix() const { return static_cast<int64_t>(features) * values; }
  __device__ const float* normaliser(const float* memory, int head) const {
    return memory + heads * matrix() + static_cast<int64_t>(head) * features;
  }
};

// u = (max(x, 0), max(-x, 0)), by one warp.
__device__ inline void split_signs(const float* x, int n, float* u) {
  __syncwarp();
  for (int i = threadIdx.x % 32; i < n; i += 32) {
    u[i] = fmaxf(x[i], 0.0f);
    u[n + i] = fmaxf(-x[i], 0.0f);
  }
  __syncwarp();
}

// Calls body(f, phi_f) for this lane's features: block j of the map is u times u rolled right by j, j = 1 .. rolls.
template <class Body>
__device__ void each_feature(const float* u, const MemoryShape& shape, const Body& body) {
  const int length = 2 * shape.keys;
  for (int j = 1; j <= shape.rolls; ++j) {
    const int turn = j % length, first = (j - 1) * length;
    for (int i = threadIdx.x % 32; i < length; i += 32) {
      const int other = i - turn;
      body(first + i, u[i] * u[other < 0 ? other + length : other]);
    }
  }
}

// The map times `scale`, with zeros behind it up to the padded length.
template <class To>
__device__ void store_features(const float* u, const MemoryShape& shape, float scale, To* out) {
  each_feature(u, shape, [&](int f, float x) { out[f] = from_float<To>(x * scale); });
  const int rest = shape.padded - shape.features, lane = threadIdx.x % 32;
  if (lane < rest) out[shape.features + lane] = from_float<To>(0.0f);
}

// 1, or 1 / max(|phi|, 1e-12).
__device__ inline float feature_scale(const MemoryShape& shape, float squares) {
  return shape.normalise ? 1.0f / fmaxf(sqrtf(squares), 1e-12f) : 1.0f;
}

inline MemoryShape shape_of(const ModelConfig& config, int64_t padded, int64_t raw) {
  const MemoryConfig& memory = config.memory;
  return {.heads = static_cast<int>(memory.n_heads),
          .features = static_cast<int>(config.features()),
          .padded = static_cast<int>(padded),
          .values = static_cast<int>(config.value_dim()),
          .keys = static_cast<int>(memory.d_mem / memory.n_heads),
          .rolls = static_cast<int>(memory.rolls),
          .width = static_cast<int>(config.decoder.d_model),
          .raw = static_cast<int>(raw),
          .gate = static_cast<int>(memory.d_mem + config.decoder.d_model),
          .normalise = memory.normalise_keys,
          .denominator = memory.use_denom,
          .correction = memory.correction,
          .paper = memory.dialect == Dialect::paper,
          .gating = memory.gating};
}

}  // namespace armt::cuda
