// Shapes of weights and their conversion to the device's element type.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend.h"

namespace armt::cuda {

const char* name_of(Matrix which);
const char* name_of(Vector which);

struct Shape {
  int64_t rows = 0, cols = 0;
};
Shape expected_shape(Matrix which, const ModelConfig& config);
int64_t expected_size(Vector which, const ModelConfig& config);

// True for weights of which the model has one, not one a layer.
inline bool belongs_to_model(Matrix which) {
  return which >= Matrix::head;
}
inline bool belongs_to_model(Vector which) {
  return which >= Vector::final_norm;
}

// Rows first .. first+count-1 of the matrix, row-major, in `dtype`.
std::vector<char> converted_rows(const HostMatrix& matrix, int64_t first, int64_t count, DType dtype);
std::vector<char> converted(std::span<const float> values, DType dtype);

}  // namespace armt::cuda
