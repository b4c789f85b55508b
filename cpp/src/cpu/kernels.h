// The kernels of the CPU backend, one table for each instruction set (isa_*.cpp). Plain pointers
// and sizes only, all float32 unless a comment says otherwise; no kernel starts threads or
// allocates.
#pragma once

#include <cstdint>

#include "armt/config.h"
#include "cpu/tasks.h"

namespace armt::cpu {

// What happens to a finished sum y = x W^T on its way to the output row.
struct Finish {
  const float* bias = nullptr;  // [n], or null
  bool add = false;             // out += y + bias
  bool activate = false;        // out = act(y + bias)
  bool gated = false;           // out = act(gate) * up; panels alternate gate, up; bias [2 n], the gate's first
  ActivationKind activation = ActivationKind::gelu_tanh;
};

// Rows times some panels of a packed matrix: out[r, c] for every r < rows and the columns of units
// unit_begin .. unit_end-1. A unit is one panel, or a pair (gate, up). Element type of the panels:
// float, or bfloat16 bits.
struct GemmTask {
  const float* in = nullptr;  // [rows, k], row stride ld_in
  int64_t ld_in = 0;
  int64_t rows = 0;
  int64_t k = 0;
  const void* panels = nullptr;  // [units * panels per unit][k][panel]
  bool bf16 = false;
  int64_t unit_begin = 0, unit_end = 0;
  float* out = nullptr;  // [rows, n], row stride ld_out
  int64_t ld_out = 0;
  int64_t n = 0;             // columns of `out` that exist; those past it are never stored
  float* scratch = nullptr;  // Kernels::gemm_scratch floats, 64-byte aligned
  Finish finish;
};

struct Kernels {
  const char* name;
  int64_t width;         // W: floats in a vector
  int64_t panel;         // columns of a packed panel
  int64_t gemm_rows;     // a task should hold at most so many rows
  int64_t gemm_scratch;  // floats

  void (*gemm)(const GemmTask& task);

  // y = (x - mean) / sqrt(var + eps) * weight (+ bias), var = mean of (x - mean)^2; x == y allowed.
  void (*layer_norm)(const float* x, float* y, int64_t n, const float* weight, const float* bias, float eps);
  // y = x / sqrt(mean of x^2 + eps) * weight (+ bias)
  void (*rms_norm)(const float* x, float* y, int64_t n, const float* weight, const float* bias, float eps);
  void (*activate)(ActivationKind kind, float* x, int64_t n);  // in place
  void (*exponent)(float* x, int64_t n);                       // x = e^x, in place
  void (*add)(const float* x, float* y, int64_t n);            // y += x

  // ---- attention, rotary, association: begin
  void (*attend)(const AttentionTask& task);
  // (x_i, x_{i + half}) <- (x_i cos_i - x_{i + half} sin_i, x_{i + half} cos_i + x_i sin_i); turn:
  // cos [half], sin [half]
  void (*rotate)(float* x, int64_t half, const float* turn);

  int64_t memory_slice;  // columns of A that a read should pass over at once
  // The non-zero features of phi(x), x [n], ascending; returns how many. `out` holds all 2 rolls n.
  int64_t (*features)(const float* x, int64_t n, int64_t rolls, Feature* out, float* scratch);
  // out += sign (sum over features of value A[index]) / den, columns floats of each row; A has row
  // stride ld.
  void (*recall)(const Feature* features, int64_t count, const float* a, int64_t ld, int64_t columns, float den,
                 float sign, float* out);
  // to = from + sum over tokens of value delta[index], one row of A; from null: 0, from == to
  // allowed.
  void (*update)(const Feature* tokens, int64_t count, const float* delta, int64_t ld, int64_t columns,
                 const float* from, float* to);
  void (*sigmoid)(float* x, int64_t n);  // in place
  // ---- attention, rotary, association: end
};

}  // namespace armt::cpu
