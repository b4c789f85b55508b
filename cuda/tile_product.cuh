// A block's tile of a product whose operands come from functions: for shapes and places no library call covers.
#pragma once

#include "mma.cuh"

namespace armt::cuda {

// out[i, j] = sum_k a(i, k) b(k, j) for the 64 x 64 tile at (first_i, first_j); 256 threads. Exact: float32 throughout,
// k ascending. Otherwise operands are rounded to 10 bits of mantissa, sums are float32.
// `a_along_i`: neighbouring threads read neighbouring i of a, otherwise neighbouring k.
struct TileProduct {
  static constexpr int kTile = 64, kDepth = 16, kThreads = 256, kRow = kTile + 8;
  struct Shared {
    float a[kDepth][kRow], b[kDepth][kRow];
  };
};

template <bool exact, bool a_along_i, class A, class B, class Store>
__device__ void tile_product(TileProduct::Shared& shared, int first_i, int first_j, int rows, int cols, int depth,
                             const A& a, const B& b, const Store& store) {
  constexpr int kTile = TileProduct::kTile, kDepth = TileProduct::kDepth, kThreads = TileProduct::kThreads;
  constexpr int kEach = kTile * kDepth / kThreads;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  float sum[4][4] = {};
  float next_a[kEach], next_b[kEach];
  const auto fetch = [&](int k0) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int at = e * kThreads + thread;
      const int i = a_along_i ? at % kTile : at / kDepth, ka = a_along_i ? at / kTile : at % kDepth;
      const int j = at % kTile, kb = at / kTile;
      next_a[e] = first_i + i < rows && k0 + ka < depth ? a(first_i + i, k0 + ka) : 0.0f;
      next_b[e] = first_j + j < cols && k0 + kb < depth ? b(k0 + kb, first_j + j) : 0.0f;
    }
  };
  fetch(0);
  for (int k0 = 0; k0 < depth; k0 += kDepth) {
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int at = e * kThreads + thread;
      const int i = a_along_i ? at % kTile : at / kDepth, ka = a_along_i ? at / kTile : at % kDepth;
      const int j = at % kTile, kb = at / kTile;
      shared.a[ka][i] = exact ? next_a[e] : __uint_as_float(to_tf32(next_a[e]));
      shared.b[kb][j] = exact ? next_b[e] : __uint_as_float(to_tf32(next_b[e]));
    }
    __syncthreads();
    if (k0 + kDepth < depth) fetch(k0 + kDepth);
    if constexpr (exact) {
      const int i0 = thread / 16 * 4, j0 = thread % 16 * 4;
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(shared.a[k][i0 + i], shared.b[k][j0 + j], sum[i][j]);
        }
      }
    } else {
      // Warps 4 x 2, each 16 rows by 32 columns.
      const int i0 = warp / 2 * 16 + lane / 4, j0 = warp % 2 * 32 + lane / 4;
#pragma unroll
      for (int k = 0; k < kDepth; k += 8) {
        const int k1 = k + lane % 4, k2 = k1 + 4;
        const uint32_t x[4] = {__float_as_uint(shared.a[k1][i0]), __float_as_uint(shared.a[k1][i0 + 8]),
                               __float_as_uint(shared.a[k2][i0]), __float_as_uint(shared.a[k2][i0 + 8])};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          multiply_add_tf32(sum[n], x, __float_as_uint(shared.b[k1][j0 + n * 8]),
                            __float_as_uint(shared.b[k2][j0 + n * 8]));
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = first_i + (exact ? thread / 16 * 4 + m : warp / 2 * 16 + lane / 4 + e / 2 * 8);
      const int j = first_j + (exact ? thread % 16 * 4 + e : warp % 2 * 32 + m * 8 + lane % 4 * 2 + e % 2);
      if (i < rows && j < cols) store(i, j, sum[m][e]);
    }
  }
}

}  // namespace armt::cuda
