// Norms and sums of single rows, in an order that depends on the width alone.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace armt::cpu::ARMT_ISA_NAME {

static inline vf load_lanes(const float* x, int64_t count) {
  return count >= kWidth ? load(x) : load_part(x, count);
}

// Sum over i of term(x[i]) in eight interleaved vectors that are added in pairs: short chains,
// small error.
template <class Term>
static inline float sum_of(const float* x, int64_t n, Term term) {
  vf part[8] = {};
  int64_t i = 0;
  for (; i + 8 * kWidth <= n; i += 8 * kWidth) {
    ARMT_UNROLL for (int p = 0; p < 8; ++p) part[p] += term(load(x + i + p * kWidth));
  }
  for (int p = 0; i + kWidth <= n; i += kWidth, ++p) part[p] += term(load(x + i));
  if (i < n) {
    const vi inside = lane_index() < static_cast<int32_t>(n - i);
    part[7] += select(inside, term(load_part(x + i, n - i)), vf{});
  }
  return sum(((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7])));
}

// y = (x - shift) * scale * weight (+ bias)
static inline void scale_row(const float* x, float* y, int64_t n, float shift, float scale, const float* weight,
                             const float* bias) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t left = n - i;
    vf value = (load_lanes(x + i, left) - shift) * scale * load_lanes(weight + i, left);
    if (bias != nullptr) value += load_lanes(bias + i, left);
    if (left >= kWidth) {
      store(y + i, value);
    } else {
      store_part(y + i, value, left);
    }
  }
}

static void layer_norm(const float* x, float* y, int64_t n, const float* weight, const float* bias, float eps) {
  const float mean = sum_of(x, n, [](vf v) { return v; }) / static_cast<float>(n);
  const float squares = sum_of(x, n, [mean](vf v) { return (v - mean) * (v - mean); });
  const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
  scale_row(x, y, n, mean, scale, weight, bias);
}

static void rms_norm(const float* x, float* y, int64_t n, const float* weight, const float* bias, float eps) {
  const float squares = sum_of(x, n, [](vf v) { return v * v; });
  const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
  scale_row(x, y, n, 0.0f, scale, weight, bias);
}

static void add(const float* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, load(y + i) + load(x + i));
  for (; i < n; ++i) y[i] += x[i];
}

}  // namespace armt::cpu::ARMT_ISA_NAME
