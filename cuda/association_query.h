// Queries of a read and their features in one kernel (Hopper GPUs, 16-bit weights).
#pragma once

#include "association.cuh"

namespace armt::cuda {

struct QueryFeatures {
  Batch batch;
  View x;
  const void* weights = nullptr;        // [stack][64][D]
  int64_t x_rows = 0, weight_rows = 0;  // up to the last that is used
  __nv_bfloat16* phi = nullptr;         // [rows, F], divided by the denominator
  MemoryShape shape;
};

constexpr int kQueryRows = 48;  // of a block
inline int64_t query_tiles(const Batch& batch) {
  return ceil_div(batch.max_cell_rows, kQueryRows) * batch.cell_count;
}

// Whether this build and device can.
bool makes_query_features(DType dtype, const MemoryShape& shape);
void launch_query_features(DType dtype, const QueryFeatures& query, cudaStream_t stream);

}  // namespace armt::cuda
