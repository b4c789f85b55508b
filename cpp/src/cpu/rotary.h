// Rotary positions.
#pragma once

#include <cstdint>
#include <vector>

#include "armt/config.h"
#include "cpu/buffer.h"

namespace armt::cpu {

// cos and sin of position * f_i, f_i = theta^(-2i / dims), i < dims / 2, scaled as rope_scaling
// says and rounded to float32. Angles in float64. Positions below a bound come from a table, others
// from the same function.
class RotaryTable {
 public:
  explicit RotaryTable(const ModelConfig& config);

  int64_t half() const { return static_cast<int64_t>(frequencies_.size()); }  // 0: nothing is rotated
  // cos [half], sin [half]; `spare` [2 half] may hold them.
  const float* at(int64_t position, float* spare) const;

 private:
  void compute(int64_t position, float* out) const;

  std::vector<float> frequencies_;  // [half]
  int64_t rows_ = 0;
  Buffer table_;  // [rows, 2 half]
};

}  // namespace armt::cpu
