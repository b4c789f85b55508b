// Maps by which the bulk copy engine of Hopper GPUs finds tiles of row-major matrices.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace armt::cuda {

// Tiles of `box_rows` rows by 128 bytes of a matrix [rows, cols], exchanged as matrix instructions want them in shared
// memory; what lies outside of the matrix reads as zero. `element` is 1 or 2 bytes.
CUtensorMap tiles_of(const void* data, int64_t rows, int64_t cols, int element, int box_rows);

}  // namespace armt::cuda
