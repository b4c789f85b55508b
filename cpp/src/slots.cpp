#include "slots.h"

#include <cmath>
#include <iterator>
#include <numbers>

#include "armt/error.h"

namespace armt {
namespace {

constexpr const char* kFileHint = "; the weights don't fit this configuration: check the model's settings";

const char* name_of(Matrix which) {
  constexpr const char* kNames[] = {"qkv",       "attn_out",  "mlp_up",   "mlp_down", "mem_query",
                                    "mem_key",   "mem_value", "mem_gate", "head",     "embedding",
                                    "positions", "memory",    "sink"};
  static_assert(std::size(kNames) == static_cast<size_t>(Matrix::count));
  return kNames[static_cast<size_t>(which)];
}

const char* name_of(Vector which) {
  constexpr const char* kNames[] = {"qkv_bias", "attn_out_bias", "mlp_up_bias",    "mlp_down_bias", "mem_gate_bias",
                                    "norm1",    "norm1_bias",    "norm2",          "norm2_bias",    "q_norm",
                                    "k_norm",   "final_norm",    "final_norm_bias"};
  static_assert(std::size(kNames) == static_cast<size_t>(Vector::count));
  return kNames[static_cast<size_t>(which)];
}

template <class Which>
std::string name_in_layer(Which which, int64_t layer) {
  const std::string name = name_of(which);
  return belongs_to_model(which) ? name : "layer " + std::to_string(layer) + " " + name;
}

template <class Which>
void check_layer(Which which, int64_t layer, int64_t layers) {
  const int64_t count = belongs_to_model(which) ? 1 : layers;
  if (layer >= 0 && layer < count) return;
  throw CheckpointError(std::string(name_of(which)) + ": found layer " + std::to_string(layer) +
                        ", expected one of 0 .. " + std::to_string(count - 1) + kFileHint);
}

std::string text(const Shape& shape) {
  return "[" + std::to_string(shape.rows) + ", " + std::to_string(shape.cols) + "]";
}

// Long waves are stretched by the factor, short ones stay, those between are mixed.
double scaled_llama3(double f, const DecoderConfig& decoder) {
  const double wave = 2.0 * std::numbers::pi / f, n = decoder.rope_original_length;
  const double low = decoder.rope_low_freq, high = decoder.rope_high_freq;
  if (wave < n / high) return f;
  if (wave > n / low) return f / decoder.rope_factor;
  const double t = (n / wave - low) / (high - low);
  return (1.0 - t) * f / decoder.rope_factor + t * f;
}

double scaled(double f, const DecoderConfig& decoder) {
  switch (decoder.rope_scaling) {
    case RopeScaling::none:
      return f;
    case RopeScaling::linear:
      return f / decoder.rope_factor;
    case RopeScaling::llama3:
      return scaled_llama3(f, decoder);
  }
  return f;
}

}  // namespace

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

std::string slot_name(Matrix which, int64_t layer) {
  return name_in_layer(which, layer);
}
std::string slot_name(Vector which, int64_t layer) {
  return name_in_layer(which, layer);
}

void check_slot(Matrix which, int64_t layer, const HostMatrix& matrix, const ModelConfig& config) {
  check_layer(which, layer, config.decoder.n_layers);
  const Shape expected = expected_shape(which, config);
  if (matrix.rows == expected.rows && matrix.cols == expected.cols) return;
  throw CheckpointError(slot_name(which, layer) + ": found shape " + text({matrix.rows, matrix.cols}) + ", expected " +
                        text(expected) + kFileHint);
}

void check_slot(Vector which, int64_t layer, std::span<const float> values, const ModelConfig& config) {
  check_layer(which, layer, config.decoder.n_layers);
  const int64_t expected = expected_size(which, config);
  if (std::ssize(values) == expected) return;
  throw CheckpointError(slot_name(which, layer) + ": found " + std::to_string(values.size()) + " values, expected " +
                        std::to_string(expected) + kFileHint);
}

std::vector<float> rotary_frequencies(const DecoderConfig& decoder) {
  std::vector<float> found;
  for (int64_t i = 0; i < decoder.rotary_dims / 2; ++i) {
    const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(decoder.rotary_dims);
    found.push_back(static_cast<float>(scaled(std::pow(decoder.rope_theta, exponent), decoder)));
  }
  return found;
}

}  // namespace armt
