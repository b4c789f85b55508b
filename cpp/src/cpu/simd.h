// Vectors of the instruction set that this file is compiled for, in compiler vector extensions.
// Only isa_*.cpp and kernels/*.h include it: everything lives in the namespace of one instruction
// set, so that the linker can never merge code compiled with different flags. For the same reason
// no std:: templates here.
#pragma once

#include <cstdint>

#ifndef ARMT_ISA_NAME
#error "include simd.h through isa_<name>.cpp only"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__clang__)
#define ARMT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ARMT_UNROLL _Pragma("GCC unroll 32")
#endif

namespace armt::cpu::ARMT_ISA_NAME {

// W: floats in a vector.
#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
#elif defined(__AVX2__)
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));
typedef uint16_t vh __attribute__((vector_size(kWidth * 2)));
typedef float vf_unaligned __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));

static inline int64_t min_of(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static inline vf load(const float* p) {
  return *reinterpret_cast<const vf_unaligned*>(p);
}
static inline void store(float* p, vf x) {
  *reinterpret_cast<vf_unaligned*>(p) = x;
}
static inline vf splat(float x) {
  return x - vf{};
}

// bfloat16 weights widened to fp32.
static inline vf load(const uint16_t* p) {
  const vh bits = *reinterpret_cast<const vh_unaligned*>(p);
  return reinterpret_cast<vf>(__builtin_convertvector(bits, vu) << 16);
}

// The first `count` < W floats; the other lanes are 0.
static inline vf load_part(const float* p, int64_t count) {
  alignas(64) float lanes[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

static inline void store_part(float* p, vf x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = x[i];
}

// a b + c, fused wherever the instruction set has it.
static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

static inline vf select(vi condition, vf yes, vf no) {
  return condition ? yes : no;
}
static inline vf max(vf a, vf b) {
  return a > b ? a : b;
}  // b where either is NaN
static inline vf min(vf a, vf b) {
  return a < b ? a : b;
}

static inline vf sqrt(vf x) {
  vf y;
  ARMT_UNROLL for (int i = 0; i < kWidth; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
}

static inline vi lane_index() {
  vi index;
  ARMT_UNROLL for (int i = 0; i < kWidth; ++i) index[i] = i;
  return index;
}

// Sums of the lanes by halves: a fixed order.
static inline float sum(vf x) {
  float lanes[kWidth];
  store(lanes, x);
  ARMT_UNROLL for (int half = kWidth / 2; half > 0; half /= 2) {
    ARMT_UNROLL for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

static inline float max_lane(vf x) {
  float best = x[0];
  ARMT_UNROLL for (int i = 1; i < kWidth; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// e^x, at most 2 ulp off; 0 below ln(FLT_MIN), infinity above ln(FLT_MAX), NaN stays NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2;  e^x = 2^n p(r), the power of two added to the exponent of p.
static inline vf exp(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = fma(x, splat(1.44269504f), magic);
  const vf n = shifted - magic;
  vf r = fma(n, splat(-0.693359375f), x);  // 10 bits: n times it is exact
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691e-4f);
  p = fma(p, r, splat(1.3981999e-3f));
  p = fma(p, r, splat(8.3334519e-3f));
  p = fma(p, r, splat(4.1665796e-2f));
  p = fma(p, r, splat(1.6666665e-1f));
  p = fma(p, r, splat(0.5f));
  p = fma(p * r, r, r) + 1.0f;
  const vu power = reinterpret_cast<vu>(shifted) << 23;  // the low bits of `shifted` hold n
  vf y = reinterpret_cast<vf>(reinterpret_cast<vu>(p) + power);
  y = select(x < -87.3365f, vf{}, y);
  y = select(x > 88.72283f, splat(__builtin_inff()), y);
  return select(x == x, y, x);
}

}  // namespace armt::cpu::ARMT_ISA_NAME
