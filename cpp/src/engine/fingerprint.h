// A number that tells one set of weights from another, cheaply.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "backend.h"

namespace armt {

// Sum over all tensors of hash(slot, layer, rows, cols, samples), so that the order of loading does
// not matter. The samples are up to 1,024 evenly spaced elements in row-major order, as float32
// bits, so that neither strides nor the stored type matter: the same values give the same number.
// Tensors that differ only between the samples are not told apart; training changes them all.
class Fingerprint {
 public:
  void add(Matrix which, int64_t layer, const HostMatrix& matrix);
  void add(Vector which, int64_t layer, std::span<const float> values);
  std::string hex() const;  // 16 lower-case digits

 private:
  uint64_t sum_ = 0;
};

}  // namespace armt
