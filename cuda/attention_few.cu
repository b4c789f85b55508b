// Attention of few rows (decoding), and of any for float32. A block takes one query row and up to four query heads of
// one key head over its share of the keys, in tiles of 64; the last block of a row to finish joins the shares. Tiles
// come by asynchronous copies, the first before the kernel waits for the one before it: where a cell has one row, its
// key and value are this kernel's own to store.
#include <cuda_runtime.h>

#include <algorithm>

#include "attention.cuh"
#include "check.h"
#include "mma.cuh"
#include "overlap.cuh"

namespace armt::cuda {
namespace {

constexpr int kTile = 64, kThreads = 128, kWarps = kThreads / 32;
constexpr int kChunk = 8;                  // elements that a thread handles together
constexpr int kLanes = 8, kKeys = 32 / 8;  // scores: lanes a key, keys a warp at once

// Shared memory: tiles of keys and values [stages][2][64, kv_row] of T, whose room the last sums take over; then
// floats: queries [heads, kv_row], scores [heads, 64], state [heads, 3] (greatest score, total, what to keep).
struct FewLayout {
  int kv_row = 0, heads = 0, stages = 0;
  int64_t tile_bytes = 0, sums_bytes = 0;

  FewLayout(int row, int block_heads, int64_t element) : kv_row(row), heads(block_heads) {
    constexpr int64_t kMostTiles = 64 * 1024;
    tile_bytes = 2 * kTile * kv_row * element;
    stages = 2 * tile_bytes <= kMostTiles ? 2 : 1;
    sums_bytes = int64_t{kThreads} * heads * kChunk * 4;
  }
  __host__ __device__ int64_t floats_at() const {
    const int64_t tiles = stages * tile_bytes;
    return tiles > sums_bytes ? tiles : sums_bytes;
  }
  __host__ __device__ int scores() const { return heads * kv_row; }
  __host__ __device__ int state() const { return scores() + heads * kTile; }
  int64_t bytes() const { return floats_at() + (state() + 3 * heads) * 4; }
};

template <class T>
__device__ void load_chunk(const T* from, float (&to)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; i += Pack<T>::kCount) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + i);
#pragma unroll
    for (int k = 0; k < Pack<T>::kCount; ++k) to[i + k] = to_float(pack.v[k]);
  }
}

// Calls out(d, value) for the elements of one head of the row, normed and rotated, zeros up to kv_row. By one warp.
template <class T, class Out>
__device__ void rotate_head(const AttendArgs& args, const DevRow& row, const T* head, const float* weight,
                            const Out& out) {
  const int lane = threadIdx.x % 32, dim = args.head_dim;
  const float2* turns = args.angles + static_cast<int64_t>(row.angle) * args.half;
  float scale = 1.0f;
  if (weight != nullptr) {
    float squares = 0.0f;
    for (int d = lane; d < dim; d += 32) squares += to_float(head[d]) * to_float(head[d]);
    scale = rsqrtf(warp_sum(squares) / static_cast<float>(dim) + args.eps);
  }
  const auto value = [&](int d) { return to_float(head[d]) * (weight != nullptr ? scale * weight[d] : 1.0f); };
  for (int d = lane; d < args.kv_row; d += 32) {
    float x = d < dim ? value(d) : 0.0f;
    if (d < args.half) {
      x = x * turns[d].x - value(d + args.half) * turns[d].y;
    } else if (d < 2 * args.half) {
      x = x * turns[d - args.half].x + value(d - args.half) * turns[d - args.half].y;
    }
    out(d, x);
  }
}

// A block's share of a row's attention.
template <class T, int kHeads>
class FewBlock {
 public:
  __device__ FewBlock(const AttendArgs& args, const FewLayout& layout, const DevCell& cell, const DevRow& row,
                      int kv_head, int first_head, int heads, unsigned char* memory)
      : args_(args),
        layout_(layout),
        cell_(cell),
        row_(row),
        sight_(sight_of(row)),
        kv_head_(kv_head),
        first_head_(first_head),
        heads_(heads),
        tiles_(reinterpret_cast<T*>(memory)),
        sums_(reinterpret_cast<float*>(memory)),
        queries_(reinterpret_cast<float*>(memory + layout.floats_at())),
        scores_(queries_ + layout.scores()),
        state_(queries_ + layout.state()),
        uniform_((sight_.flags & DevRow::kUniform) != 0) {
    const int prev_tiles = (cell.prev_rows + kTile - 1) / kTile;
    prev_first_ = uniform_ ? 0 : min(sight_.prev_begin / kTile, prev_tiles);
    cur_first_ = uniform_ ? 0 : sight_.cur_begin / kTile;
    const int cur_tiles = ((uniform_ ? cell.cur_rows : min(sight_.cur_end, cell.cur_rows)) + kTile - 1) / kTile;
    prev_count_ = prev_tiles - prev_first_;
    count_ = prev_count_ + max(0, cur_tiles - cur_first_);
    for (int i = threadIdx.x; i < kHeads; i += kThreads) {
      state_[3 * i] = -INFINITY;
      state_[3 * i + 1] = 0.0f;
    }
  }

  __device__ int count() const { return count_; }

  // Starts copying tile i into its stage.
  __device__ void start(int i, int stage) {
    if (i < count_) {
      const bool previous = i < prev_count_;
      const int tile = tile_of(i), limit = limit_of(i);
      const T* keys = tile_keys<T>(args_, cell_, previous, tile, kv_head_);
      T* to_keys = tiles_ + stage * 2 * kTile * args_.kv_row;
      T* to_values = to_keys + kTile * args_.kv_row;
      const int chunks = args_.kv_row / kChunk;
      // A row that this kernel stores itself is not there yet: patch_row() puts it into the tile.
      const int own = args_.stores && !previous ? cell_.kv_begin - tile * kTile : -1;
      for (int at = threadIdx.x; at < kTile * chunks; at += kThreads) {
        const int r = at / chunks, d = at % chunks * kChunk;
        if (r >= limit) break;
        if (r == own) continue;
        const T* from = keys + kv_at(r, d, args_.kv_row, args_.page_rows);
        const int to = kv_at(r, d, args_.kv_row, kTile);
#pragma unroll
        for (int k = 0; k < kChunk; k += Pack<T>::kCount) {
          copy_async(to_keys + to + k, from + k, true);
          copy_async(to_values + to + k, from + values_behind() + k, true);
        }
      }
    }
    commit_copies();
  }

  __device__ void load_queries(const T* in) {
    const float* weight =
        args_.q_norm != nullptr ? args_.q_norm + static_cast<int64_t>(cell_.stack) * args_.head_dim : nullptr;
    for (int g = threadIdx.x / 32; g < heads_; g += kWarps) {
      rotate_head(args_, row_, in + (first_head_ + g) * args_.head_dim, weight,
                  [&](int d, float x) { queries_[g * args_.kv_row + d] = x; });
    }
  }

  // The row's own key and value, to(values, d) = x: by the first two warps.
  template <class To>
  __device__ void own_row(const T* in, const To& to) const {
    const int warp = threadIdx.x / 32, dim = args_.head_dim;
    const T* key = in + (args_.q_heads + kv_head_) * dim;
    if (warp == 0) {
      const float* weight = args_.k_norm != nullptr ? args_.k_norm + static_cast<int64_t>(cell_.stack) * dim : nullptr;
      rotate_head(args_, row_, key, weight, [&](int d, float x) { to(false, d, from_float<T>(x)); });
    } else if (warp == 1) {
      for (int d = threadIdx.x % 32; d < args_.kv_row; d += 32) {
        to(true, d, d < dim ? key[args_.kv_heads * dim + d] : from_float<T>(0.0f));
      }
    }
  }
  __device__ void store_row(const T* in) const {
    const int index = cell_.kv_begin;
    T* keys = const_cast<T*>(tile_keys<T>(args_, cell_, false, index / kTile, kv_head_));
    own_row(in, [&](bool values, int d, T x) {
      keys[(values ? values_behind() : 0) + kv_at(index % kTile, d, args_.kv_row, args_.page_rows)] = x;
    });
  }
  // Where the copy of tile i left it out. A barrier must follow; says whether.
  __device__ bool patch_row(const T* in, int i, int stage) {
    if (i < prev_count_ || tile_of(i) != cell_.kv_begin / kTile) return false;
    T* tile = tiles_ + stage * 2 * kTile * args_.kv_row;
    own_row(in, [&](bool values, int d, T x) {
      tile[(values ? kTile * args_.kv_row : 0) + kv_at(cell_.kv_begin % kTile, d, args_.kv_row, kTile)] = x;
    });
    return true;
  }

  // Adds tile i to the running sums; ends with a barrier.
  __device__ void add(int i, int stage, float scale) {
    const T* keys = tiles_ + stage * 2 * kTile * args_.kv_row;
    score(i, keys, scale);
    __syncthreads();
    weigh();
    __syncthreads();
    sum(keys + kTile * args_.kv_row, min(kTile, limit_of(i)));
    __syncthreads();
  }

  // The threads' sums, joined: calls out(head, d, greatest score, total, sum).
  template <class Out>
  __device__ void finish(const Out& out) {
    const int chunks = args_.kv_row / kChunk, teams = kThreads / chunks, team = threadIdx.x / chunks;
    const int d = threadIdx.x % chunks * kChunk;
    if (team < teams) {
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
        float* to = sums_ + (team * kHeads + g) * args_.kv_row + d;
#pragma unroll
        for (int k = 0; k < kChunk; k += 4) {
          *reinterpret_cast<float4*>(to + k) = make_float4(out_[g][k], out_[g][k + 1], out_[g][k + 2], out_[g][k + 3]);
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads_ * args_.head_dim; i += kThreads) {
      const int g = i / args_.head_dim, at = i % args_.head_dim;
      float whole = 0.0f;
      for (int t = 0; t < teams; ++t) whole += sums_[(t * kHeads + g) * args_.kv_row + at];
      out(g, at, state_[3 * g], state_[3 * g + 1], whole);
    }
  }

 private:
  __device__ int tile_of(int i) const { return i < prev_count_ ? prev_first_ + i : cur_first_ + i - prev_count_; }
  // Rows of the cache from the beginning of tile i.
  __device__ int limit_of(int i) const {
    return (i < prev_count_ ? cell_.prev_rows : cell_.cur_rows) - tile_of(i) * kTile;
  }
  __device__ int64_t values_behind() const {
    return static_cast<int64_t>(args_.kv_heads) * args_.page_rows * args_.kv_row;
  }

  // Eight lanes share a key.
  __device__ void score(int i, const T* keys, float scale) {
    constexpr int kPasses = kTile / (kWarps * kKeys);
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kPasses * kKeys + lane / kLanes;
    float sums[kPasses][kHeads] = {};
    for (int d = lane % kLanes * kChunk; d < args_.kv_row; d += kLanes * kChunk) {
      float q[kHeads][kChunk];
#pragma unroll
      for (int g = 0; g < kHeads; ++g) load_chunk(queries_ + g * args_.kv_row + d, q[g]);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        float key[kChunk];
        load_chunk(keys + kv_at(first + pass * kKeys, d, args_.kv_row, kTile), key);
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
#pragma unroll
          for (int k = 0; k < kChunk; ++k) sums[pass][g] = fmaf(q[g][k], key[k], sums[pass][g]);
        }
      }
    }
    const bool previous = i < prev_count_;
    const int begin = tile_of(i) * kTile, limit = limit_of(i);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int key = first + pass * kKeys;
      const bool seen = key < limit && sees(sight_, cell_, previous, begin + key);
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
        float sum = sums[pass][g];
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane % kLanes == g) scores_[g * kTile + key] = !seen ? -INFINITY : uniform_ ? 0.0f : scale * sum;
      }
    }
  }

  // Scores become weights; a warp a head.
  __device__ void weigh() {
    const int lane = threadIdx.x % 32;
    for (int g = threadIdx.x / 32; g < kHeads; g += kWarps) {
      float* mine = scores_ + g * kTile;
      const float most = state_[3 * g];
      const float highest = fmaxf(most, warp_max(fmaxf(mine[lane], mine[lane + 32])));
      const float shift = highest == -INFINITY ? 0.0f : highest;
      const float a = expf(mine[lane] - shift), b = expf(mine[lane + 32] - shift);
      mine[lane] = a;
      mine[lane + 32] = b;
      const float total = warp_sum(a + b), keep = expf(most - shift);
      __syncwarp();
      if (lane != 0) continue;
      state_[3 * g] = highest;
      state_[3 * g + 1] = state_[3 * g + 1] * keep + total;
      state_[3 * g + 2] = keep;
    }
  }

  // A thread has eight columns of every few keys.
  __device__ void sum(const T* values, int limit) {
    const int chunks = args_.kv_row / kChunk, teams = kThreads / chunks, team = threadIdx.x / chunks;
    const int d = threadIdx.x % chunks * kChunk;
    if (team >= teams) return;
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      const float keep = state_[3 * g + 2];
#pragma unroll
      for (int k = 0; k < kChunk; ++k) out_[g][k] *= keep;
    }
#pragma unroll 4
    for (int key = team; key < limit; key += teams) {
      float value[kChunk];
      load_chunk(values + kv_at(key, d, args_.kv_row, kTile), value);
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
        const float weight = scores_[g * kTile + key];
#pragma unroll
        for (int k = 0; k < kChunk; ++k) out_[g][k] = fmaf(weight, value[k], out_[g][k]);
      }
    }
  }

  const AttendArgs& args_;
  const FewLayout& layout_;
  const DevCell& cell_;
  const DevRow& row_;
  const Sight sight_;
  const int kv_head_, first_head_, heads_;
  T* tiles_;
  float* sums_;
  float* queries_;
  float* scores_;
  float* state_;
  const bool uniform_;
  int prev_first_, cur_first_, prev_count_, count_;
  float out_[kHeads][kChunk] = {};
};

// grid: rows of all cells, parts of the query heads, splits
template <class T, int kHeads>
__global__ void __launch_bounds__(kThreads)
    few_kernel(const __grid_constant__ AttendArgs args, const __grid_constant__ FewLayout layout) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ bool last;
  let_next_kernel_start();
  if (!args.stores) wait_for_kernel_before();
  const DevCell& cell = args.batch.cells[blockIdx.x / args.batch.max_cell_rows];
  const int r = blockIdx.x % args.batch.max_cell_rows;
  if (r >= cell.rows) return;
  const int group = args.q_heads / args.kv_heads, parts = (group + kHeads - 1) / kHeads;
  const int kv_head = blockIdx.y / parts, part = blockIdx.y % parts;
  const int first_head = kv_head * group + part * kHeads, heads = min(kHeads, group - part * kHeads);
  const DevRow& row = args.batch.rows[cell.row + r];
  FewBlock<T, kHeads> block(args, layout, cell, row, kv_head, first_head, heads, memory);
  const int first = blockIdx.z, stages = layout.stages;
  block.start(first, 0);
  if (args.stores) wait_for_kernel_before();
  const T* in = row_of<T>(args.qkv, cell, r);
  block.load_queries(in);
  if (args.stores && blockIdx.z == 0 && part == 0) block.store_row(in);
  const float scale = args.scale / (args.by_layer ? static_cast<float>(cell.layer + 1) : 1.0f);
  int stage = 0;
  for (int i = first; i < block.count(); i += args.splits) {
    if (stages == 2) {
      block.start(i + args.splits, stage ^ 1);
      wait_copies<1>();
    } else {
      if (i != first) block.start(i, 0);
      wait_copies<0>();
    }
    __syncthreads();
    if (args.stores && block.patch_row(in, i, stage)) __syncthreads();
    block.add(i, stage, scale);
    if (stages == 2) stage ^= 1;
  }
  wait_copies<0>();
  __syncthreads();

  T* out = row_of<T>(args.context, cell, r) + first_head * args.head_dim;
  if (args.splits == 1) {
    block.finish([&](int g, int d, float, float total, float sum) {
      out[g * args.head_dim + d] = from_float<T>(total > 0.0f ? sum / total : 0.0f);
    });
    return;
  }
  const int64_t share = args.head_dim + 2;
  float* partial = args.partial + (static_cast<int64_t>(blockIdx.x) * args.q_heads + first_head) * args.splits * share;
  block.finish([&](int g, int d, float most, float total, float sum) {
    float* mine = partial + (g * args.splits + blockIdx.z) * share;
    mine[2 + d] = sum;
    if (d > 0) return;
    mine[0] = most;
    mine[1] = total;
  });
  __threadfence();
  __syncthreads();
  int* counter = args.counters + blockIdx.x * gridDim.y + blockIdx.y;
  if (threadIdx.x == 0) last = atomicAdd(counter, 1) == args.splits - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0) *counter = 0;
  for (int i = threadIdx.x; i < heads * args.head_dim; i += kThreads) {
    const float* shares = partial + static_cast<int64_t>(i / args.head_dim) * args.splits * share;
    float highest = -INFINITY;
#pragma unroll 8
    for (int s = 0; s < args.splits; ++s) highest = fmaxf(highest, __ldcg(shares + s * share));
    const float shift = highest == -INFINITY ? 0.0f : highest;
    float total = 0.0f, sum = 0.0f;
#pragma unroll 8
    for (int s = 0; s < args.splits; ++s) {
      const float weight = expf(__ldcg(shares + s * share) - shift);
      total += weight * __ldcg(shares + s * share + 1);
      sum += weight * __ldcg(shares + s * share + 2 + i % args.head_dim);
    }
    out[i] = from_float<T>(total > 0.0f ? sum / total : 0.0f);
  }
}

template <class T, int kHeads>
void launch(const AttendArgs& args, cudaStream_t stream) {
  const FewLayout layout(args.kv_row, kHeads, sizeof(T));
  const auto kernel = few_kernel<T, kHeads>;
  const auto bytes = static_cast<int>(layout.bytes());
  if (bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  }
  const auto parts = static_cast<unsigned>(args.kv_heads * ceil_div(args.q_heads / args.kv_heads, kHeads));
  const dim3 grid(static_cast<unsigned>(args.batch.cell_count) * args.batch.max_cell_rows, parts, args.splits);
  launch_overlapped(kernel, grid, dim3(kThreads), static_cast<size_t>(bytes), stream, args, layout);
}

// Query heads of a block.
int block_heads(const AttendArgs& args) {
  const int group = args.q_heads / args.kv_heads;
  return group >= 3 ? 4 : group;
}

}  // namespace

FewShares few_shares(const AttendArgs& args, int processors) {
  const int64_t rows = int64_t{args.batch.cell_count} * args.batch.max_cell_rows;
  FewShares shares;
  shares.counters = rows * args.kv_heads * ceil_div(args.q_heads / args.kv_heads, block_heads(args));
  // So that a few rows fill the chip.
  const int64_t wanted = 2 * processors;
  if (shares.counters < wanted) {
    shares.splits =
        static_cast<int>(std::clamp<int64_t>(wanted / shares.counters, 1, ceil_div(args.batch.max_keys, kTile)));
  }
  if (shares.splits > 1) shares.floats = rows * args.q_heads * shares.splits * (args.head_dim + 2);
  return shares;
}

void launch_few(DType dtype, const AttendArgs& args, cudaStream_t stream) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    switch (block_heads(args)) {
      case 1:
        return launch<T, 1>(args, stream);
      case 2:
        return launch<T, 2>(args, stream);
      default:
        launch<T, 4>(args, stream);
    }
  });
}

}  // namespace armt::cuda
