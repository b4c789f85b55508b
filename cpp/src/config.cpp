#include "armt/config.h"

#include "armt/error.h"

namespace armt {
namespace {

// Collects every fault, so that a user mends a configuration in one go.
class Faults {
 public:
  void require(bool holds, const std::string& message) {
    if (!holds) text_ += "\n  - " + message;
  }
  void positive(const char* name, int64_t value) {
    constexpr int64_t kLimit = int64_t{1} << 31;
    require(value > 0 && value < kLimit,
            std::string(name) + ": found " + std::to_string(value) + ", expected 1 .. 2^31 - 1");
  }
  void raise_if_any() const {
    if (!text_.empty()) throw InvalidArgument("model configuration:" + text_);
  }

 private:
  std::string text_;
};

void check_decoder(const DecoderConfig& d, Faults& faults) {
  faults.positive("vocab_size", d.vocab_size);
  faults.positive("d_model", d.d_model);
  faults.positive("n_layers", d.n_layers);
  faults.positive("n_heads", d.n_heads);
  faults.positive("n_kv_heads", d.n_kv_heads);
  faults.positive("head_dim", d.head_dim);
  faults.positive("d_ff", d.d_ff);
  constexpr int64_t kWidest = (int64_t{1} << 31) - 1;
  const auto small = [](int64_t value) { return value > 0 && value <= kWidest; };
  if (small(d.n_heads) && small(d.n_kv_heads) && small(d.head_dim)) {
    faults.require(d.n_heads + 2 * d.n_kv_heads <= kWidest / d.head_dim,
                   "n_heads, n_kv_heads, head_dim: queries, keys and values of a row are more than 2^31 - 1 numbers");
  }
  faults.require(d.n_layers <= 4096, "n_layers: found " + std::to_string(d.n_layers) + ", expected at most 4096");
  faults.require(d.n_kv_heads <= 0 || d.n_heads % d.n_kv_heads == 0, "n_heads: found " + std::to_string(d.n_heads) +
                                                                         ", expected a multiple of n_kv_heads " +
                                                                         std::to_string(d.n_kv_heads));
  faults.require(d.rotary_dims >= 0 && d.rotary_dims <= d.head_dim && d.rotary_dims % 2 == 0,
                 "rotary_dims: found " + std::to_string(d.rotary_dims) + ", expected an even number up to head_dim " +
                     std::to_string(d.head_dim));
  faults.require(d.learned_positions >= 0, "learned_positions: found a negative number");
  faults.require(d.norm_eps >= 0.0 && d.norm_eps < 1.0, "norm_eps: expected a number in [0, 1)");
  faults.require(d.rope_theta > 0.0, "rope_theta: expected a positive number");
  faults.require(d.rope_factor > 0.0, "rope_factor: expected a positive number");
  faults.require(d.attention_scale >= 0.0 && d.attention_scale < 1e6, "attention_scale: expected a number in [0, 1e6)");
}

void check_memory(const DecoderConfig& d, const MemoryConfig& m, const ModelConfig& c, Faults& faults) {
  faults.require(m.memory_tokens >= 1, "num_mem_tokens: found " + std::to_string(m.memory_tokens) +
                                           ", expected at least 1 (with none there is nothing to write)");
  faults.positive("segment_size", m.segment_size);
  faults.require(m.memory_tokens < (int64_t{1} << 20), "num_mem_tokens: expected less than 2^20");
  if (m.dialect != Dialect::rmt) {
    faults.positive("d_mem", m.d_mem);
    faults.require(m.rolls >= 1 && m.rolls <= 64, "nu: found " + std::to_string(m.rolls) + ", expected 1 .. 64");
    faults.require(m.n_heads >= 1, "memory heads: expected at least 1");
    if (m.n_heads >= 1) {
      faults.require(m.d_mem % m.n_heads == 0, "d_mem " + std::to_string(m.d_mem) + " is not divisible by " +
                                                   std::to_string(m.n_heads) + " memory heads");
      faults.require(d.d_model % m.n_heads == 0, "d_model " + std::to_string(d.d_model) + " is not divisible by " +
                                                     std::to_string(m.n_heads) + " memory heads");
    }
  }
  if (m.dialect == Dialect::paper) {
    faults.require(m.n_heads == 1 && !m.gating && m.use_denom && !m.use_sink,
                   "the paper dialect has one memory head, a denominator, no gating and no sink");
  }
  if (m.dialect == Dialect::rmt) faults.require(!m.use_sink, "RMT has no sink");
  faults.require(!m.wrap_positions || !m.use_sink, "wrap_pos together with a sink is not supported: turn one off");
  faults.require(!m.wrap_positions || d.learned_positions > 0,
                 "wrap_pos needs a learned position table (GPT-2): turn it off for rotary models");
  faults.require(!m.wrap_positions || m.dialect != Dialect::inner, "the inner loop has no wrap_pos: turn it off");
  const bool countable = m.memory_tokens >= 1 && m.memory_tokens < (int64_t{1} << 20);
  if (countable && d.learned_positions > 0 && m.segment_size > 0) {
    const int64_t limit = c.segment_limit();
    faults.require(limit >= m.segment_size, "segment_size: found " + std::to_string(m.segment_size) +
                                                ", but the position table of " + std::to_string(d.learned_positions) +
                                                " rows holds segments of " + std::to_string(limit) + " tokens at most");
  }
}

}  // namespace

int64_t ModelConfig::segment_limit(int64_t previous) const {
  constexpr int64_t kUnlimited = int64_t{1} << 30;
  if (decoder.learned_positions == 0) return kUnlimited;
  const int64_t shift = memory.wrap_positions ? 0 : previous;
  return decoder.learned_positions - front_rows() - memory.memory_tokens - shift;
}

void ModelConfig::validate() const {
  Faults faults;
  check_decoder(decoder, faults);
  check_memory(decoder, memory, *this, faults);
  faults.raise_if_any();
}

}  // namespace armt
