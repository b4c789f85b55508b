#include "cpu/rotary.h"

#include <algorithm>
#include <cmath>

#include "cpu/cpu_backend.h"
#include "slots.h"

namespace armt::cpu {
namespace {

constexpr int64_t kTableFloats = 1 << 20;
constexpr int64_t kGrownTokens = 1024;  // room in the table for a segment that generation lets grow

// Positions that ordinary use reaches: two segments with their front and memory rows.
int64_t usual_positions(const ModelConfig& config) {
  return 2 * (config.memory.segment_size + config.front_rows() + config.memory.memory_tokens) + kGrownTokens;
}

}  // namespace

RotaryTable::RotaryTable(const ModelConfig& config) : frequencies_(rotary_frequencies(config.decoder)) {
  const int64_t half = this->half();
  if (half == 0) return;
  const int64_t rows = std::min(usual_positions(config), kTableFloats / (2 * half));
  table_ = Buffer(rows * 2 * half * static_cast<int64_t>(sizeof(float)));
  for (int64_t row = 0; row < rows; ++row) compute(row, table_.floats() + row * 2 * half);
  rows_ = rows;
}

void RotaryTable::compute(int64_t position, float* out) const {
  for (int64_t i = 0; i < half(); ++i) {
    const double angle = static_cast<double>(position) * static_cast<double>(frequencies_[i]);
    out[i] = static_cast<float>(std::cos(angle));
    out[half() + i] = static_cast<float>(std::sin(angle));
  }
}

const float* RotaryTable::at(int64_t position, float* spare) const {
  if (position >= 0 && position < rows_) return table_.floats() + position * 2 * half();
  compute(position, spare);
  return spare;
}

void CpuBackend::turn_heads(const float* norm, int64_t position, int64_t heads, float* x) {
  const int64_t width = config_.decoder.head_dim, half = rotary_.half();
  const auto eps = static_cast<float>(config_.decoder.norm_eps);
  const float* turn = nullptr;
  if (half > 0) turn = rotary_.at(position, thread_scratch(Slot::rotary, 2 * half));
  for (int64_t head = 0; head < heads; ++head) {
    float* at = x + head * width;
    if (norm != nullptr) kernels_.rms_norm(at, at, width, norm, nullptr, eps);
    if (turn != nullptr) kernels_.rotate(at, half, turn);
  }
}

void CpuBackend::rotate_queries(Groups groups, const Rows& qkv) {
  constexpr int64_t kGrain = 32;  // rows
  for (const Group& group : groups) {
    const float* norm = vector(Vector::q_norm, group.layer);
    if (norm == nullptr && rotary_.half() == 0) continue;
    pool_.parallel_ranges(group.row_count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        turn_heads(norm, group.rows[i].position, config_.decoder.n_heads, row_of(qkv, group.row_begin + i));
      }
    });
  }
}

}  // namespace armt::cpu
