// What the attention kernels share: their arguments and the visibility rule.
#pragma once

#include "types.cuh"

namespace armt::cuda {

struct AttendArgs {
  Batch batch;
  View qkv, context;
  const float2* angles = nullptr;
  const float* q_norm = nullptr;  // [layers, c] or null
  const float* k_norm = nullptr;  // the same
  int q_heads = 0, kv_heads = 0;
  int head_dim = 0, kv_row = 0;  // c, and its padding in a page
  int page_rows = 0;
  int half = 0;  // rotary_dims / 2
  float scale = 0.0f;
  bool by_layer = false;  // scores are divided by layer + 1
  float eps = 0.0f;
  // few rows only
  bool stores = false;  // each cell has one row, whose key and value are still to be stored
  int splits = 1;
  float* partial = nullptr;  // [rows, q heads, splits, c + 2]
  int* counters = nullptr;   // FewShares::counters of them, zero between calls
};

// One row's view of the two caches, each masked row by row.
struct Sight {
  int prev_begin, cur_begin, cur_end;
  uint32_t flags;
};

__device__ inline Sight sight_of(const DevRow& row) {
  return {row.prev_begin, row.cur_begin, row.cur_end, row.flags};
}

// Whether column `col` (below the cache's row count) of the previous or the current cache is seen.
__device__ inline bool sees(const Sight& sight, const DevCell& cell, bool previous, int col) {
  if (sight.flags & DevRow::kUniform) return true;
  if (previous) {
    return col >= sight.prev_begin &&
           (cell.prev_visible == nullptr || (sight.flags & DevRow::kSeesPrevPadding) || cell.prev_visible[col] != 0);
  }
  return col >= sight.cur_begin && col < sight.cur_end &&
         (cell.visible == nullptr || (sight.flags & DevRow::kSeesPadding) || cell.visible[col] != 0);
}

// Address of a 64-row tile of keys, whose element (r, d) lies at kv_at(r, d); values lie kv_heads * page_rows * kv_row
// elements behind.
template <class T>
__device__ const T* tile_keys(const AttendArgs& args, const DevCell& cell, bool previous, int tile, int kv_head) {
  const int row = tile * 64;
  const char* page = (previous ? cell.prev_pages : cell.cur_pages)[row / args.page_rows];
  return reinterpret_cast<const T*>(page) + static_cast<int64_t>(kv_head) * args.page_rows * args.kv_row +
         kv_tile(row % args.page_rows, args.kv_row);
}

// Many rows at once, 16-bit types; the Hopper form returns false where the GPU or the head size is none of its kind.
bool launch_hopper(DType dtype, const AttendArgs& args, cudaStream_t stream);
void launch_flash(DType dtype, const AttendArgs& args, cudaStream_t stream);
// Few rows at once, any type. Shares of the keys: what launch_few() wants in `args`.
struct FewShares {
  int splits = 1;
  int64_t floats = 0, counters = 0;  // sizes of `partial` (0: not needed) and `counters`
};
FewShares few_shares(const AttendArgs& args, int processors);
void launch_few(DType dtype, const AttendArgs& args, cudaStream_t stream);

}  // namespace armt::cuda
