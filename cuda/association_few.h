// A write of up to 16 memory rows behind its first product, in one kernel (16-bit weights).
#pragma once

#include "association.cuh"

namespace armt::cuda {

struct FewWrite {
  Batch batch;
  const float* raw = nullptr;   // [memory rows of the cells that write, shape.raw]: key, value, gate
  const float* bias = nullptr;  // [stack] of the gate
  unsigned* readers = nullptr;  // [cells that write] blocks that have read z; zero between launches
  MemoryShape shape;
};

// Whether this device can, for memories of this shape and `rows` memory rows.
bool writes_few(DType dtype, const MemoryShape& shape, int64_t rows);
void launch_few_write(const FewWrite& write, cudaStream_t stream);

}  // namespace armt::cuda
