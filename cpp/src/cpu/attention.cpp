// Attention of the rows of each cell to its two caches.
#include <algorithm>
#include <cmath>

#include "cpu/cpu_backend.h"
#include "cpu/kv.h"

namespace armt::cpu {
namespace {

// Query rows, and query heads of them, that pass over the keys together: scores and sums stay in
// cache.
constexpr int64_t kRowsAtOnce = 48, kLinesAtOnce = 96;
constexpr double kParallelWork = 400e3;  // multiply-adds below which one thread does it all

int64_t blocks_of(const Cell& cell, int64_t block_rows) {
  return (cell.row_count + block_rows - 1) / block_rows;
}

// A block of query rows of one cell and one key head.
struct Part {
  const Group* group = nullptr;
  const Cell* cell = nullptr;
  int64_t head = 0;
  int64_t begin = 0, count = 0;  // rows of the cell
};

// The index-th part; the last rows of a cell, which see the most keys, come first.
Part part_at(Groups groups, int64_t index, int64_t key_heads, int64_t block_rows) {
  for (const Group& group : groups) {
    for (const Cell& cell : group.cells) {
      const int64_t blocks = blocks_of(cell, block_rows);
      if (index >= blocks * key_heads) {
        index -= blocks * key_heads;
        continue;
      }
      const int64_t block = blocks - 1 - index / key_heads;
      const int64_t begin = cell.row_count * block / blocks, end = cell.row_count * (block + 1) / blocks;
      return {&group, &cell, index % key_heads, begin, end - begin};
    }
  }
  return {};
}

void set_side(Sight& sight, int side, int64_t begin, int64_t end, bool padding) {
  sight.begin[side] = static_cast<int32_t>(std::max<int64_t>(0, begin));
  sight.end[side] = static_cast<int32_t>(end);
  sight.padding[side] = padding;
}

// front: rows of the previous cache that are no tokens; nobody sees them.
Sight sight_of(const Row& row, const LayerState& state, int64_t front) {
  Sight sight;
  sight.uniform = row.uniform;
  if (row.uniform) {
    set_side(sight, 0, front, state.previous.rows, true);
    set_side(sight, 1, 0, state.current.rows, true);
  } else {
    set_side(sight, 0, row.prev_begin, state.previous.rows, row.sees_prev_padding);
    set_side(sight, 1, row.cur_begin, std::min<int64_t>(row.cur_end, state.current.rows), row.sees_padding);
  }
  return sight;
}

// Scratch of one part, one allocation.
struct PartScratch {
  float* kernel;
  Sight* sights;
  const float** pages;
};

PartScratch lay_out(int64_t lines, int64_t width, int64_t rows, int64_t pages) {
  const auto floats_of = [](size_t bytes) { return padded(static_cast<int64_t>(bytes / sizeof(float)) + 1); };
  const int64_t kernel = padded(attention_scratch(lines, width));
  const int64_t sights = floats_of(static_cast<size_t>(rows) * sizeof(Sight));
  float* scratch =
      thread_scratch(Slot::attention, kernel + sights + floats_of(static_cast<size_t>(pages) * sizeof(float*)));
  return {scratch, reinterpret_cast<Sight*>(scratch + kernel),
          reinterpret_cast<const float**>(scratch + kernel + sights)};
}

// Scores of every row against all keys of its cell, an upper bound.
double work_of(Groups groups, const ModelConfig& config) {
  double pairs = 0.0;
  for (const Group& group : groups) {
    for (const Cell& cell : group.cells) {
      pairs += static_cast<double>(cell.row_count * (cell.state->previous.rows + cell.state->current.rows));
    }
  }
  return pairs * 2.0 * static_cast<double>(config.query_width());
}

}  // namespace

float CpuBackend::score_scale(int64_t layer) const {
  const DecoderConfig& decoder = config_.decoder;
  double scale = decoder.attention_scale;
  if (scale == 0.0) scale = 1.0 / std::sqrt(static_cast<double>(decoder.head_dim));
  if (decoder.scale_by_inverse_layer) scale /= static_cast<double>(layer + 1);
  return static_cast<float>(scale);
}

void CpuBackend::attend(Groups groups, const Rows& qkv, const Rows& context) {
  const PageLayout layout(config_);
  const int64_t shared = config_.decoder.n_heads / layout.heads;
  const int64_t block_rows = std::clamp<int64_t>(kLinesAtOnce / shared, 1, kRowsAtOnce);
  int64_t parts = 0;
  for (const Group& group : groups) {
    for (const Cell& cell : group.cells) parts += blocks_of(cell, block_rows) * layout.heads;
  }

  const auto attend_part = [&](int64_t index) {
    const Part part = part_at(groups, index, layout.heads, block_rows);
    const LayerState& state = *part.cell->state;
    const auto previous_pages = std::ssize(state.previous.pages), current_pages = std::ssize(state.current.pages);
    const PartScratch scratch = lay_out(part.count * shared, layout.width, part.count, previous_pages + current_pages);
    for (int64_t i = 0; i < previous_pages; ++i) scratch.pages[i] = layout.keys(*state.previous.pages[i], part.head);
    const float** current = scratch.pages + previous_pages;
    for (int64_t i = 0; i < current_pages; ++i) current[i] = layout.keys(*state.current.pages[i], part.head);

    const int64_t first = part.cell->row_begin + part.begin;
    for (int64_t i = 0; i < part.count; ++i) {
      const Row& row = part.group->rows[first + i - part.group->row_begin];
      scratch.sights[i] = sight_of(row, state, config_.front_rows());
    }
    AttentionTask task;
    const int64_t column = part.head * shared * layout.width;
    task.queries = row_of(qkv, first) + column;
    task.ld_queries = qkv.width;
    task.context = row_of(context, first) + column;
    task.ld_context = context.width;
    task.rows = part.count;
    task.heads = shared;
    task.width = layout.width;
    task.scale = score_scale(part.group->layer);
    task.sights = scratch.sights;
    task.sources[0] = {scratch.pages, part.cell->prev_visible};
    task.sources[1] = {current, part.cell->visible};
    task.scratch = scratch.kernel;
    kernels_.attend(task);
  };
  if (work_of(groups, config_) < kParallelWork) {
    for (int64_t i = 0; i < parts; ++i) attend_part(i);
  } else {
    pool_.parallel_for(parts, attend_part);
  }
}

}  // namespace armt::cpu
