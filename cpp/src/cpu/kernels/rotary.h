// Rotation of one head.
#pragma once

#include "cpu/simd.h"

namespace armt::cpu::ARMT_ISA_NAME {

// (x_i, x_{i + half}) <- (x_i cos_i - x_{i + half} sin_i, x_{i + half} cos_i + x_i sin_i);  turn:
// cos [half], sin [half]
static void rotate(float* x, int64_t half, const float* turn) {
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const vf a = load(x + i), b = load(x + half + i);
    const vf cosine = load(turn + i), sine = load(turn + half + i);
    store(x + i, a * cosine - b * sine);
    store(x + half + i, b * cosine + a * sine);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * turn[i] - b * turn[half + i];
    x[half + i] = b * turn[i] + a * turn[half + i];
  }
}

}  // namespace armt::cpu::ARMT_ISA_NAME
