// Elementwise functions.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace armt::cpu::ARMT_ISA_NAME {

static inline vf relu(vf x) {
  return select(x < 0.0f, vf{}, x);
}

// x sigmoid(x)
static inline vf silu(vf x) {
  return x / (1.0f + exp(-x));
}

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
static inline vf gelu_tanh(vf x) {
  const vf inner = x * fma(x * x, splat(0.044715f), splat(1.0f));
  return x / (1.0f + exp(inner * -1.5957691216f));
}

// erfc(t) for t >= 0 as e^(-t^2) w P(w), w = 1 / (1 + t / 2); P fitted to 4e-8 relative on 0 <= t
// <= 10.
static inline vf erfc_of_positive(vf t) {
  constexpr float kP[] = {0.282086416f, 0.282375352f,  0.243103421f, 0.202688307f,  -0.0266292456f,
                          0.27807259f,  -0.487204823f, 0.284577416f, -0.0590694762f};
  const vf w = 1.0f / fma(t, splat(0.5f), splat(1.0f));
  vf p = splat(kP[8]);
  ARMT_UNROLL for (int i = 7; i >= 0; --i) p = fma(p, w, splat(kP[i]));
  return exp(-t * t) * w * p;
}

// x (1 + erf(x / sqrt 2)) / 2 = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, without cancellation.
static inline vf gelu_erf(vf x) {
  const vf size = max(x, -x);
  const vf y = relu(x) - 0.5f * size * erfc_of_positive(size * 0.70710678f);
  return select(x == x, y, x);
}

template <vf (*Function)(vf)>
static inline void map(float* x, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(x + i, Function(load(x + i)));
  if (i < n) store_part(x + i, Function(load_part(x + i, n - i)), n - i);
}

static void exponent(float* x, int64_t n) {
  map<exp>(x, n);
}

static void activate(ActivationKind kind, float* x, int64_t n) {
  switch (kind) {
    case ActivationKind::gelu_tanh:
      return map<gelu_tanh>(x, n);
    case ActivationKind::gelu_erf:
      return map<gelu_erf>(x, n);
    case ActivationKind::silu:
      return map<silu>(x, n);
    case ActivationKind::relu:
      return map<relu>(x, n);
  }
}

}  // namespace armt::cpu::ARMT_ISA_NAME
