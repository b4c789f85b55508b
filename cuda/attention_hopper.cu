// Attention of many rows on Hopper GPUs, heads of 64 or 128 columns. A warpgroup takes 64 query rows of one head and
// walks over the tiles of 64 keys that they see. The warpgroups of a block share the tiles: they take heads of the same
// keys where there are such, else neighbouring rows. The block's last warp finds out which tiles are needed and has the
// bulk copy engine bring them, later ones while products are under way. Products are warpgroup matrix instructions; a
// tile's values are multiplied together with the keys of the next one. Each row's sums run over its tiles in order,
// whatever else is in the batch.
#include <cuda_runtime.h>

#include "attention_products.cuh"
#include "attention_reach.cuh"
#include "attention_softmax.cuh"
#include "check.h"
#include "hopper.cuh"
#include "overlap.cuh"

namespace armt::cuda {
namespace {

// `blocks` of them fit on a multiprocessor, so that one works while another begins or ends.
template <int dim, int groups, int blocks, int stages>
struct Shape {
  static constexpr int kDim = dim, kGroups = groups, kBlocks = blocks, kStages = stages;
  static constexpr int kThreads = groups * 128;
  static constexpr int kQueryElements = 64 * dim, kTileElements = kTile * dim;
  static constexpr int kBytes = (groups * kQueryElements + 2 * stages * kTileElements) * 2 + 1024;
};

// How the warpgroups of a block share their tiles: `heads` of them take different heads of the same rows.
struct Sharing {
  int heads, row_blocks;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The warps of a warpgroup, or all but its last.
template <int warps>
struct Warpgroup {
  __device__ static int thread() { return static_cast<int>(threadIdx.x % 128); }
  __device__ static constexpr int threads() { return warps * 32; }
  __device__ static void sync() {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + threadIdx.x / 128), "n"(warps * 32) : "memory");
  }
};

// A block's shared memory besides queries and tiles.
template <class S>
struct Common {
  uint64_t arrived[S::kStages];
  uint64_t released[S::kStages];  // by the warps that have read the tile
  Route route;
  Stretch stretches[S::kGroups];  // one a group of rows
  Sight sights[S::kGroups * 64];
};

// One thread starts the copies of a tile. `tiles`: keys [stages][64, dim] in slabs, then values. Rows behind the
// cache's end stay away: nobody may have written them.
template <class T, class S>
__device__ void start_tile(const AttendArgs& args, Common<S>& common, T* tiles, int index, int stage) {
  const Tile tile = common.route.tile(index);
  const T* from = common.route.template keys_of<T>(args, tile);
  const int bytes = min(kTile, tile.limit - tile.begin) * 64 * 2;
  const int64_t values_behind = static_cast<int64_t>(args.kv_heads) * args.page_rows * args.kv_row;
  expect_bytes(common.arrived[stage], 2 * (S::kDim / 64) * bytes);
#pragma unroll
  for (int slab = 0; slab < S::kDim / 64; ++slab) {
    const T* part = from + static_cast<int64_t>(slab) * args.page_rows * 64;
    T* to = tiles + stage * S::kTileElements + slab * kTile * 64;
    copy_bulk(to, part, bytes, common.arrived[stage]);
    copy_bulk(to + S::kStages * S::kTileElements, part + values_behind, bytes, common.arrived[stage]);
  }
}

// By the last warp: plans the walk of the block, whose rows begin with `first`, and starts to fill the ring.
template <class T, class S>
__device__ void plan_walk(const AttendArgs& args, const DevCell& cell, const Sharing& sharing, int first, int kv_head,
                          T* tiles, Common<S>& common) {
  const int row_groups = S::kGroups / sharing.heads;
  Reach reaches[S::kGroups];
  Span spans[S::kGroups], block{};
#pragma unroll
  for (int g = 0; g < S::kGroups; ++g) {
    if (g >= row_groups || first + g * 64 >= cell.rows) continue;
    reaches[g] = reach_of(args, cell, first + g * 64, common.sights + g * 64);
    spans[g] = span_of(cell, reaches[g]);
    block = g == 0 ? spans[g] : both(block, spans[g]);
  }
  if (threadIdx.x % 32 == 0) {
    common.route = Route(args, cell, block, kv_head);
#pragma unroll 1
    for (int i = 0; i < min(S::kStages, block.count()); ++i) start_tile(args, common, tiles, i, i);
#pragma unroll
    for (int g = 0; g < S::kGroups; ++g) {
      if (g >= row_groups) continue;
      common.stretches[g] = first + g * 64 < cell.rows ? Stretch(cell, reaches[g], spans[g], block) : Stretch(block);
    }
  }
  __syncwarp();
}

// Rows [first, first + 16) of a warp, by way of `place` (16 rows of SlabPlace<64>) so that they leave in pieces of 16
// bytes.
template <class T, int dim>
__device__ void store_rows(const AttendArgs& args, const DevCell& cell, int first, int head,
                           const SteadySoftmax<dim>& softmax, T* place) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float scale = inverse_of_sum(softmax.total[i]);
#pragma unroll
    for (int n = 0; n < dim / 8; ++n) {
      *reinterpret_cast<uint32_t*>(place + SlabPlace<64>::at(lane / 4 + i * 8, n * 8 + lane % 4 * 2)) =
          pack_pair<T>(softmax.out[n][2 * i] * scale, softmax.out[n][2 * i + 1] * scale);
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * dim / 8; i += 32) {
    const int r = i / (dim / 8), d = i % (dim / 8) * 8;
    if (first + r >= cell.rows) break;
    *reinterpret_cast<Pack<T>*>(row_of<T>(args.context, cell, first + r) + head * dim + d) =
        *reinterpret_cast<const Pack<T>*>(place + SlabPlace<64>::at(r, d));
  }
}

// What the warps of a warpgroup do. `first`: of their 64 rows, the `row_group`-th of the block.
template <class T, class S>
__device__ void attend_rows(const AttendArgs& args, const DevCell& cell, int first, int row_group, int head, T* queries,
                            T* tiles, Common<S>& common) {
  constexpr int dim = S::kDim;
  const Stretch& stretch = common.stretches[row_group];
  const int count = stretch.count, begin = stretch.begin, end = stretch.end;
  const int lane = threadIdx.x % 32;
  const uint32_t queries_at = shared_address(queries), keys_at = shared_address(tiles),
                 values_at = keys_at + S::kStages * S::kTileElements * 2;
  uint32_t arrived_at = shared_address(common.arrived);
  asm volatile("" : "+r"(arrived_at));  // else its making is repeated at each use
  const float scale = score_scale(args, cell);
  SteadySoftmax<dim> softmax;
  Scores scores;
  uint32_t weights[kTile / 16][4];  // of the tile before, whose product with its values is still to come
  int stage = 0, phase = 0;
  const auto advance = [&] {
    if (++stage == S::kStages) stage = 0, phase ^= 1;
  };
  const auto release = [&](int at, bool where) {
    if (where && lane == 0) arrive(arrived_at + (S::kStages + at) * 8);
  };
  const auto multiply_keys = [&] {
    const uint32_t slab = keys_at + stage * (S::kTileElements * 2);
    pin(softmax.out);
    fence_products();
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) {
      const int part = k / 4 * kTile * 64 + k % 4 * 16;
      multiply_rows<T>(scores, slab_part(queries_at, part), slab_part(slab, part), k > 0);
    }
    commit_products();
  };
  const auto multiply_values = [&](int at) {
    const uint32_t slab = values_at + at * (S::kTileElements * 2);
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
#pragma unroll
      for (int n = 0; n < dim / 64; ++n) {
        multiply_add_columns<T>(softmax.out + n * 8, weights[k], slab_part(slab, (n * kTile + k * 16) * 64));
      }
    }
    commit_products();
  };
  // Behind the end of the cache lies anything; a weight of zero would not hide a NaN. Each warpgroup that multiplies
  // the tile writes these zeros and meets only itself.
  const auto clear_behind = [&](const Tile& tile) {
    const int rows = tile.limit - tile.begin;
    if (rows >= kTile) return;
    T* tile_v = tiles + (S::kStages + stage) * S::kTileElements;
#pragma unroll 1
    for (int i = Warpgroup<4>::thread(); i < (kTile - rows) * (dim / 8); i += 128) {
      const int r = rows + i / (dim / 8), d = i % (dim / 8) * 8;
      *reinterpret_cast<Pack<T>*>(tile_v + SlabPlace<kTile>::at(r, d)) = Pack<T>{};
    }
    publish_to_products();
    Warpgroup<4>::sync();
  };
  unsigned full_from = stretch.full[1], full_count = stretch.full_count[1];
  const bool brings = threadIdx.x >= S::kThreads - 32;
  // The ring's place of the tile two before, which all warps leave sooner or later, is for a tile to come.
  const auto bring = [&](int index) {
    if (!brings) return;
    const int next = index + S::kStages - 2;
    if (lane == 0 && index >= 2 && next < count) {
      const bool wraps = stage < 2;
      const int at = stage - 2 + (wraps ? S::kStages : 0);
      wait_for(arrived_at + (S::kStages + at) * 8, phase ^ wraps);
      start_tile(args, common, tiles, next, at);
    }
    __syncwarp();
  };
  // Awaits a tile; true where every row sees all of it.
  const auto take = [&](int index) {
    wait_for(arrived_at + stage * 8, phase);
    if (static_cast<unsigned>(index) - full_from < full_count) return true;
    if (stretch.is_full(index)) {
      full_from = stretch.full[0];
      full_count = stretch.full_count[0];
      return true;
    }
    clear_behind(common.route.tile(index));
    return false;
  };
  const auto pass = [&](int index) {
    wait_for(arrived_at + stage * 8, phase);
    bring(index);
    release(stage, true);
    advance();
  };

  int index = 0;
#pragma unroll 1
  for (; index < begin; ++index) pass(index);
  if (begin < end) {
    bool full = take(index);
    multiply_keys();
    bring(index);
    int before = 0;
#pragma unroll 1
    while (true) {
      wait_products<0>();
      pin(scores);
      pin(softmax.out);
      release(before, index > begin);
      if (!full) {
        const Tile tile = common.route.tile(index);
        const Sight* sight = common.sights + row_group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
        const Sight sights[2] = {sight[0], sight[8]};
        Softmax<dim>::mask(scores, cell, stretch.by_row[tile.previous], tile, sights);
      }
      softmax.weigh(scores, scale);
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) Softmax<dim>::template left_operand<T>(scores, k, weights[k]);
      before = stage;
      advance();
      if (++index == end) break;
      full = take(index);
      multiply_keys();
      multiply_values(before);
      bring(index);
    }
    fence_products();
    multiply_values(before);
    wait_products<0>();
    release(before, true);
  }
#pragma unroll 1
  for (; index < count; ++index) pass(index);
  Warpgroup<4>::sync();  // the queries have been read
  const int warp = threadIdx.x % 128 / 32;
  store_rows<T, dim>(args, cell, first + warp * 16, head, softmax, queries + warp * 16 * 64);
}

#endif

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    hopper_kernel(const __grid_constant__ AttendArgs args, Sharing sharing) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char memory[];
  __shared__ Common<S> common;
  T* queries = reinterpret_cast<T*>(memory + (1024 - shared_address(memory) % 1024) % 1024);
  T* tiles = queries + S::kGroups * S::kQueryElements;
  const bool plans = threadIdx.x >= S::kThreads - 32;
  if (threadIdx.x == S::kThreads - 32) {
    for (uint64_t& barrier : common.arrived) init_barrier(barrier, 1);
    for (uint64_t& barrier : common.released) init_barrier(barrier, S::kGroups * 4);
    publish_barriers();
  }
  let_next_kernel_start();
  wait_for_kernel_before();
  const DevCell& cell = args.batch.cells[blockIdx.y];
  const int row_block = sharing.row_blocks - 1 - static_cast<int>(blockIdx.z);  // the longest start first
  const int first = row_block * (S::kGroups / sharing.heads) * 64;
  if (first >= cell.rows) return;
  const int group = threadIdx.x / 128, row_group = group / sharing.heads;
  const int head = blockIdx.x * sharing.heads + group % sharing.heads;
  T* own_queries = queries + group * S::kQueryElements;
  const auto load = [&](auto team) {
    load_queries<T, SlabPlace<64>, 64, S::kDim, decltype(team)>(args, cell, first + row_group * 64, head, own_queries);
    publish_to_products();
  };
  if (plans) {
    plan_walk<T, S>(args, cell, sharing, first, head * args.kv_heads / args.q_heads, tiles, common);
  } else if (group == S::kGroups - 1) {
    load(Warpgroup<3>());
  } else {
    load(Warpgroup<4>());
  }
  __syncthreads();  // the last: from here on warpgroups go their own ways
  attend_rows<T, S>(args, cell, first + row_group * 64, row_group, head, own_queries, tiles, common);
#else
  __trap();  // built for 9.0 without its own instructions (90 instead of 90a)
#endif
}

template <class T, class S>
bool launch(const AttendArgs& args, cudaStream_t stream) {
  const auto kernel = hopper_kernel<T, S>;
  if (!has_hopper_code(reinterpret_cast<const void*>(kernel))) return false;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes), "cudaFuncSetAttribute");
  Sharing sharing{.heads = args.q_heads / args.kv_heads % S::kGroups == 0 ? S::kGroups : 1, .row_blocks = 0};
  sharing.row_blocks = static_cast<int>(ceil_div(args.batch.max_cell_rows, S::kGroups / sharing.heads * 64));
  const dim3 grid(args.q_heads / sharing.heads, args.batch.cell_count, sharing.row_blocks);
  launch_overlapped(kernel, grid, dim3(S::kThreads), S::kBytes, stream, args, sharing);
  return true;
}

template <class T>
bool launch_type(const AttendArgs& args, cudaStream_t stream) {
  if (args.head_dim == 64) return launch<T, Shape<64, 2, 2, 5>>(args, stream);
  if (args.head_dim == 128) return launch<T, Shape<128, 3, 1, 5>>(args, stream);
  return false;
}

}  // namespace

bool launch_hopper(DType dtype, const AttendArgs& args, cudaStream_t stream) {
  if (dtype == DType::bf16) return launch_type<__nv_bfloat16>(args, stream);
  return launch_type<__half>(args, stream);
}

}  // namespace armt::cuda
