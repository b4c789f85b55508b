// Weights in the layout that the kernels read.
#pragma once

#include <cstdint>
#include <string>

#include "backend.h"
#include "cpu/buffer.h"

namespace armt::cpu {

// W [n, k] as panels of `panel` rows: [panels][k][panel], zero padded, float or bfloat16 bits. With
// `gated` W is [gate; up], each n / 2 rows, and panels alternate: gate rows 0..panel-1, up rows
// 0..panel-1, gate rows panel.. ...
struct PackedMatrix {
  int64_t n = 0, k = 0;
  int64_t panel = 0;
  bool bf16 = false;
  bool gated = false;
  Buffer data;

  bool empty() const { return data.data() == nullptr; }
  int64_t out_columns() const { return gated ? n / 2 : n; }
  int64_t units() const { return (out_columns() + panel - 1) / panel; }
};

class ThreadPool;

PackedMatrix pack(const HostMatrix& matrix, int64_t panel, bool bf16, bool gated, ThreadPool& pool);
// Row `row` of W (not gated) as float32 [k].
void unpack_row(const PackedMatrix& matrix, int64_t row, float* out);

// The matrix as plain float32, row-major.
Buffer plain_rows(const HostMatrix& matrix);

}  // namespace armt::cpu
