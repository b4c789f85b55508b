// Which tiles a warpgroup of 64 query rows meets, and in which order: first those of the previous cache, then those of
// the current one.
#pragma once

#include "attention_tiles.cuh"

namespace armt::cuda {

// What 64 rows see together.
struct Reach {
  int prev_first, cur_first, cur_end;     // some row sees from / up to here
  int prev_full, cur_full, cur_full_end;  // every row sees from / up to here
  bool uniform;
};

// Of rows [first, first + 64) of the cell, by a warp, which also fills `sights` [64].
__device__ inline Reach reach_of(const AttendArgs& args, const DevCell& cell, int first, Sight* sights) {
  constexpr unsigned kAll = 0xffffffffu;
  Reach reach{cell.prev_rows, cell.cur_rows, 0, 0, 0, cell.cur_rows, false};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = first + static_cast<int>(threadIdx.x % 32) + i * 32;
    Sight sight{cell.prev_rows, cell.cur_rows, 0, 0};
    if (r < cell.rows) sight = sight_of(args.batch.rows[cell.row + r]);
    sights[r - first] = sight;
    if (r >= cell.rows) continue;
    reach.prev_first = min(reach.prev_first, sight.prev_begin);
    reach.cur_first = min(reach.cur_first, sight.cur_begin);
    reach.cur_end = max(reach.cur_end, sight.cur_end);
    reach.prev_full = max(reach.prev_full, sight.prev_begin);
    reach.cur_full = max(reach.cur_full, sight.cur_begin);
    reach.cur_full_end = min(reach.cur_full_end, sight.cur_end);
    reach.uniform |= (sight.flags & DevRow::kUniform) != 0;
  }
  reach.prev_first = __reduce_min_sync(kAll, reach.prev_first);
  reach.cur_first = __reduce_min_sync(kAll, reach.cur_first);
  reach.cur_end = __reduce_max_sync(kAll, reach.cur_end);
  reach.prev_full = __reduce_max_sync(kAll, reach.prev_full);
  reach.cur_full = __reduce_max_sync(kAll, reach.cur_full);
  reach.cur_full_end = __reduce_min_sync(kAll, reach.cur_full_end);
  reach.uniform = __any_sync(kAll, reach.uniform);
  return reach;
}

__device__ inline int tile_count(int rows) {
  return (rows + kTile - 1) / kTile;
}

// Tiles [prev_begin, prev_end) of the previous cache, then [cur_begin, cur_end) of the current one.
struct Span {
  int prev_begin, prev_end, cur_begin, cur_end;
  __device__ int count() const { return prev_end - prev_begin + cur_end - cur_begin; }
};

__device__ inline Span span_of(const DevCell& cell, const Reach& reach) {
  if (reach.uniform) return {0, tile_count(cell.prev_rows), 0, tile_count(cell.cur_rows)};
  Span span{};
  span.prev_begin = min(reach.prev_first, cell.prev_rows) / kTile;
  span.prev_end = reach.prev_first < cell.prev_rows ? tile_count(cell.prev_rows) : span.prev_begin;
  span.cur_begin = min(reach.cur_first, cell.cur_rows) / kTile;
  span.cur_end = max(span.cur_begin, tile_count(min(reach.cur_end, cell.cur_rows)));
  return span;
}

__device__ inline Span both(const Span& a, const Span& b) {
  return {min(a.prev_begin, b.prev_begin), max(a.prev_end, b.prev_end), min(a.cur_begin, b.cur_begin),
          max(a.cur_end, b.cur_end)};
}

// The block's walk, in shared memory: few threads ask for it, and seldom. Arrays: [0] current, [1] previous cache.
struct Route {
  int prev_count;  // tiles of the previous cache; index i of the walk is tile i - behind[previous]
  int behind[2], rows[2];
  int64_t head;  // elements from a page's begin to the block's head of keys
  const char* const* pages[2];
  const char* first_page[2];  // nearly always the only one

  __device__ Route() = default;
  __device__ Route(const AttendArgs& args, const DevCell& cell, const Span& span, int kv_head)
      : prev_count(span.prev_end - span.prev_begin),
        behind{prev_count - span.cur_begin, -span.prev_begin},
        rows{cell.cur_rows, cell.prev_rows},
        head(int64_t{kv_head} * args.page_rows * args.kv_row),
        pages{cell.cur_pages, cell.prev_pages},
        first_page{} {
    for (int i = 0; i < 2; ++i) {
      if (rows[i] > 0) first_page[i] = pages[i][0];
    }
  }

  __device__ Tile tile(int index) const {
    const bool previous = index < prev_count;
    return {previous, (index - behind[previous]) * kTile, rows[previous], false};
  }

  // Keys of a tile as in tile_keys().
  template <class T>
  __device__ const T* keys_of(const AttendArgs& args, const Tile& tile) const {
    const char* page = first_page[tile.previous];
    int row = tile.begin;
    if (row >= args.page_rows) {
      page = pages[tile.previous][row / args.page_rows];
      row %= args.page_rows;
    }
    return reinterpret_cast<const T*>(page) + head + kv_tile(row, args.kv_row);
  }
};

// A warpgroup's part of the walk, in shared memory.
struct Stretch {
  int count;                        // tiles of the block's walk
  int begin, end;                   // it sees nothing of the tiles before and after
  unsigned full[2], full_count[2];  // tiles that each row sees whole: from, count
  bool by_row[2];                   // what a row sees of the cache is more than a range

  __device__ Stretch() = default;
  // Of rows behind the last one.
  __device__ explicit Stretch(const Span& block)
      : count(block.count()), begin(0), end(0), full{}, full_count{}, by_row{} {}
  __device__ Stretch(const DevCell& cell, const Reach& reach, const Span& mine, const Span& block)
      : count(block.count()),
        begin(0),
        end(0),
        full{},
        full_count{},
        by_row{reach.uniform || cell.visible != nullptr, reach.uniform || cell.prev_visible != nullptr} {
    const int prev_count = block.prev_end - block.prev_begin;
    const int behind[2] = {prev_count - block.cur_begin, -block.prev_begin};
    const bool sees_prev = mine.prev_end > mine.prev_begin, sees_cur = mine.cur_end > mine.cur_begin;
    if (sees_prev || sees_cur) {
      begin = sees_prev ? mine.prev_begin + behind[1] : mine.cur_begin + behind[0];
      end = sees_cur ? mine.cur_end + behind[0] : mine.prev_end + behind[1];
    }
    const int from[2] = {max(prev_count, tile_count(reach.cur_full) + behind[0]),
                         tile_count(reach.prev_full) + behind[1]};
    const int to[2] = {min(reach.cur_full_end, cell.cur_rows) / kTile + behind[0],
                       min(prev_count, cell.prev_rows / kTile + behind[1])};
    for (int i = 0; i < 2; ++i) {
      full[i] = static_cast<unsigned>(from[i]);
      full_count[i] = by_row[i] ? 0 : static_cast<unsigned>(max(0, to[i] - from[i]));
    }
  }

  __device__ bool is_full(int index) const {
    const auto i = static_cast<unsigned>(index);
    return (i - full[0] < full_count[0]) | (i - full[1] < full_count[1]);
  }
};

}  // namespace armt::cuda
