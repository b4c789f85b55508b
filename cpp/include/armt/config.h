// What a model is: sizes and switches, independent of any device.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace armt {

enum class DType : uint8_t { f32, bf16, f16 };
enum class Dialect : uint8_t { paper, modern, inner, rmt };
enum class NormKind : uint8_t { layer, rms };
enum class ActivationKind : uint8_t { gelu_tanh, gelu_erf, silu, relu };
enum class RopeScaling : uint8_t { none, linear, llama3 };

// Bytes of one element.
constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

// One decoder block covers GPT-2, Llama (and its kin) and GPT-NeoX:
//   a = norm1(x); x1 = x + Wo attention(Wqkv a); x2 = x1 + mlp(norm2(x1))      serial residual
//   x2 = x + Wo attention(Wqkv norm1(x)) + mlp(norm2(x))                       parallel residual
//   mlp(a) = W_down act(W_up a), or W_down (act(W_gate a) * W_up a) when gated_mlp
struct DecoderConfig {
  int64_t vocab_size = 0;
  int64_t d_model = 0;
  int64_t n_layers = 0;
  int64_t n_heads = 0;     // query heads
  int64_t n_kv_heads = 0;  // divides n_heads; query head i uses key/value head i * n_kv_heads / n_heads (floor)
  int64_t head_dim = 0;
  int64_t d_ff = 0;
  NormKind norm = NormKind::layer;
  double norm_eps = 1e-5;
  ActivationKind activation = ActivationKind::gelu_tanh;
  bool gated_mlp = false;
  bool parallel_residual = false;
  bool qk_norm = false;                 // RMS norm of each query and key head before the rotation
  double attention_scale = 0.0;         // 0: 1 / sqrt(head_dim)
  bool scale_by_inverse_layer = false;  // divides the scores of layer i by i + 1
  int64_t learned_positions = 0;        // rows of the position table (0: none)
  int64_t rotary_dims = 0;              // leading features of a head that are rotated (0: none)
  double rope_theta = 10000.0;
  RopeScaling rope_scaling = RopeScaling::none;
  double rope_factor = 1.0;
  double rope_low_freq = 1.0;
  double rope_high_freq = 4.0;
  double rope_original_length = 8192.0;
};

struct MemoryConfig {
  Dialect dialect = Dialect::paper;
  int64_t memory_tokens = 0;
  int64_t d_mem = 0;    // width of a key before the feature map (0 for RMT)
  int64_t n_heads = 1;  // memory heads
  int64_t rolls = 3;
  bool normalise_keys = false;  // true in the modern dialects
  bool use_denom = true;
  bool correction = true;
  bool gating = false;
  bool use_sink = false;
  bool sliding_window = false;
  bool wrap_positions = false;
  int64_t segment_size = 0;
};

struct ModelConfig {
  DecoderConfig decoder;
  MemoryConfig memory;

  bool recurrent_tokens() const { return memory.dialect == Dialect::rmt; }
  bool has_association() const { return memory.dialect != Dialect::rmt; }
  int64_t sink_rows() const { return memory.use_sink ? 1 : 0; }
  // Rows in front of the tokens: the sink, or RMT's read memory.
  int64_t front_rows() const { return recurrent_tokens() ? memory.memory_tokens : sink_rows(); }
  int64_t features() const { return 2 * memory.rolls * memory.d_mem / memory.n_heads; }  // F, per memory head
  int64_t value_dim() const { return decoder.d_model / memory.n_heads; }                 // E, per memory head
  int64_t query_width() const { return decoder.n_heads * decoder.head_dim; }
  int64_t kv_width() const { return decoder.n_kv_heads * decoder.head_dim; }
  int64_t qkv_width() const { return query_width() + 2 * kv_width(); }
  int64_t gate_rows() const { return memory.gating ? decoder.d_model : memory.n_heads; }
  // Tokens that one segment can hold, room for closing it included, behind `previous` windowed tokens.
  int64_t segment_limit(int64_t previous = 0) const;

  // Throws InvalidArgument that lists every impossible or refused setting.
  void validate() const;
};

}  // namespace armt
