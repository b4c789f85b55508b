#include "engine/fingerprint.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace armt {
namespace {

constexpr int64_t kSamples = 1024;
constexpr uint64_t kVectorSlot = 1000;  // keeps the slots of vectors apart from those of matrices

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

class Hash {
 public:
  void add(uint64_t value) { state_ = mix(state_ + 0x9e3779b97f4a7c15ULL) ^ mix(value + ++count_); }
  uint64_t value() const { return mix(state_ + count_); }

 private:
  uint64_t state_ = 0;
  uint64_t count_ = 0;
};

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits >> 15 != 0 ? -1.0f : 1.0f;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  if (exponent < 31) return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  using Limits = std::numeric_limits<float>;
  return fraction == 0 ? sign * Limits::infinity() : Limits::quiet_NaN();
}

uint32_t float_bits(const HostMatrix& matrix, int64_t index) {
  switch (matrix.dtype) {
    case DType::f32:
      return std::bit_cast<uint32_t>(static_cast<const float*>(matrix.data)[index]);
    case DType::bf16:
      return uint32_t{static_cast<const uint16_t*>(matrix.data)[index]} << 16;
    case DType::f16:
      return std::bit_cast<uint32_t>(half_to_float(static_cast<const uint16_t*>(matrix.data)[index]));
  }
  return 0;
}

uint64_t hash_tensor(uint64_t slot, int64_t layer, const HostMatrix& matrix) {
  Hash hash;
  hash.add(slot);
  hash.add(static_cast<uint64_t>(layer));
  hash.add(static_cast<uint64_t>(matrix.rows));
  hash.add(static_cast<uint64_t>(matrix.cols));
  const int64_t total = matrix.rows * matrix.cols;
  const int64_t count = std::min(kSamples, total);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t element = i * (total / count) + i * (total % count) / count;
    const int64_t row = element / matrix.cols, col = element % matrix.cols;
    hash.add(float_bits(matrix, row * matrix.row_stride + col * matrix.col_stride));
  }
  return hash.value();
}

}  // namespace

void Fingerprint::add(Matrix which, int64_t layer, const HostMatrix& matrix) {
  sum_ += hash_tensor(static_cast<uint64_t>(which), layer, matrix);
}

void Fingerprint::add(Vector which, int64_t layer, std::span<const float> values) {
  const HostMatrix row{.data = values.data(), .rows = 1, .cols = std::ssize(values)};
  sum_ += hash_tensor(kVectorSlot + static_cast<uint64_t>(which), layer, row);
}

std::string Fingerprint::hex() const {
  std::string text(16, '0');
  for (int i = 0; i < 16; ++i) text[i] = "0123456789abcdef"[sum_ >> (60 - 4 * i) & 15];
  return text;
}

}  // namespace armt
