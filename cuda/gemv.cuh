// What the two kernels for dense layers of a few rows share, and kernels that start before the one before them is done
// (programmatic dependent launch, Hopper and newer).
#pragma once

#include "check.h"
#include "gemv.h"
#include "overlap.cuh"
#include "types.cuh"

namespace armt::cuda {

// Input rows into shared memory x [rows, depth], normalised by weight and bias [depth] if args.norm_weight says so. By
// all threads; ends with a barrier.
template <class T, int rows, int threads>
__device__ void load_rows(const FewProduct& args, const float* weight, const float* bias, T* x) {
  constexpr int kPack = Pack<T>::kCount;
  __shared__ float partial[32];
  const int depth = static_cast<int>(args.depth);
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    const T* in = static_cast<const T*>(args.in) + min(r, static_cast<int>(args.rows) - 1) * args.ld_in;
    T* to = x + r * depth;
    float sum = 0.0f;
    for (int i = threadIdx.x * kPack; i < depth; i += threads * kPack) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(in + i);
      *reinterpret_cast<Pack<T>*>(to + i) = pack;
      if (args.norm_weight == nullptr) continue;
#pragma unroll
      for (int k = 0; k < kPack; ++k) sum += to_float(pack.v[k]) * (args.rms ? to_float(pack.v[k]) : 1.0f);
    }
    if (args.norm_weight == nullptr) continue;
    sum = block_sum(sum, partial) / static_cast<float>(depth);
    float mean = 0.0f, variance = sum;
    if (!args.rms) {
      mean = sum;
      float squares = 0.0f;
      for (int i = threadIdx.x * kPack; i < depth; i += threads * kPack) {
#pragma unroll
        for (int k = 0; k < kPack; ++k) squares += (to_float(to[i + k]) - mean) * (to_float(to[i + k]) - mean);
      }
      variance = block_sum(squares, partial) / static_cast<float>(depth);
    }
    const float scale = rsqrtf(variance + args.norm_eps);
    for (int i = threadIdx.x * kPack; i < depth; i += threads * kPack) {
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        float y = (to_float(to[i + k]) - mean) * scale * weight[i + k];
        if (bias != nullptr) y += bias[i + k];
        to[i + k] = from_float<T>(y);
      }
    }
  }
  __syncthreads();
}

}  // namespace armt::cuda
