// Tiles of a matrix product.
//
// acc[r][n] += A[r, k] B[k, n], lanes over n, one chain of fused multiply-adds over k for each
// element, k ascending from a zero. Blocks over k store and reload the accumulators, which is
// exact; so an element never depends on the tile, the rows beside it or the block it was computed
// in.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace armt::cpu::ARMT_ISA_NAME {

// A tile of R x V vectors must leave registers for V columns of B and one broadcast element of A.
#if defined(__AVX512F__)
inline constexpr int kTileRows = 8, kPanelVectors = 3;
#elif defined(__AVX2__)
inline constexpr int kTileRows = 6, kPanelVectors = 2;
#elif defined(__aarch64__)
inline constexpr int kTileRows = 6, kPanelVectors = 4;
#else
inline constexpr int kTileRows = 6, kPanelVectors = 2;
#endif
inline constexpr int kPanel = kPanelVectors * kWidth;

// Memory that will be needed soon: fetched in small portions while a tile is computed.
struct Ahead {
  const char* data = nullptr;
  int64_t bytes = 0;
};

static inline void prefetch(const char* begin, const char* end) {
  for (; begin < end; begin += 64) __builtin_prefetch(begin, 0, 2);
}

// C [R, V W] (+)= A [R, k] B [k, V W]. With `Copy` B is also left as float32 in `widened` [k, V W].
template <int R, int V, bool Copy, class Weight>
static inline void tile(int64_t k, const float* a, int64_t lda, const Weight* b, int64_t ldb, float* c, int64_t ldc,
                        bool accumulate, Ahead ahead, float* widened) {
  constexpr int64_t kStep = 16;
  vf acc[R][V];
  ARMT_UNROLL for (int r = 0; r < R; ++r) {
    ARMT_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? load(c + r * ldc + v * kWidth) : vf{};
  }
  const int64_t portion = ahead.bytes * kStep / k;
  for (int64_t begin = 0; begin < k; begin += kStep) {
    const int64_t end = min_of(begin + kStep, k);
    prefetch(ahead.data, ahead.data + portion);
    ahead.data += portion;
    for (int64_t i = begin; i < end; ++i) {
      vf column[V];
      ARMT_UNROLL for (int v = 0; v < V; ++v) column[v] = load(b + v * kWidth);
      if constexpr (Copy) {
        ARMT_UNROLL for (int v = 0; v < V; ++v) store(widened + (i * V + v) * kWidth, column[v]);
      }
      ARMT_UNROLL for (int r = 0; r < R; ++r) {
        const vf x = splat(a[r * lda + i]);
        ARMT_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = fma(x, column[v], acc[r][v]);
      }
      b += ldb;
    }
  }
  ARMT_UNROLL for (int r = 0; r < R; ++r) {
    ARMT_UNROLL for (int v = 0; v < V; ++v) store(c + r * ldc + v * kWidth, acc[r][v]);
  }
}

// The same for 1 <= rows <= R.
template <int R, int V, bool Copy, class Weight>
static inline void tile_rows(int64_t rows, int64_t k, const float* a, int64_t lda, const Weight* b, int64_t ldb,
                             float* c, int64_t ldc, bool accumulate, Ahead ahead, float* widened) {
  if (rows == R) {
    tile<R, V, Copy>(k, a, lda, b, ldb, c, ldc, accumulate, ahead, widened);
  } else if constexpr (R > 1) {
    tile_rows<R - 1, V, Copy>(rows, k, a, lda, b, ldb, c, ldc, accumulate, ahead, widened);
  }
}

// All rows against V vectors of columns, in tiles of nearly equal height. `ahead` is fetched on the
// way. The first tile widens bfloat16 columns into `widened`, where the others find them.
template <int V, class Weight>
static inline void tile_columns(int64_t m, int64_t k, const float* a, int64_t lda, const Weight* b, int64_t ldb,
                                float* c, int64_t ldc, bool accumulate, Ahead ahead = {}, float* widened = nullptr) {
  const int64_t tiles = (m + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = m * t / tiles, rows = m * (t + 1) / tiles - begin;
    const int64_t from = ahead.bytes * t / tiles, to = ahead.bytes * (t + 1) / tiles;
    const Ahead part{ahead.data + from, to - from};
    const float* in = a + begin * lda;
    float* out = c + begin * ldc;
    if constexpr (sizeof(Weight) == sizeof(float)) {
      tile_rows<kTileRows, V, false>(rows, k, in, lda, b, ldb, out, ldc, accumulate, part, nullptr);
    } else if (t == 0 && tiles > 1) {
      tile_rows<kTileRows, V, true>(rows, k, in, lda, b, ldb, out, ldc, accumulate, part, widened);
    } else if (t == 0) {
      tile_rows<kTileRows, V, false>(rows, k, in, lda, b, ldb, out, ldc, accumulate, part, nullptr);
    } else {
      tile_rows<kTileRows, V, false>(rows, k, in, lda, widened, V * kWidth, out, ldc, accumulate, part, nullptr);
    }
  }
}

}  // namespace armt::cpu::ARMT_ISA_NAME
