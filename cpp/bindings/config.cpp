#include "config.h"

#include <array>
#include <functional>
#include <map>
#include <string_view>
#include <utility>

#include "armt/error.h"

namespace armt::bindings {

namespace py = pybind11;

namespace {

template <class E, size_t N>
using Names = std::array<std::pair<std::string_view, E>, N>;

constexpr Names<DType, 3> kDTypes = {{{"float32", DType::f32}, {"bfloat16", DType::bf16}, {"float16", DType::f16}}};
constexpr Names<Dialect, 4> kDialects = {
    {{"paper", Dialect::paper}, {"modern", Dialect::modern}, {"inner", Dialect::inner}, {"rmt", Dialect::rmt}}};
constexpr Names<NormKind, 2> kNorms = {{{"layer", NormKind::layer}, {"rms", NormKind::rms}}};
constexpr Names<ActivationKind, 4> kActivations = {{{"gelu_tanh", ActivationKind::gelu_tanh},
                                                    {"gelu_erf", ActivationKind::gelu_erf},
                                                    {"silu", ActivationKind::silu},
                                                    {"relu", ActivationKind::relu}}};
constexpr Names<RopeScaling, 3> kScalings = {
    {{"none", RopeScaling::none}, {"linear", RopeScaling::linear}, {"llama3", RopeScaling::llama3}}};
constexpr Names<Matrix, 13> kMatrices = {{{"qkv", Matrix::qkv},
                                          {"attn_out", Matrix::attn_out},
                                          {"mlp_up", Matrix::mlp_up},
                                          {"mlp_down", Matrix::mlp_down},
                                          {"mem_query", Matrix::mem_query},
                                          {"mem_key", Matrix::mem_key},
                                          {"mem_value", Matrix::mem_value},
                                          {"mem_gate", Matrix::mem_gate},
                                          {"head", Matrix::head},
                                          {"embedding", Matrix::embedding},
                                          {"positions", Matrix::positions},
                                          {"memory", Matrix::memory},
                                          {"sink", Matrix::sink}}};
constexpr Names<Vector, 13> kVectors = {{{"qkv_bias", Vector::qkv_bias},
                                         {"attn_out_bias", Vector::attn_out_bias},
                                         {"mlp_up_bias", Vector::mlp_up_bias},
                                         {"mlp_down_bias", Vector::mlp_down_bias},
                                         {"mem_gate_bias", Vector::mem_gate_bias},
                                         {"norm1", Vector::norm1},
                                         {"norm1_bias", Vector::norm1_bias},
                                         {"norm2", Vector::norm2},
                                         {"norm2_bias", Vector::norm2_bias},
                                         {"q_norm", Vector::q_norm},
                                         {"k_norm", Vector::k_norm},
                                         {"final_norm", Vector::final_norm},
                                         {"final_norm_bias", Vector::final_norm_bias}}};

template <class E, size_t N>
E by_name(const Names<E, N>& names, const char* what, const std::string& name) {
  std::string known;
  for (const auto& [key, value] : names) {
    if (key == name) return value;
    known += (known.empty() ? "" : ", ") + std::string(key);
  }
  throw InvalidArgument(std::string(what) + ": found '" + name + "', expected one of " + known);
}

// Sets fields by name; what stays in the dictionary afterwards is unknown.
class Fields {
 public:
  Fields(const char* what, const py::dict& values) : what_(what) {
    for (const auto& [key, value] : values) values_[py::str(key)] = py::reinterpret_borrow<py::object>(value);
  }

  template <class T>
  void set(const char* name, T& field) {
    take(name, [&](const py::object& value) { field = value.cast<T>(); });
  }

  template <class E, size_t N>
  void choose(const char* name, const Names<E, N>& names, E& field) {
    take(name, [&](const py::object& value) { field = by_name(names, name, value.cast<std::string>()); });
  }

  void finish() const {
    if (values_.empty()) return;
    std::string unknown;
    for (const auto& [name, value] : values_) unknown += (unknown.empty() ? "" : ", ") + name;
    throw InvalidArgument(std::string(what_) + " configuration: unknown fields: " + unknown);
  }

 private:
  void take(const char* name, const std::function<void(const py::object&)>& assign) {
    const auto found = values_.find(name);
    if (found == values_.end()) return;
    try {
      assign(found->second);
    } catch (const py::cast_error&) {
      throw InvalidArgument(std::string(what_) + " configuration: " + name + ": found " +
                            py::repr(found->second).cast<std::string>() + ", which has the wrong type");
    }
    values_.erase(found);
  }

  const char* what_;
  std::map<std::string, py::object> values_;
};

DecoderConfig decoder_from(const py::dict& values) {
  DecoderConfig d;
  Fields fields("decoder", values);
  fields.set("vocab_size", d.vocab_size);
  fields.set("d_model", d.d_model);
  fields.set("n_layers", d.n_layers);
  fields.set("n_heads", d.n_heads);
  fields.set("n_kv_heads", d.n_kv_heads);
  fields.set("head_dim", d.head_dim);
  fields.set("d_ff", d.d_ff);
  fields.choose("norm", kNorms, d.norm);
  fields.set("norm_eps", d.norm_eps);
  fields.choose("activation", kActivations, d.activation);
  fields.set("gated_mlp", d.gated_mlp);
  fields.set("parallel_residual", d.parallel_residual);
  fields.set("qk_norm", d.qk_norm);
  fields.set("attention_scale", d.attention_scale);
  fields.set("scale_by_inverse_layer", d.scale_by_inverse_layer);
  fields.set("learned_positions", d.learned_positions);
  fields.set("rotary_dims", d.rotary_dims);
  fields.set("rope_theta", d.rope_theta);
  fields.choose("rope_scaling", kScalings, d.rope_scaling);
  fields.set("rope_factor", d.rope_factor);
  fields.set("rope_low_freq", d.rope_low_freq);
  fields.set("rope_high_freq", d.rope_high_freq);
  fields.set("rope_original_length", d.rope_original_length);
  fields.finish();
  return d;
}

MemoryConfig memory_from(const py::dict& values) {
  MemoryConfig m;
  Fields fields("memory", values);
  fields.choose("dialect", kDialects, m.dialect);
  fields.set("memory_tokens", m.memory_tokens);
  fields.set("d_mem", m.d_mem);
  fields.set("n_heads", m.n_heads);
  fields.set("rolls", m.rolls);
  fields.set("normalise_keys", m.normalise_keys);
  fields.set("use_denom", m.use_denom);
  fields.set("correction", m.correction);
  fields.set("gating", m.gating);
  fields.set("use_sink", m.use_sink);
  fields.set("sliding_window", m.sliding_window);
  fields.set("wrap_positions", m.wrap_positions);
  fields.set("segment_size", m.segment_size);
  fields.finish();
  return m;
}

}  // namespace

ModelConfig config_from(const py::dict& decoder, const py::dict& memory) {
  return {.decoder = decoder_from(decoder), .memory = memory_from(memory)};
}

DType dtype_from(const std::string& name) {
  return by_name(kDTypes, "dtype", name);
}

std::string dtype_name(DType dtype) {
  for (const auto& [name, value] : kDTypes) {
    if (value == dtype) return std::string(name);
  }
  return "unknown";
}

Matrix matrix_from(const std::string& name) {
  return by_name(kMatrices, "matrix", name);
}
Vector vector_from(const std::string& name) {
  return by_name(kVectors, "vector", name);
}

}  // namespace armt::bindings
