#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>

#include "armt/error.h"
#include "slots.h"

namespace armt::cpu {
namespace {

DType checked(DType weight_dtype) {
  if (weight_dtype != DType::f16) return weight_dtype;
  throw InvalidArgument("weight_dtype: found float16, expected float32 or bfloat16 on the CPU; choose one of them");
}

std::vector<Matrix> required_matrices(const ModelConfig& config) {
  std::vector<Matrix> found{Matrix::qkv, Matrix::attn_out, Matrix::mlp_up, Matrix::mlp_down};
  if (!config.has_association()) return found;
  for (Matrix which : {Matrix::mem_query, Matrix::mem_key, Matrix::mem_value, Matrix::mem_gate}) found.push_back(which);
  return found;
}

std::vector<Vector> required_vectors(const ModelConfig& config) {
  std::vector<Vector> found{Vector::norm1, Vector::norm2};
  if (config.decoder.qk_norm) found.insert(found.end(), {Vector::q_norm, Vector::k_norm});
  return found;
}

}  // namespace

CpuBackend::CpuBackend(const ModelConfig& config, const BackendOptions& options)
    : config_(config),
      weight_dtype_(checked(options.weight_dtype)),
      kernels_(kernels_for(options.isa)),
      pool_(options.threads),
      layers_(static_cast<size_t>(config.decoder.n_layers)) {}

std::string CpuBackend::description() const {
  const int64_t threads = pool_.threads();
  return std::string("CPU, ") + kernels_.name + ", " + std::to_string(threads) +
         (threads == 1 ? " thread" : " threads");
}

const PackedMatrix& CpuBackend::matrix(Matrix which, int64_t layer) const {
  if (which == Matrix::head && layers_[0].matrices[static_cast<size_t>(Matrix::head)].empty())
    which = Matrix::embedding;
  return layers_[layer].matrices[static_cast<size_t>(which)];
}

const float* CpuBackend::vector(Vector which, int64_t layer) const {
  return layers_[layer].vectors[static_cast<size_t>(which)].floats();
}

void CpuBackend::load(Matrix which, int64_t layer, const HostMatrix& matrix) {
  check_slot(which, layer, matrix, config_);
  switch (which) {
    case Matrix::positions:
      positions_ = plain_rows(matrix);
      return;
    case Matrix::memory:
      memory_ = plain_rows(matrix);
      return;
    case Matrix::sink:
      sink_ = plain_rows(matrix);
      return;
    default:
      break;
  }
  const bool gated = which == Matrix::mlp_up && config_.decoder.gated_mlp;
  layers_[layer].matrices[static_cast<size_t>(which)] =
      pack(matrix, kernels_.panel, weight_dtype_ == DType::bf16, gated, pool_);
}

void CpuBackend::load(Vector which, int64_t layer, std::span<const float> values) {
  check_slot(which, layer, values, config_);
  Buffer buffer(static_cast<int64_t>(values.size_bytes()));
  std::memcpy(buffer.data(), values.data(), values.size_bytes());
  layers_[layer].vectors[static_cast<size_t>(which)] = std::move(buffer);
}

void CpuBackend::finish_loading() {
  std::string missing;
  const auto require = [&](bool there, const std::string& name) {
    if (!there) missing += (missing.empty() ? "" : ", ") + name;
  };
  for (int64_t layer = 0; layer < config_.decoder.n_layers; ++layer) {
    for (Matrix which : required_matrices(config_)) require(!matrix(which, layer).empty(), slot_name(which, layer));
    for (Vector which : required_vectors(config_)) require(vector(which, layer) != nullptr, slot_name(which, layer));
  }
  require(!matrix(Matrix::embedding, 0).empty(), "embedding");
  require(vector(Vector::final_norm, 0) != nullptr, "final_norm");
  require(config_.decoder.learned_positions == 0 || positions_.data() != nullptr, "positions");
  require(config_.memory.memory_tokens == 0 || memory_.data() != nullptr, "memory");
  require(!config_.memory.use_sink || sink_.data() != nullptr, "sink");
  if (!missing.empty()) throw CheckpointError("weights: missing " + missing + "; the checkpoint is not complete");
}

int64_t CpuBackend::weight_bytes() const {
  int64_t bytes = positions_.bytes() + memory_.bytes() + sink_.bytes();
  for (const LayerWeights& layer : layers_) {
    for (const PackedMatrix& matrix : layer.matrices) bytes += matrix.data.bytes();
    for (const Buffer& vector : layer.vectors) bytes += vector.bytes();
  }
  return bytes;
}

}  // namespace armt::cpu

namespace armt {

std::unique_ptr<Backend> make_cpu_backend(const ModelConfig& config, const BackendOptions& options) {
  return std::make_unique<cpu::CpuBackend>(config, options);
}

}  // namespace armt
