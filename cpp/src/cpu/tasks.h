// What the kernels of attention and of the associative memory are asked to do. Functions here are
// static: the linker must not merge copies compiled for different instruction sets.
#pragma once

#include <cstdint>

namespace armt::cpu {

inline constexpr int64_t kKeyBlock = 64;    // keys in a page, and in a step of the running softmax
inline constexpr int64_t kLaneFloats = 16;  // floats of the widest vector

static constexpr int64_t padded(int64_t floats) {
  return (floats + kLaneFloats - 1) / kLaneFloats * kLaneFloats;
}

// What one query row sees of the previous (0) and the current (1) cache: keys begin .. end-1.
struct Sight {
  int32_t begin[2];
  int32_t end[2];
  bool padding[2];  // padded keys too
  bool uniform;     // equal weights
};

// The keys and values of one key head in one cache. Page p holds keys 64 p .. 64 p + 63 as K [c,
// 64], lanes over keys, then V [64, padded(c)]. Keys that were never stored hold anything.
struct KeySource {
  const float* const* pages;
  const uint8_t* visible;  // 0 = padded; null: none is
};

// Some query rows of one cell against one key head: context = softmax(scale q k^T) v. A line is a
// query head of a row.
struct AttentionTask {
  const float* queries;  // [rows, heads, c], row stride ld_queries
  int64_t ld_queries;
  float* context;  // [rows, heads, c], row stride ld_context
  int64_t ld_context;
  int64_t rows;
  int64_t heads;  // query heads that share the key head
  int64_t width;  // c
  float scale;
  const Sight* sights;  // [rows]
  KeySource sources[2];
  float* scratch;  // attention_scratch floats, 64-byte aligned
};

// q, scores, weighted values, sums and greatest scores of every line; one block's mask.
static constexpr int64_t attention_scratch(int64_t lines, int64_t width) {
  return padded(lines * width) + lines * (kKeyBlock + padded(width) + kLaneFloats) + padded(lines) + kKeyBlock;
}

// A feature of phi(x) that is not zero.
struct Feature {
  float value;
  int32_t index;
};

static constexpr int64_t features_scratch(int64_t n, int64_t rolls) {
  return 4 * n + rolls;
}

}  // namespace armt::cpu
