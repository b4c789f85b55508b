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

const char* name_of(Matrix which) {
  constexpr const char* kNames[] = {"qkv",       "attn_out",  "mlp_up",   "mlp_down", "mem_query",
                                    "mem_key",   "mem_value", "mem_gate", "head",     "embedding",
                                    "positions", "memory",    "sink"};
  return kNames[static_cast<size_t>(which)];
}

const char* name_of(Vector which) {
  constexpr const char* kNames[] = {"qkv_bias", "attn_out_bias", "mlp_up_bias",    "mlp_down_bias", "mem_gate_bias",
                                    "norm1",    "norm1_bias",    "norm2",          "norm2_bias",    "q_norm",
                                    "k_norm",   "final_norm",    "final_norm_bias"};
  return kNames[static_cast<size_t>(which)];
}

Shape expected_shape(Matrix which, const ModelConfig& config) {
  const DecoderConfig& decoder = config.decoder;
  const int64_t d = decoder.d_model;
  switch (which) {
    case Matrix::qkv:
      return {config.qkv_width(), d};
    case Matrix::attn_out:
      return {d, config.query_width()};
    case Matrix::mlp_up:
      return {decoder.gated_mlp ? 2 * decoder.d_ff : decoder.d_ff, d};
    case Matrix::mlp_down:
      return {d, decoder.d_ff};
    case Matrix::mem_query:
    case Matrix::mem_key:
      return {config.memory.d_mem, d};
    case Matrix::mem_value:
      return {d, d};
    case Matrix::mem_gate:
      return {config.gate_rows(), d};
    case Matrix::head:
    case Matrix::embedding:
      return {decoder.vocab_size, d};
    case Matrix::positions:
      return {decoder.learned_positions, d};
    case Matrix::memory:
      return {config.memory.memory_tokens, d};
    case Matrix::sink:
      return {1, d};
    case Matrix::count:
      break;
  }
  return {};
}

int64_t expected_size(Vector which, const ModelConfig& config) {
  switch (which) {
    case Vector::qkv_bias:
      return config.qkv_width();
    case Vector::mlp_up_bias:
      return expected_shape(Matrix::mlp_up, config).rows;
    case Vector::mem_gate_bias:
      return config.gate_rows();
    case Vector::q_norm:
    case Vector::k_norm:
      return config.decoder.head_dim;
    default:
      return config.decoder.d_model;
  }
}

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
