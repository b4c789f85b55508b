// Rows times a packed matrix, on all threads of a pool.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/weights.h"

namespace armt::cpu {

// out[r, c0:c1] = finish(in[r] W^T + bias), r < rows; `in` [rows, k] and `out` [rows, out_columns]
// with row strides. Whole panels are computed, so columns beside c0:c1 may be written too.
// finish.gated is taken from the matrix.
void multiply(ThreadPool& pool, const Kernels& kernels, const PackedMatrix& weights, Finish finish, const float* in,
              int64_t ld_in, int64_t rows, float* out, int64_t ld_out, int64_t c0, int64_t c1);

}  // namespace armt::cpu
