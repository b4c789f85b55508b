// The layout of a page of keys and values (tasks.h: KeySource), one such part for each key head.
#pragma once

#include <cstdint>

#include "backend.h"
#include "cpu/tasks.h"

namespace armt::cpu {

struct PageLayout {
  int64_t heads = 0, width = 0;

  explicit PageLayout(const ModelConfig& config) : heads(config.decoder.n_kv_heads), width(config.decoder.head_dim) {}

  int64_t head_floats() const { return kKeyBlock * (width + padded(width)); }
  int64_t bytes() const { return heads * head_floats() * static_cast<int64_t>(sizeof(float)); }
  // [c, 64]
  float* keys(const KvPage& page, int64_t head) const {
    return static_cast<float*>(page.block->data) + head * head_floats();
  }
  // [64, padded(c)]
  float* values(const KvPage& page, int64_t head) const { return keys(page, head) + width * kKeyBlock; }
};

}  // namespace armt::cpu
