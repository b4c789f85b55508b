// What the fuzz targets share: numbers out of fuzz input, checks that end the process, and small engines.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "armt/error.h"
#include "engine/engine.h"
#include "engine/session.h"
#include "slots.h"

namespace fuzz {

// A promise that was broken: libFuzzer keeps the input.
inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken promise: %s\n", what);
  std::abort();
}

// Takes values from the front of an input; zeros behind its end.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : left_(data, size) {}

  bool empty() const { return left_.empty(); }
  size_t size() const { return left_.size(); }
  std::span<const uint8_t> rest() const { return left_; }
  template <class T>
  T number() {
    T value{};
    const size_t count = std::min(sizeof(T), left_.size());
    if (count > 0) std::memcpy(&value, left_.data(), count);
    left_ = left_.subspan(count);
    return value;
  }
  uint8_t byte() { return number<uint8_t>(); }
  bool flag() { return (byte() & 1) != 0; }
  // 0 .. count - 1
  int64_t below(int64_t count) { return byte() % count; }

 private:
  std::span<const uint8_t> left_;
};

// Weights that a 64-bit mix of slot, layer and place decides, within [-0.5, 0.5).
inline float weight(uint64_t slot, uint64_t index) {
  uint64_t x = slot * 0x9e3779b97f4a7c15ULL + index * 0xbf58476d1ce4e5b9ULL + 1;
  x ^= x >> 31;
  x *= 0x94d049bb133111ebULL;
  x ^= x >> 29;
  return static_cast<float>(x >> 40) / static_cast<float>(1 << 24) - 0.5f;
}

inline std::vector<float> weights(uint64_t slot, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) values[static_cast<size_t>(i)] = weight(slot, static_cast<uint64_t>(i));
  return values;
}

inline bool wanted(armt::Matrix which, const armt::ModelConfig& config) {
  using armt::Matrix;
  const bool memory =
      which == Matrix::mem_query || which == Matrix::mem_key || which == Matrix::mem_value || which == Matrix::mem_gate;
  if (memory) return config.has_association();
  if (which == Matrix::positions) return config.decoder.learned_positions > 0;
  if (which == Matrix::sink) return config.memory.use_sink;
  return which != Matrix::head;
}

inline bool wanted(armt::Vector which, const armt::ModelConfig& config) {
  using armt::Vector;
  if (which == Vector::mem_gate_bias) return config.has_association();
  if (which == Vector::q_norm || which == Vector::k_norm) return config.decoder.qk_norm;
  return true;
}

inline bool per_layer(armt::Matrix which) {
  return which < armt::Matrix::head;
}
inline bool per_layer(armt::Vector which) {
  return which < armt::Vector::final_norm;
}

inline void load_weights(armt::Engine& engine) {
  const armt::ModelConfig& config = engine.config();
  const auto each = [&](auto count, auto&& load) {
    using Slot = decltype(count);
    for (int i = 0; i < static_cast<int>(count); ++i) {
      const auto which = static_cast<Slot>(i);
      if (!wanted(which, config)) continue;
      for (int64_t layer = 0; layer < (per_layer(which) ? config.decoder.n_layers : 1); ++layer) load(which, layer);
    }
  };
  each(armt::Matrix::count, [&](armt::Matrix which, int64_t layer) {
    const auto shape = armt::expected_shape(which, config);
    const auto values =
        weights(static_cast<uint64_t>(which) * 64 + static_cast<uint64_t>(layer), shape.rows * shape.cols);
    armt::HostMatrix matrix;
    matrix.dtype = armt::DType::f32;
    matrix.data = values.data();
    matrix.rows = shape.rows;
    matrix.cols = shape.cols;
    matrix.row_stride = shape.cols;
    matrix.col_stride = 1;
    engine.load(which, layer, matrix);
  });
  each(armt::Vector::count, [&](armt::Vector which, int64_t layer) {
    engine.load(which, layer,
                weights(4096 + static_cast<uint64_t>(which) * 64, armt::expected_size(which, config)));
  });
  engine.finish_loading();
}

inline std::shared_ptr<armt::Engine> make_engine(const armt::ModelConfig& config,
                                                 armt::Schedule schedule = armt::Schedule::automatic) {
  armt::EngineOptions options;
  options.backend.threads = 1;
  options.backend.isa = "baseline";
  options.schedule = schedule;
  auto engine = std::make_shared<armt::Engine>(config, options);
  load_weights(*engine);
  return engine;
}

// Whether a model is small enough to be made and run for one input.
inline bool is_small(const armt::ModelConfig& config) {
  const armt::DecoderConfig& d = config.decoder;
  const armt::MemoryConfig& m = config.memory;
  return d.vocab_size <= 64 && d.d_model <= 32 && d.n_layers <= 3 && d.n_heads <= 8 && d.n_kv_heads <= 8 &&
         d.head_dim <= 16 && d.d_ff <= 64 && d.learned_positions <= 256 && m.memory_tokens <= 8 && m.d_mem <= 32 &&
         m.rolls <= 4 && m.segment_size <= 64;
}

// A model of each dialect: 0 .. kModels - 1.
inline constexpr int64_t kModels = 6;

inline armt::ModelConfig model(int64_t index) {
  armt::ModelConfig config;
  armt::DecoderConfig& d = config.decoder;
  d = {.vocab_size = 13, .d_model = 8, .n_layers = 2, .n_heads = 2, .n_kv_heads = 1, .head_dim = 4, .d_ff = 12};
  armt::MemoryConfig& m = config.memory;
  m = {.memory_tokens = 2, .d_mem = 4, .segment_size = 4};
  const bool llama = index != 0 && index != 4;
  if (llama) {
    d.norm = armt::NormKind::rms;
    d.activation = armt::ActivationKind::silu;
    d.gated_mlp = true;
    d.rotary_dims = 4;
  } else {
    d.learned_positions = 24;
  }
  switch (index) {
    case 0:  // GPT-2, paper
      break;
    case 1:  // Llama, paper, window
      m.sliding_window = true;
      break;
    case 2:  // Llama, modern, heads, gating, sink, window
      m.dialect = armt::Dialect::modern;
      m.normalise_keys = true;
      m.n_heads = 2;
      m.gating = m.use_sink = m.sliding_window = true;
      break;
    case 3:  // Llama, inner loop, window
      m.dialect = armt::Dialect::inner;
      m.normalise_keys = true;
      m.sliding_window = true;
      break;
    case 4:  // GPT-2, RMT
      m.dialect = armt::Dialect::rmt;
      m.d_mem = 0;
      break;
    default:  // Qwen3-like, modern, no denominator
      m.dialect = armt::Dialect::modern;
      m.normalise_keys = true;
      m.use_denom = false;
      d.qk_norm = true;
  }
  return config;
}

}  // namespace fuzz
