// The associative memory: feature map, recall, update. Features that are zero, about three in four,
// are left out.
#pragma once

#include "cpu/kernels/activation.h"
#include "cpu/simd.h"
#include "cpu/tasks.h"

namespace armt::cpu::ARMT_ISA_NAME {

inline constexpr int kMemoryVectors = 8;  // vectors of a row of A that a pass over the features sums up

#if defined(__AVX512F__)
// Block j of phi, eight features at a time: appends the non-zero ones and returns their new number.
// Up to seven features behind the last one are overwritten, so `out` must hold whole blocks.
static inline int64_t pack_block(const float* u, int64_t j, int64_t count, int32_t first, int64_t found, Feature* out) {
  typedef uint32_t Half __attribute__((vector_size(32)));
  typedef uint64_t Pairs __attribute__((vector_size(64)));
  Half index = Half{0, 1, 2, 3, 4, 5, 6, 7} + static_cast<uint32_t>(first);
  for (int64_t i = 0; i < count; i += 8, index += 8u) {
    const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(u + i), _mm256_loadu_ps(u + i - j));
    const __mmask8 kept = _mm256_cmp_ps_mask(value, _mm256_setzero_ps(), _CMP_NEQ_UQ);
    const Pairs pairs =
        __builtin_convertvector(reinterpret_cast<Half>(value), Pairs) | __builtin_convertvector(index, Pairs) << 32;
    const __m512i packed = _mm512_maskz_compress_epi64(kept, reinterpret_cast<__m512i>(pairs));
    _mm512_storeu_si512(out + found, packed);
    // Explicitly widened: GCC 12 may count a spilled mask's neighbours too.
    found += __builtin_popcount(_cvtmask8_u32(kept));
  }
  return found;
}
#endif

// phi(x), x [n]: u = (max(x, 0), max(-x, 0)); block j = 1 .. rolls has u[i] u[(i - j) mod 2n] at i.
// Writes the non-zero features, ascending, and returns how many. NaN stays NaN.     arXiv
// 2102.11174
static int64_t features(const float* x, int64_t n, int64_t rolls, Feature* out, float* scratch) {
  const int64_t count = 2 * n;
  float* u = scratch + rolls;  // the `rolls` values in front of u repeat its end
  for (int64_t i = 0; i < n; ++i) {
    u[i] = x[i] <= 0.0f ? 0.0f : x[i];
    u[n + i] = x[i] >= 0.0f ? 0.0f : -x[i];
  }
  for (int64_t j = 1, end = count; j <= rolls; ++j) {
    if (end == 0) end = count;
    u[-j] = u[--end];
  }
  int64_t found = 0;
#if defined(__AVX512F__)
  if (count % 8 == 0) {
    for (int64_t j = 1; j <= rolls; ++j)
      found = pack_block(u, j, count, static_cast<int32_t>((j - 1) * count), found, out);
    return found;
  }
#endif
  auto* support = reinterpret_cast<int32_t*>(u + count);
  int64_t supported = 0;
  for (int64_t i = 0; i < count; ++i) {
    support[supported] = static_cast<int32_t>(i);
    supported += u[i] != 0.0f;
  }
  for (int64_t j = 1; j <= rolls; ++j) {
    const auto first = static_cast<int32_t>((j - 1) * count);
    for (int64_t s = 0; s < supported; ++s) {
      const int32_t i = support[s];
      const float value = u[i] * u[i - j];
      out[found] = {value, first + i};
      found += value != 0.0f;
    }
  }
  return found;
}

// out += sign (sum_f value_f A[f]) / den over V vectors of columns, one chain over the features in
// order.
template <int V>
static inline void recall_vectors(const Feature* features, int64_t count, const float* a, int64_t ld, vf den, vf sign,
                                  float* out) {
  vf sums[V];
  ARMT_UNROLL for (int v = 0; v < V; ++v) sums[v] = vf{};
  for (int64_t i = 0; i < count; ++i) {
    const float* row = a + features[i].index * ld;
    const vf value = splat(features[i].value);
    ARMT_UNROLL for (int v = 0; v < V; ++v) sums[v] = fma(value, load(row + v * kWidth), sums[v]);
  }
  ARMT_UNROLL for (int v = 0; v < V; ++v) {
    store(out + v * kWidth, load(out + v * kWidth) + sign * (sums[v] / den));
  }
}

static inline void recall_part(const Feature* features, int64_t count, const float* a, int64_t ld, int64_t columns,
                               vf den, vf sign, float* out) {
  vf sums = {};
  for (int64_t i = 0; i < count; ++i) {
    sums = fma(splat(features[i].value), load_part(a + features[i].index * ld, columns), sums);
  }
  store_part(out, load_part(out, columns) + sign * (sums / den), columns);
}

static void recall(const Feature* features, int64_t count, const float* a, int64_t ld, int64_t columns, float den,
                   float sign, float* out) {
  const vf dens = splat(den), signs = splat(sign);
  int64_t e = 0;
  for (; e + kMemoryVectors * kWidth <= columns; e += kMemoryVectors * kWidth) {
    recall_vectors<kMemoryVectors>(features, count, a + e, ld, dens, signs, out + e);
  }
  if (e + 4 * kWidth <= columns) {
    recall_vectors<4>(features, count, a + e, ld, dens, signs, out + e);
    e += 4 * kWidth;
  }
  for (; e + kWidth <= columns; e += kWidth) recall_vectors<1>(features, count, a + e, ld, dens, signs, out + e);
  if (e < columns) recall_part(features, count, a + e, ld, columns - e, dens, signs, out + e);
}

template <int V>
static inline void update_vectors(const Feature* keys, int64_t count, const float* delta, int64_t ld, const float* from,
                                  float* to) {
  vf sums[V];
  ARMT_UNROLL for (int v = 0; v < V; ++v) sums[v] = from == nullptr ? vf{} : load(from + v * kWidth);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = delta + keys[i].index * ld;
    const vf value = splat(keys[i].value);
    ARMT_UNROLL for (int v = 0; v < V; ++v) sums[v] = fma(value, load(row + v * kWidth), sums[v]);
  }
  ARMT_UNROLL for (int v = 0; v < V; ++v) store(to + v * kWidth, sums[v]);
}

static void update(const Feature* keys, int64_t count, const float* delta, int64_t ld, int64_t columns,
                   const float* from, float* to) {
  if (count == 0 && from == to) return;
  int64_t e = 0;
  const auto at = [from](int64_t column) { return from == nullptr ? nullptr : from + column; };
  for (; e + 4 * kWidth <= columns; e += 4 * kWidth) update_vectors<4>(keys, count, delta + e, ld, at(e), to + e);
  for (; e + kWidth <= columns; e += kWidth) update_vectors<1>(keys, count, delta + e, ld, at(e), to + e);
  if (e == columns) return;
  vf sums = from == nullptr ? vf{} : load_part(from + e, columns - e);
  for (int64_t i = 0; i < count; ++i) {
    sums = fma(splat(keys[i].value), load_part(delta + keys[i].index * ld + e, columns - e), sums);
  }
  store_part(to + e, sums, columns - e);
}

// 1 / (1 + e^-x): e^-x may overflow to infinity, which gives 0.
static inline vf sigmoid_of(vf x) {
  return 1.0f / (1.0f + exp(-x));
}

static void sigmoid(float* x, int64_t n) {
  map<sigmoid_of>(x, n);
}

}  // namespace armt::cpu::ARMT_ISA_NAME
