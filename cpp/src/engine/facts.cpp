#include "engine/facts.h"

#include <array>
#include <charconv>
#include <map>
#include <string_view>
#include <type_traits>

#include "armt/error.h"

namespace armt {
namespace {

template <class E>
constexpr std::array<std::string_view, 0> kNames = {};
template <>
constexpr std::array<std::string_view, 3> kNames<DType> = {"float32", "bfloat16", "float16"};
template <>
constexpr std::array<std::string_view, 4> kNames<Dialect> = {"paper", "modern", "inner", "rmt"};
template <>
constexpr std::array<std::string_view, 2> kNames<NormKind> = {"layer", "rms"};
template <>
constexpr std::array<std::string_view, 4> kNames<ActivationKind> = {"gelu_tanh", "gelu_erf", "silu", "relu"};
template <>
constexpr std::array<std::string_view, 3> kNames<RopeScaling> = {"none", "linear", "llama3"};

// The one list of facts. `Facts` is StateFacts, const or not.
template <class Facts, class Visit>
void each_fact(Facts& facts, const Visit& visit) {
  auto& d = facts.config.decoder;
  auto& m = facts.config.memory;
  visit("memory.dialect", m.dialect);
  visit("memory.segment_size", m.segment_size);
  visit("memory.memory_tokens", m.memory_tokens);
  visit("memory.d_mem", m.d_mem);
  visit("memory.n_heads", m.n_heads);
  visit("memory.rolls", m.rolls);
  visit("memory.normalise_keys", m.normalise_keys);
  visit("memory.use_denom", m.use_denom);
  visit("memory.correction", m.correction);
  visit("memory.gating", m.gating);
  visit("memory.use_sink", m.use_sink);
  visit("memory.sliding_window", m.sliding_window);
  visit("memory.wrap_positions", m.wrap_positions);
  visit("decoder.vocab_size", d.vocab_size);
  visit("decoder.d_model", d.d_model);
  visit("decoder.n_layers", d.n_layers);
  visit("decoder.n_heads", d.n_heads);
  visit("decoder.n_kv_heads", d.n_kv_heads);
  visit("decoder.head_dim", d.head_dim);
  visit("decoder.d_ff", d.d_ff);
  visit("decoder.norm", d.norm);
  visit("decoder.norm_eps", d.norm_eps);
  visit("decoder.activation", d.activation);
  visit("decoder.gated_mlp", d.gated_mlp);
  visit("decoder.parallel_residual", d.parallel_residual);
  visit("decoder.qk_norm", d.qk_norm);
  visit("decoder.attention_scale", d.attention_scale);
  visit("decoder.scale_by_inverse_layer", d.scale_by_inverse_layer);
  visit("decoder.learned_positions", d.learned_positions);
  visit("decoder.rotary_dims", d.rotary_dims);
  visit("decoder.rope_theta", d.rope_theta);
  visit("decoder.rope_scaling", d.rope_scaling);
  visit("decoder.rope_factor", d.rope_factor);
  visit("decoder.rope_low_freq", d.rope_low_freq);
  visit("decoder.rope_high_freq", d.rope_high_freq);
  visit("decoder.rope_original_length", d.rope_original_length);
  visit("weights.dtype", facts.weight_dtype);
  visit("weights.fingerprint", facts.weights);
}

template <class T>
FactValue to_value(const T& field) {
  if constexpr (std::is_enum_v<T>) {
    return std::string(kNames<T>[static_cast<size_t>(field)]);
  } else {
    return field;
  }
}

std::string text_of(const FactValue& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return *text;
  if (const auto* flag = std::get_if<bool>(&value)) return *flag ? "true" : "false";
  if (const auto* number = std::get_if<int64_t>(&value)) return std::to_string(*number);
  std::array<char, 32> digits;  // the shortest text that reads back as the same double
  const auto end = std::to_chars(digits.begin(), digits.end(), std::get<double>(value)).ptr;
  return {digits.begin(), end};
}

template <class T>
bool assign(T& field, const FactValue& value) {
  if constexpr (std::is_enum_v<T>) {
    const auto* word = std::get_if<std::string>(&value);
    for (size_t i = 0; word && i < kNames<T>.size(); ++i) {
      if (*word != kNames<T>[i]) continue;
      field = static_cast<T>(i);
      return true;
    }
    return false;
  } else {
    const auto* typed = std::get_if<T>(&value);
    if (typed) field = *typed;
    return typed != nullptr;
  }
}

}  // namespace

std::vector<Fact> list_facts(const StateFacts& facts) {
  std::vector<Fact> all;
  each_fact(facts, [&](const char* name, const auto& field) { all.push_back({name, to_value(field)}); });
  return all;
}

StateFacts facts_from(std::span<const Fact> facts, const std::string& where) {
  std::map<std::string_view, const FactValue*> left;
  std::string faults;
  for (const Fact& fact : facts) {
    if (!left.emplace(fact.name, &fact.value).second) faults += "\n  - " + fact.name + ": twice";
  }
  StateFacts result;
  each_fact(result, [&](const char* name, auto& field) {
    const auto found = left.find(name);
    if (found == left.end()) return;
    if (!assign(field, *found->second)) {
      faults +=
          std::string("\n  - ") + name + ": found " + text_of(*found->second) + ", which this build does not know";
    }
    left.erase(found);
  });
  for (const auto& [name, value] : left) {
    faults += "\n  - " + std::string(name) + ": this build knows no such setting";
  }
  if (faults.empty()) {
    try {
      result.config.validate();
      return result;
    } catch (const InvalidArgument& error) {
      faults = std::string("\n  - ") + error.what();
    }
  }
  throw StateError(where + ": the model settings in it cannot be used; was it written by a newer " + "release?" +
                   faults);
}

void require_same_model(const StateFacts& state, const StateFacts& engine) {
  const std::vector<Fact> found = list_facts(state), expected = list_facts(engine);
  std::string differences;
  for (size_t i = 0; i < found.size(); ++i) {
    const std::string mine = text_of(found[i].value), other = text_of(expected[i].value);
    if (mine == other) continue;
    differences += "\n  - " + found[i].name + ": found " + mine + ", expected " + other;
  }
  if (differences.empty()) return;
  throw StateError("state: it was made with another model than this engine's; use the checkpoint " +
                   ("and dtype that it was made with" + ("; differences:" + differences)));
}

}  // namespace armt
