// What every backend knows about the weights that it is given: names, shapes, checks, and numbers that follow from the
// configuration alone.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "backend.h"

namespace armt {

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

// "layer 3 mlp_up", "embedding".
std::string slot_name(Matrix which, int64_t layer);
std::string slot_name(Vector which, int64_t layer);

// CheckpointError for a layer that is not there, or sizes that are not the configuration's.
void check_slot(Matrix which, int64_t layer, const HostMatrix& matrix, const ModelConfig& config);
void check_slot(Vector which, int64_t layer, std::span<const float> values, const ModelConfig& config);

// The bias that goes with a norm's weight.
inline Vector norm_bias(Vector norm) {
  switch (norm) {
    case Vector::norm1:
      return Vector::norm1_bias;
    case Vector::norm2:
      return Vector::norm2_bias;
    default:
      return Vector::final_norm_bias;
  }
}

// Rotation per position of each pair of features, [rotary_dims / 2]: theta^(-2 i / rotary_dims), scaled as rope_scaling
// says and rounded to float32.
std::vector<float> rotary_frequencies(const DecoderConfig& decoder);

}  // namespace armt
