// Conversion of weights to the device's element type.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend.h"

namespace armt::cuda {

// Rows first .. first+count-1 of the matrix, row-major, in `dtype`.
std::vector<char> converted_rows(const HostMatrix& matrix, int64_t first, int64_t count, DType dtype);
std::vector<char> converted(std::span<const float> values, DType dtype);

}  // namespace armt::cuda
