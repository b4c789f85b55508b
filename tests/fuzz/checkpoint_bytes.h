// Checkpoints of the smallest kind: safetensors files whose tensors are named by the engine's own slots.
#pragma once

#include <cctype>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/safetensors.h"
#include "common.h"

namespace fuzz {

using namespace armt;

struct Slot {
  bool matrix = false;
  int index = 0;
  int64_t layer = 0;
};

// "m3.1": matrix slot 3 of layer 1; "v0.0": vector slot 0.
inline std::optional<Slot> slot_from(const std::string& name) {
  if (name.size() < 4 || name.size() > 6 || (name[0] != 'm' && name[0] != 'v')) return std::nullopt;
  const size_t dot = name.find('.');
  if (dot == std::string::npos || dot + 2 != name.size()) return std::nullopt;
  Slot slot{.matrix = name[0] == 'm'};
  for (size_t i = 1; i < dot; ++i) {
    if (!std::isdigit(static_cast<unsigned char>(name[i]))) return std::nullopt;
    slot.index = slot.index * 10 + (name[i] - '0');
  }
  const int count = slot.matrix ? static_cast<int>(Matrix::count) : static_cast<int>(Vector::count);
  slot.layer = name[dot + 1] - '0';
  if (slot.index >= count) return std::nullopt;
  return slot;
}

inline std::string tensor_text(const std::string& name, std::initializer_list<int64_t> shape, int64_t& at) {
  int64_t elements = 1;
  std::string sizes;
  for (const int64_t size : shape) {
    elements *= size;
    sizes += (sizes.empty() ? "" : ",") + std::to_string(size);
  }
  const int64_t begin = at;
  at += elements * 4;
  return "\"" + name + R"(":{"dtype":"F32","shape":[)" + sizes + "],\"data_offsets\":[" + std::to_string(begin) + "," +
         std::to_string(at) + "]}";
}

// A right file for the model.
inline std::vector<uint8_t> right_file(const ModelConfig& config) {
  std::string header = "{";
  int64_t data = 0;
  const auto add = [&](const std::string& text) { header += (header.size() > 1 ? "," : "") + text; };
  for (int i = 0; i < static_cast<int>(Matrix::count); ++i) {
    const auto which = static_cast<Matrix>(i);
    if (!wanted(which, config)) continue;
    const Shape shape = expected_shape(which, config);
    for (int64_t l = 0; l < (per_layer(which) ? config.decoder.n_layers : 1); ++l) {
      add(tensor_text("m" + std::to_string(i) + "." + std::to_string(l), {shape.rows, shape.cols}, data));
    }
  }
  for (int i = 0; i < static_cast<int>(Vector::count); ++i) {
    const auto which = static_cast<Vector>(i);
    if (!wanted(which, config)) continue;
    for (int64_t l = 0; l < (per_layer(which) ? config.decoder.n_layers : 1); ++l) {
      add(tensor_text("v" + std::to_string(i) + "." + std::to_string(l), {expected_size(which, config)}, data));
    }
  }
  header += "}";
  std::vector<uint8_t> file(8);
  const uint64_t length = header.size();
  std::memcpy(file.data(), &length, 8);
  file.insert(file.end(), header.begin(), header.end());
  const std::vector<float> values = weights(7, data / 4);
  const size_t begin = file.size();
  file.resize(begin + static_cast<size_t>(data));
  std::memcpy(file.data() + begin, values.data(), static_cast<size_t>(data));
  return file;
}

inline void load_one(Engine& engine, const SafetensorsFile& file, const StoredTensor& tensor) {
  const auto slot = slot_from(tensor.name);
  if (!slot) return;
  const std::span<const std::byte> bytes = file.bytes(tensor);
  if (!slot->matrix) {
    if (tensor.type != StoredType::f32 || tensor.shape.size() != 1) return;
    std::vector<float> values(bytes.size() / 4);
    if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * 4);
    return engine.load(static_cast<Vector>(slot->index), slot->layer, values);
  }
  if (tensor.shape.size() != 2) return;
  HostMatrix matrix;
  if (tensor.type == StoredType::f32) {
    matrix.dtype = DType::f32;
  } else if (tensor.type == StoredType::bf16) {
    matrix.dtype = DType::bf16;
  } else if (tensor.type == StoredType::f16) {
    matrix.dtype = DType::f16;
  } else {
    return;
  }
  // The format allows any header length; the Python face copies what is not aligned.
  std::vector<std::byte> aligned(bytes.begin(), bytes.end());
  matrix.data = aligned.data();
  matrix.rows = tensor.shape[0];
  matrix.cols = tensor.shape[1];
  matrix.row_stride = matrix.cols;
  engine.load(static_cast<Matrix>(slot->index), slot->layer, matrix);
}

}  // namespace fuzz
