// Model settings: whatever validate() lets through has sizes that can be computed, survives being written into a state
// and read back, and makes an engine that runs if it is small.
#include <algorithm>
#include <cmath>

#include "common.h"
#include "engine/facts.h"
#include "engine/host_state.h"

namespace {

using armt::ModelConfig;
using fuzz::Bytes;
using fuzz::require;

int64_t integer(Bytes& in) {
  static constexpr int64_t kOdd[] = {0,         -1,        1LL << 20,   (1LL << 31) - 1, 1LL << 31,
                                     1LL << 32, 1LL << 48, (1LL << 62), INT64_MAX,       INT64_MIN};
  const uint8_t first = in.byte();
  if (first < 230) return first % 65;
  if (first < 250) return kOdd[first % 10];
  return in.number<int64_t>();
}

double real(Bytes& in) {
  static const double kOdd[] = {0.0, -1.0, 1e-5, 1e300, 1e-300, 1e4, INFINITY, -INFINITY, NAN, 1.0};
  const uint8_t first = in.byte();
  if (first < 128) return first;
  return first < 240 ? kOdd[first % 10] : in.number<double>();
}

ModelConfig config_from(Bytes& in) {
  ModelConfig config = fuzz::model(in.below(fuzz::kModels));
  armt::DecoderConfig& d = config.decoder;
  armt::MemoryConfig& m = config.memory;
  int64_t* const integers[] = {
      &d.vocab_size,        &d.d_model,     &d.n_layers,      &d.n_heads, &d.n_kv_heads, &d.head_dim, &d.d_ff,
      &d.learned_positions, &d.rotary_dims, &m.memory_tokens, &m.d_mem,   &m.n_heads,    &m.rolls,    &m.segment_size};
  double* const reals[] = {&d.norm_eps,      &d.attention_scale, &d.rope_theta,          &d.rope_factor,
                           &d.rope_low_freq, &d.rope_high_freq,  &d.rope_original_length};
  bool* const flags[] = {&d.gated_mlp, &d.parallel_residual, &d.qk_norm,       &d.scale_by_inverse_layer,
                         &m.use_denom, &m.correction,        &m.gating,        &m.normalise_keys,
                         &m.use_sink,  &m.sliding_window,    &m.wrap_positions};
  while (!in.empty()) {
    const uint8_t what = in.byte();
    if (what < 120) {
      *integers[what % std::size(integers)] = integer(in);
    } else if (what < 180) {
      *reals[what % std::size(reals)] = real(in);
    } else if (what < 230) {
      *flags[what % std::size(flags)] ^= true;
    } else if (what < 240) {
      m.dialect = static_cast<armt::Dialect>(in.below(4));
    } else if (what < 245) {
      d.norm = static_cast<armt::NormKind>(in.below(2));
    } else if (what < 250) {
      d.activation = static_cast<armt::ActivationKind>(in.below(4));
    } else {
      d.rope_scaling = static_cast<armt::RopeScaling>(in.below(3));
    }
  }
  return config;
}

// Sizes that a caller may ask for without fear of overflow (UBSan looks on).
void check_sizes(const ModelConfig& config) {
  require(config.front_rows() >= 0, "front rows");
  require(config.query_width() > 0 && config.kv_width() > 0 && config.qkv_width() > 0, "widths");
  require(config.segment_limit() >= config.memory.segment_size || config.decoder.learned_positions == 0, "limit");
  if (config.has_association()) require(config.features() > 0 && config.value_dim() > 0, "features");
  try {
    const armt::StateShape shape(config, "state");
    require(shape.layers > 0 && shape.row > 0, "state sizes");
  } catch (const armt::StateError&) {
  }
}

void check_facts(const ModelConfig& config) {
  const armt::StateFacts facts{.config = config, .weight_dtype = armt::DType::f32, .weights = "0123456789abcdef"};
  const armt::StateFacts again = armt::facts_from(armt::list_facts(facts), "state");
  armt::require_same_model(again, facts);
}

void run(const ModelConfig& config) {
  const auto engine = fuzz::make_engine(config);
  armt::Session session(engine);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < config.memory.segment_size + 2; ++i) {
    ids.push_back(static_cast<int32_t>(i % config.decoder.vocab_size));
  }
  std::vector<float> logits(static_cast<size_t>(config.decoder.vocab_size));
  armt::Call call{.session = &session, .tokens = ids, .logits = armt::LogitsWanted::last, .logits_out = logits.data()};
  armt::run_calls(*engine, {&call, 1});
  require(session.progress().tokens == std::ssize(ids), "all tokens are read");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, std::min<size_t>(size, 256));
  const ModelConfig config = config_from(in);
  try {
    config.validate();
  } catch (const armt::InvalidArgument& error) {
    require(std::strlen(error.what()) < 10'000, "a message is short");
    return 0;
  }
  check_sizes(config);
  check_facts(config);
  if (!fuzz::is_small(config)) return 0;
  try {
    run(config);
  } catch (const armt::Error&) {
  }
  return 0;
}
