// Attention of some query rows to one key head: block after block of 64 keys with a running
// maximum, sum and weighted value for each line, so that scores live in one small tile. arXiv
// 2205.14135
//
// Blocks lie at fixed multiples of 64 keys from the start of a cache, and a key that a line does
// not see takes no part in it: what a line computes does not depend on the other lines or on keys
// stored later.
#pragma once

#include "cpu/simd.h"
#include "cpu/tasks.h"

namespace armt::cpu::ARMT_ISA_NAME {

inline constexpr int kLineTile = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr bool kManyRegisters = true;  // 32
#else
inline constexpr bool kManyRegisters = false;  // 16
#endif
inline constexpr float kUnseen = -__builtin_inff();

inline constexpr float kLog2E = 1.44269504f;  // scores are in units of ln 2: e^s = 2^(s log2 e)

// 2^x for x <= 0, within 1.6e-7; 2^-126 below that; NaN stays NaN.
// x = n + r, |r| <= 1/2;  2^x = 2^n p(r), p(0) = 1.
static inline vf power_of_two(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held by the low bits
  const vf bounded = max(splat(-126.0f), x);
  const vf shifted = bounded + magic;
  const vf r = bounded - (shifted - magic);
  vf p = splat(1.32647273e-3f);
  p = fma(p, r, splat(9.67151299e-3f));
  p = fma(p, r, splat(5.55073358e-2f));
  p = fma(p, r, splat(0.240222424f));
  p = fma(p, r, splat(0.693147004f));
  p = fma(p, r, splat(1.0f));
  return p * reinterpret_cast<vf>((reinterpret_cast<vi>(shifted) << 23) + 0x3f800000);
}

struct Lines {
  int64_t count;   // L = rows * heads
  int64_t width;   // c
  int64_t padded;  // of a weighted value
  float* queries;  // [L, c], scaled
  float* scores;   // [L, 64]; then weights 2^(score - best)
  float* values;   // [L, padded]: sum of weight * value
  float* totals;   // [L, 16]: sum of weights, lane by lane
  float* best;     // [L]: greatest score so far
  int32_t* open;   // [64]: -1 where a key of the block is not padded, else 0
};

// One block of one cache.
struct KeyBlock {
  const float* keys;    // [c, 64]
  const float* values;  // [64, padded]
  int64_t first;        // of the cache's keys
  int64_t count;        // keys that any line may see
  int side;
  bool has_padding;
};

// Keys of a block, counted from its first, that a row may see.
struct Range {
  int64_t begin, end;
};

// Vectors of columns that a tile of R lines holds.
template <int R>
static constexpr int columns_of_tile() {
  if (R == 1) return 8;
  if (kManyRegisters) return 4;
  return R == 2 ? 4 : 2;
}

// C [R, V W] (+)= A [R, k] B [k, V W], one chain of fused multiply-adds over k for each element, so
// that it does not depend on the tile that computes it.
template <int R, int V>
static inline void line_tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                             bool accumulate) {
  vf sums[R][V];
  ARMT_UNROLL for (int r = 0; r < R; ++r) {
    ARMT_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = accumulate ? load(c + r * ldc + v * kWidth) : vf{};
  }
  for (int64_t i = 0; i < k; ++i) {
    vf column[V];
    ARMT_UNROLL for (int v = 0; v < V; ++v) column[v] = load(b + v * kWidth);
    ARMT_UNROLL for (int r = 0; r < R; ++r) {
      const vf x = splat(a[r * lda + i]);
      ARMT_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = fma(x, column[v], sums[r][v]);
    }
    b += ldb;
  }
  ARMT_UNROLL for (int r = 0; r < R; ++r) {
    ARMT_UNROLL for (int v = 0; v < V; ++v) store(c + r * ldc + v * kWidth, sums[r][v]);
  }
}

// The same for n columns, a multiple of W.
template <int R, int V = columns_of_tile<R>()>
static inline void multiply_tile(int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                                 float* c, int64_t ldc, bool accumulate) {
  int64_t column = 0;
  for (; column + V * kWidth <= n; column += V * kWidth) {
    line_tile<R, V>(k, a, lda, b + column, ldb, c + column, ldc, accumulate);
  }
  if constexpr (V > 1) {
    if (column < n) multiply_tile<R, V / 2>(n - column, k, a, lda, b + column, ldb, c + column, ldc, accumulate);
  }
}

static inline void multiply_lines(int64_t lines, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                                  int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  switch (lines) {
    case 1:
      return multiply_tile<1>(n, k, a, lda, b, ldb, c, ldc, accumulate);
    case 2:
      return multiply_tile<2>(n, k, a, lda, b, ldb, c, ldc, accumulate);
    case 3:
      return multiply_tile<3>(n, k, a, lda, b, ldb, c, ldc, accumulate);
    case 4:
      return multiply_tile<4>(n, k, a, lda, b, ldb, c, ldc, accumulate);
    case 5:
      return multiply_tile<5>(n, k, a, lda, b, ldb, c, ldc, accumulate);
    default:
      return multiply_tile<6>(n, k, a, lda, b, ldb, c, ldc, accumulate);
  }
}

static inline int64_t lines_in_tile(const Lines& lines, int64_t first) {
  return min_of(kLineTile, lines.count - first);
}

static inline Range seen_range(const Sight& sight, const KeyBlock& block) {
  const int64_t begin = sight.begin[block.side] - block.first, end = sight.end[block.side] - block.first;
  const Range range{begin > 0 ? begin : 0, min_of(end, block.count)};
  return range.begin < range.end ? range : Range{0, 0};
}

static inline void scale_values(float* x, int64_t n, vf factor) {
  for (int64_t i = 0; i < n; i += kWidth) store(x + i, load(x + i) * factor);
}

// Turns one line's scores into weights; score(v) is the v-th vector of them, kUnseen where a key
// takes no part, and keep(v, w) replaces the weights of such keys by 0.
template <class Score, class Keep>
static inline void soften(const Lines& lines, int64_t line, int64_t vectors, Score score, Keep keep) {
  float* weights = lines.scores + line * kKeyBlock;
  float* total = lines.totals + line * kLaneFloats;
  vf high = score(0);
  for (int64_t v = 1; v < vectors; ++v) high = max(high, score(v));
  const float before = lines.best[line], highest = max_lane(high);
  const float best = before > highest ? before : highest;
  if (best == kUnseen) {
    for (int64_t v = 0; v < vectors; ++v) store(weights + v * kWidth, vf{});
    return;
  }
  if (best != before) {
    lines.best[line] = best;
    if (before != kUnseen) {
      const vf factor = power_of_two(splat(before - best));
      store(total, load(total) * factor);
      scale_values(lines.values + line * lines.padded, lines.padded, factor);
    }
  }
  vf sums = load(total);
  for (int64_t v = 0; v < vectors; ++v) {
    const vf weight = keep(v, power_of_two(score(v) - best));
    store(weights + v * kWidth, weight);
    sums += weight;
  }
  store(total, sums);
}

static inline void soften_masked(const Lines& lines, int64_t line, const KeyBlock& block, const Sight& sight) {
  const float* scores = lines.scores + line * kKeyBlock;
  const Range range = seen_range(sight, block);
  const bool closed = block.has_padding && !sight.padding[block.side];
  const auto begin = static_cast<int32_t>(range.begin), end = static_cast<int32_t>(range.end);
  const auto seen = [&](int64_t v) {
    const vi index = lane_index() + static_cast<int32_t>(v * kWidth);
    const vi inside = (index >= begin) & (index < end);
    if (!closed) return inside;
    return inside & reinterpret_cast<vi>(load(reinterpret_cast<const float*>(lines.open) + v * kWidth));
  };
  const auto score = [&](int64_t v) {
    return select(seen(v), sight.uniform ? vf{} : load(scores + v * kWidth), splat(kUnseen));
  };
  const auto keep = [&](int64_t v, vf weight) { return select(seen(v), weight, vf{}); };
  soften(lines, line, (block.count + kWidth - 1) / kWidth, score, keep);
}

// values[line ..] += weights V over the keys of a range, `count` lines at once.
static inline void weigh(const Lines& lines, int64_t line, int64_t count, const KeyBlock& block, Range range) {
  if (range.begin >= range.end) return;
  multiply_lines(count, lines.padded, range.end - range.begin, lines.scores + line * kKeyBlock + range.begin, kKeyBlock,
                 block.values + range.begin * lines.padded, lines.padded, lines.values + line * lines.padded,
                 lines.padded, true);
}

// The same for one line, padded keys left out.
static inline void weigh_open(const Lines& lines, int64_t line, const KeyBlock& block, Range range) {
  for (int64_t key = range.begin; key < range.end; ++key) {
    if (lines.open[key] == 0) continue;
    const int64_t begin = key;
    while (key + 1 < range.end && lines.open[key + 1] != 0) ++key;
    weigh(lines, line, 1, block, {begin, key + 1});
  }
}

// A tile of lines that see different keys: the keys that all see together, those before and after
// line by line.
static inline void weigh_masked(const AttentionTask& task, const Lines& lines, int64_t first, const KeyBlock& block) {
  const int64_t count = lines_in_tile(lines, first);
  Range ranges[kLineTile];
  Range common{0, kKeyBlock};
  bool closed = false;
  for (int64_t i = 0; i < count; ++i) {
    const Sight& sight = task.sights[(first + i) / task.heads];
    ranges[i] = seen_range(sight, block);
    closed |= block.has_padding && !sight.padding[block.side];
    if (ranges[i].begin > common.begin) common.begin = ranges[i].begin;
    if (ranges[i].end < common.end) common.end = ranges[i].end;
  }
  if (closed || common.begin >= common.end) {
    for (int64_t i = 0; i < count; ++i) {
      const Sight& sight = task.sights[(first + i) / task.heads];
      if (block.has_padding && !sight.padding[block.side]) {
        weigh_open(lines, first + i, block, ranges[i]);
      } else {
        weigh(lines, first + i, 1, block, ranges[i]);
      }
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) weigh(lines, first + i, 1, block, {ranges[i].begin, common.begin});
  weigh(lines, first, count, block, common);
  for (int64_t i = 0; i < count; ++i) weigh(lines, first + i, 1, block, {common.end, ranges[i].end});
}

static inline bool all_see_all(const AttentionTask& task, const KeyBlock& block) {
  if (block.count < kKeyBlock || block.has_padding) return false;
  for (int64_t r = 0; r < task.rows; ++r) {
    const Sight& sight = task.sights[r];
    if (sight.uniform || sight.begin[block.side] > block.first) return false;
    if (sight.end[block.side] < block.first + kKeyBlock) return false;
  }
  return true;
}

static inline void attend_block(const AttentionTask& task, const Lines& lines, const KeyBlock& block) {
  const bool whole = all_see_all(task, block);
  const int64_t columns = (block.count + kWidth - 1) / kWidth * kWidth;
  for (int64_t first = 0; first < lines.count; first += kLineTile) {
    multiply_lines(lines_in_tile(lines, first), columns, lines.width, lines.queries + first * lines.width, lines.width,
                   block.keys, kKeyBlock, lines.scores + first * kKeyBlock, kKeyBlock, false);
  }
  for (int64_t line = 0; line < lines.count; ++line) {
    if (whole) {
      const float* scores = lines.scores + line * kKeyBlock;
      soften(
          lines, line, kKeyBlock / kWidth, [scores](int64_t v) { return load(scores + v * kWidth); },
          [](int64_t, vf weight) { return weight; });
    } else {
      soften_masked(lines, line, block, task.sights[line / task.heads]);
    }
  }
  for (int64_t first = 0; first < lines.count; first += kLineTile) {
    if (whole) {
      weigh(lines, first, lines_in_tile(lines, first), block, {0, kKeyBlock});
    } else {
      weigh_masked(task, lines, first, block);
    }
  }
}

// True if a key of the block is padded; then open[] says which are not.
static inline bool find_padding(const uint8_t* visible, int64_t count, int32_t* open) {
  bool any = false;
  for (int64_t i = 0; i < kKeyBlock; ++i) {
    open[i] = i < count && visible[i] != 0 ? -1 : 0;
    any |= i < count && visible[i] == 0;
  }
  return any;
}

static inline void attend_source(const AttentionTask& task, const Lines& lines, int side) {
  int64_t begin = INT32_MAX, end = 0;
  for (int64_t r = 0; r < task.rows; ++r) {
    const Sight& sight = task.sights[r];
    if (sight.begin[side] >= sight.end[side]) continue;
    if (sight.begin[side] < begin) begin = sight.begin[side];
    if (sight.end[side] > end) end = sight.end[side];
  }
  const KeySource& source = task.sources[side];
  for (int64_t first = begin / kKeyBlock * kKeyBlock; first < end; first += kKeyBlock) {
    const float* page = source.pages[first / kKeyBlock];
    KeyBlock block{page, page + lines.width * kKeyBlock, first, min_of(kKeyBlock, end - first), side, false};
    if (source.visible != nullptr) {
      block.has_padding = find_padding(source.visible + first, block.count, lines.open);
    }
    attend_block(task, lines, block);
  }
}

static inline Lines lay_out(const AttentionTask& task) {
  Lines lines;
  lines.count = task.rows * task.heads;
  lines.width = task.width;
  lines.padded = padded(task.width);
  lines.queries = task.scratch;
  lines.scores = lines.queries + padded(lines.count * lines.width);
  lines.values = lines.scores + lines.count * kKeyBlock;
  lines.totals = lines.values + lines.count * lines.padded;
  lines.best = lines.totals + lines.count * kLaneFloats;
  lines.open = reinterpret_cast<int32_t*>(lines.best + padded(lines.count));
  return lines;
}

static void attend(const AttentionTask& task) {
  const Lines lines = lay_out(task);
  const int64_t row_floats = task.heads * task.width;
  const float scale = task.scale * kLog2E;
  for (int64_t r = 0; r < task.rows; ++r) {
    const float* from = task.queries + r * task.ld_queries;
    float* to = lines.queries + r * row_floats;
    for (int64_t i = 0; i < row_floats; ++i) to[i] = from[i] * scale;
  }
  for (int64_t i = 0; i < lines.count * lines.padded; i += kWidth) store(lines.values + i, vf{});
  for (int64_t i = 0; i < lines.count * kLaneFloats; i += kWidth) store(lines.totals + i, vf{});
  for (int64_t i = 0; i < lines.count; ++i) lines.best[i] = kUnseen;

  attend_source(task, lines, 0);
  attend_source(task, lines, 1);

  for (int64_t line = 0; line < lines.count; ++line) {
    const float total = sum(load(lines.totals + line * kLaneFloats));
    const float* values = lines.values + line * lines.padded;
    float* to = task.context + line / task.heads * task.ld_context + line % task.heads * task.width;
    if (total == 0.0f) {
      for (int64_t i = 0; i < task.width; ++i) to[i] = 0.0f;
    } else {
      for (int64_t i = 0; i < task.width; ++i) to[i] = values[i] / total;
    }
  }
}

}  // namespace armt::cpu::ARMT_ISA_NAME
