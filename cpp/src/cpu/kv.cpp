// Pages of keys and values.
#include "cpu/kv.h"

#include <algorithm>
#include <cstring>

#include "cpu/cpu_backend.h"

namespace armt::cpu {
namespace {

constexpr int64_t kRowsAtOnce = 16;  // a line of a page's transposed keys

void copy_floats(float* to, const float* from, int64_t count) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}

// Rows of keys [count, c] of one head into a page, from its row `offset` on.
void put_keys(float* page, int64_t offset, int64_t count, int64_t width, const float* keys, int64_t ld) {
  for (int64_t i = 0; i < width; ++i) {
    float* to = page + i * kKeyBlock + offset;
    for (int64_t r = 0; r < count; ++r) to[r] = keys[r * ld + i];
  }
}

// fn(page, offset in the page, first row, rows) for each piece of [begin, begin + count) within a
// page.
template <class Fn>
void for_each_piece(const KvCache& cache, int64_t begin, int64_t count, int64_t most, Fn fn) {
  for (int64_t row = begin; row < begin + count;) {
    const int64_t offset = row % kKeyBlock;
    const int64_t rows = std::min({begin + count - row, kKeyBlock - offset, most - offset % most});
    fn(*cache.pages[row / kKeyBlock], offset, row, rows);
    row += rows;
  }
}

}  // namespace

int64_t CpuBackend::kv_page_rows() const {
  return kKeyBlock;
}
int64_t CpuBackend::kv_page_bytes() const {
  return PageLayout(config_).bytes();
}

void CpuBackend::export_kv(const KvCache& cache, float* k, float* v) {
  const PageLayout layout(config_);
  for_each_piece(cache, 0, cache.rows, kKeyBlock, [&](const KvPage& page, int64_t, int64_t first, int64_t rows) {
    for (int64_t head = 0; head < layout.heads; ++head) {
      const float* keys = layout.keys(page, head);
      const float* values = layout.values(page, head);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = ((first + r) * layout.heads + head) * layout.width;
        for (int64_t i = 0; i < layout.width; ++i) k[at + i] = keys[i * kKeyBlock + r];
        copy_floats(v + at, values + r * padded(layout.width), layout.width);
      }
    }
  });
}

void CpuBackend::import_kv(KvCache& cache, const float* k, const float* v) {
  const PageLayout layout(config_);
  const int64_t ld = layout.heads * layout.width;
  for_each_piece(cache, 0, cache.rows, kKeyBlock, [&](const KvPage& page, int64_t, int64_t first, int64_t rows) {
    for (int64_t head = 0; head < layout.heads; ++head) {
      const int64_t at = first * ld + head * layout.width;
      put_keys(layout.keys(page, head), 0, rows, layout.width, k + at, ld);
      float* values = layout.values(page, head);
      for (int64_t r = 0; r < rows; ++r) copy_floats(values + r * padded(layout.width), v + at + r * ld, layout.width);
    }
  });
}

void CpuBackend::store_rows(const Group& group, const Cell& cell, const Rows& qkv, int64_t begin, int64_t count) {
  const PageLayout layout(config_);
  const int64_t width = config_.kv_width();
  const float* norm = vector(Vector::k_norm, group.layer);
  float* turned = thread_scratch(Slot::attention, kRowsAtOnce * width);  // [rows, Hkv, c]
  const auto put = [&](const KvPage& page, int64_t offset, int64_t first, int64_t rows) {
    const int64_t row = cell.row_begin + first - cell.kv_begin;
    for (int64_t r = 0; r < rows; ++r) {
      copy_floats(turned + r * width, row_of(qkv, row + r) + config_.query_width(), width);
      turn_heads(norm, group.rows[row + r - group.row_begin].position, layout.heads, turned + r * width);
    }
    for (int64_t head = 0; head < layout.heads; ++head) {
      put_keys(layout.keys(page, head), offset, rows, layout.width, turned + head * layout.width, width);
      for (int64_t r = 0; r < rows; ++r) {
        const float* from = row_of(qkv, row + r) + config_.query_width() + width + head * layout.width;
        copy_floats(layout.values(page, head) + (offset + r) * padded(layout.width), from, layout.width);
      }
    }
  };
  for_each_piece(cell.state->current, begin, count, kRowsAtOnce, put);
}

void CpuBackend::store_kv(Groups groups, const Rows& qkv) {
  constexpr int64_t kGrain = 32;  // rows
  for (const Group& group : groups) {
    for (const Cell& cell : group.cells) {
      pool_.parallel_ranges(cell.row_count, kGrain, [&](int64_t begin, int64_t end) {
        store_rows(group, cell, qkv, cell.kv_begin + begin, end - begin);
      });
    }
  }
}

}  // namespace armt::cpu
