#include "weights.h"

#include <bit>
#include <cmath>
#include <cstring>

namespace armt::cuda {
namespace {

float widen_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | static_cast<uint32_t>(mantissa) << 13);
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                   : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return sign != 0 ? -size : size;
}

float read(const HostMatrix& matrix, int64_t index) {
  if (matrix.dtype == DType::f32) return static_cast<const float*>(matrix.data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(matrix.data)[index];
  if (matrix.dtype == DType::f16) return widen_half(bits);
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

uint16_t narrow_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 64);  // stays a NaN
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Round to nearest, ties to even; too large becomes infinity.
uint16_t narrow_half(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);
  const int step = std::max(exponent - 11, -24);  // power of two of the last place
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -step)));
  // units <= 2048: adding it to the exponent field carries into the next power of two by itself.
  const uint32_t field = step == -24 ? units : (static_cast<uint32_t>(step + 24) << 10) + units;
  return sign | static_cast<uint16_t>(field);
}

void write(char* out, int64_t index, float x, DType dtype) {
  if (dtype == DType::f32) {
    std::memcpy(out + index * 4, &x, 4);
    return;
  }
  const uint16_t bits = dtype == DType::bf16 ? narrow_bf16(x) : narrow_half(x);
  std::memcpy(out + index * 2, &bits, 2);
}

}  // namespace

std::vector<char> converted_rows(const HostMatrix& matrix, int64_t first, int64_t count, DType dtype) {
  std::vector<char> out(static_cast<size_t>(count * matrix.cols * size_of(dtype)));
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < matrix.cols; ++c) {
      const float x = read(matrix, (first + r) * matrix.row_stride + c * matrix.col_stride);
      write(out.data(), r * matrix.cols + c, x, dtype);
    }
  }
  return out;
}

std::vector<char> converted(std::span<const float> values, DType dtype) {
  const auto count = std::ssize(values);
  return converted_rows({.data = values.data(), .dtype = DType::f32, .rows = 1, .cols = count, .row_stride = count}, 0,
                        1, dtype);
}

}  // namespace armt::cuda
