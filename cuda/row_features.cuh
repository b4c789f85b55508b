// The feature map of the usual memory (64 keys, three rolls, one head), wholly in registers.
#pragma once

#include "association.cuh"

namespace armt::cuda {

// A row's map by 16 neighbouring lanes: lane l has features 128 j + 8 l .. + 7 of each roll j.
struct RowFeatures {
  static constexpr int kKeys = 64, kRolls = 3, kLanes = 16, kEach = 2 * kKeys / kLanes, kAll = kRolls * 2 * kKeys;
  float phi[kRolls][kEach];

  __device__ static int lane() { return threadIdx.x % kLanes; }
  // Where this lane's features of roll j begin.
  __device__ static int first(int j) { return j * 2 * kKeys + lane() * kEach; }

  // `key` [64]: aligned to 16 bytes.
  __device__ explicit RowFeatures(const float* key) {
    const bool positive = lane() < kLanes / 2;
    const float* from = key + lane() * kEach % kKeys;
    float u[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      u[i] = four.x, u[i + 1] = four.y, u[i + 2] = four.z, u[i + 3] = four.w;
    }
#pragma unroll
    for (float& x : u) x = fmaxf(positive ? x : -x, 0.0f);
    float before[kRolls];  // u at 1, 2, 3 places before this lane's
#pragma unroll
    for (int j = 0; j < kRolls; ++j) {
      before[j] = __shfl_sync(0xffffffffu, u[kEach - 1 - j], (lane() + kLanes - 1) % kLanes, kLanes);
    }
#pragma unroll
    for (int j = 0; j < kRolls; ++j) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) phi[j][i] = u[i] * (i > j ? u[i - j - 1] : before[j - i]);
    }
  }

  // This lane's part of a vector of features, aligned to 16 bytes.
  __device__ static void load(const float* from, float (&out)[kRolls][kEach]) {
#pragma unroll
    for (int j = 0; j < kRolls; ++j) {
#pragma unroll
      for (int i = 0; i < kEach; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + first(j) + i);
        out[j][i] = four.x, out[j][i + 1] = four.y, out[j][i + 2] = four.z, out[j][i + 3] = four.w;
      }
    }
  }

  // Sums over the row, the same in all its lanes: of squares, of products with z.
  __device__ float squares() const { return dot(phi); }
  __device__ float dot(const float (&z)[kRolls][kEach]) const {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kRolls; ++j) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum += phi[j][i] * z[j][i];
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
  }
};

inline bool has_row_features(const MemoryShape& shape) {
  return shape.heads == 1 && shape.keys == RowFeatures::kKeys && shape.rolls == RowFeatures::kRolls;
}

}  // namespace armt::cuda
