// Attention of many rows on Hopper GPUs, heads of 64 or 128 columns: a block takes 64 query rows a warpgroup and walks
// over the visible tiles of 64 keys, which the bulk copy engine brings. Products are warpgroup matrix instructions
// whose right operands stay in shared memory; queries and weights come from registers. A tile's values are multiplied
// while the exponentials of the next tile are taken.
#include <cuda_runtime.h>

#include "attention_tiles.cuh"
#include "check.h"
#include "hopper.cuh"
#include "overlap.cuh"

namespace armt::cuda {
namespace {

template <int dim, int groups>
struct Shape {
  static constexpr int kRows = groups * 64, kThreads = groups * 128, kStages = 4;
  static constexpr int kTileElements = kTile * dim;
  static constexpr int kBytes = (kRows * dim + 2 * kStages * kTileElements) * 2 + 1024;  // begins at a multiple of 1024
  using QueryPlace = SlabPlace<kRows>;
  using TilePlace = SlabPlace<kTile>;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A slab of rows of 64 16-bit elements, 128-byte swizzle, groups of eight rows 1024 bytes apart.
__device__ inline uint64_t slab_descriptor(const void* shared) {
  return static_cast<uint64_t>(shared_address(shared) >> 4 & 0x3fff) | uint64_t{64} << 16 | uint64_t{64} << 32 |
         uint64_t{1} << 62;
}

__device__ inline void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int pending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// d [64, 64] = a [64, 16] b (+ d if `keep`). b: 64 rows of keys, 16 of their columns (`transposed` 0), or 16 rows of
// values, 64 columns (`transposed` 1).
#define ARMT_MULTIPLY(TYPE, TRANSPOSED)                                                                             \
  asm volatile(                                                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                                   \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, " TRANSPOSED ";\n}\n"      \
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),    \
        "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),    \
        "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]),    \
        "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),    \
        "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep))

template <class T, bool transposed>
__device__ inline void multiply(float (*d)[4], const uint32_t (&a)[4], uint64_t b, int keep) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (transposed) {
      ARMT_MULTIPLY("bf16", "1");
    } else {
      ARMT_MULTIPLY("bf16", "0");
    }
  } else {
    if constexpr (transposed) {
      ARMT_MULTIPLY("f16", "1");
    } else {
      ARMT_MULTIPLY("f16", "0");
    }
  }
}
#undef ARMT_MULTIPLY

#endif

template <class T, int dim, int groups>
__global__ void __launch_bounds__(Shape<dim, groups>::kThreads, 1)
    hopper_kernel(const __grid_constant__ AttendArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shape<dim, groups>;
  constexpr int kLead = 2;  // tiles that are on their way at first
  let_next_kernel_start();
  wait_for_kernel_before();
  const DevCell& cell = args.batch.cells[blockIdx.z];
  const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * S::kRows;  // the longest blocks start first
  if (first >= cell.rows) return;
  const int head = blockIdx.y, kv_head = head * args.kv_heads / args.q_heads;
  extern __shared__ unsigned char memory[];
  T* queries = reinterpret_cast<T*>(memory + (1024 - shared_address(memory) % 1024) % 1024);
  T* keys = queries + S::kRows * dim;                // [stages][64, dim]
  T* values = keys + S::kStages * S::kTileElements;  // [stages][64, dim]
  __shared__ Bounds bounds;
  __shared__ uint64_t arrived[S::kStages], released[S::kStages];  // tiles; by the warps that have read them
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : arrived) init_barrier(barrier, 1);
    for (uint64_t& barrier : released) init_barrier(barrier, S::kThreads / 32);
    publish_barriers();
  }
  find_bounds(args, cell, first, S::kRows, bounds);
  __syncthreads();
  const Walk walk(cell, bounds);
  const int64_t values_behind = static_cast<int64_t>(args.kv_heads) * args.page_rows * args.kv_row;
  // Rows behind the cache's end stay away: nobody may have written them.
  const auto start = [&](int index) {
    const int stage = index % S::kStages;
    const Tile tile = walk.tile(index);
    const T* from = walk.keys_of<T>(args, tile, kv_head);
    const int bytes = min(kTile, tile.limit - tile.begin) * 64 * 2;
    expect_bytes(arrived[stage], 2 * (dim / 64) * bytes);
#pragma unroll
    for (int slab = 0; slab < dim / 64; ++slab) {
      const T* part = from + static_cast<int64_t>(slab) * args.page_rows * 64;
      const int to = stage * S::kTileElements + slab * kTile * 64;
      copy_bulk(keys + to, part, bytes, arrived[stage]);
      copy_bulk(values + to, part + values_behind, bytes, arrived[stage]);
    }
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < min(kLead, walk.count); ++i) start(i);
  }
  load_queries<T, typename S::QueryPlace, S::kRows, dim>(args, cell, first, head, queries);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // A warpgroup multiplies together: it takes all tiles from the first to the last that any of its 64 rows sees.
  __shared__ Sight sights_of[S::kRows];
  __shared__ int prev_begin[groups], cur_end[groups];
  if (threadIdx.x < S::kRows) {
    const int r = first + static_cast<int>(threadIdx.x);
    Sight sight{cell.prev_rows, cell.cur_rows, 0, 0};
    if (r < cell.rows) sight = sight_of(args.batch.rows[cell.row + r]);
    sights_of[threadIdx.x] = sight;
  }
  __syncthreads();
  if (warp < groups) {
    const Sight &a = sights_of[warp * 64 + lane], &b = sights_of[warp * 64 + lane + 32];
    const int begins = __reduce_min_sync(0xffffffffu, min(a.prev_begin, b.prev_begin));
    const int ends = __reduce_max_sync(0xffffffffu, max(a.cur_end, b.cur_end));
    if (lane == 0) {
      prev_begin[warp] = begins;
      cur_end[warp] = ends;
    }
  }
  __syncthreads();
  const auto start_when_free = [&](int index) {
    wait_for(released[index % S::kStages], (index / S::kStages & 1) ^ 1);
    start(index);
  };
  uint32_t held[dim / 16][4];
#pragma unroll
  for (int k = 0; k < dim / 16; ++k) {
    load_matrices(held[k], queries + S::QueryPlace::at(warp * 16 + lane % 16, k * 16 + lane / 16 * 8));
  }
  int begin = 0, end = walk.count;
  const auto reaches = [&](int index) {
    return walk.reaches(walk.tile(index), prev_begin[warp / 4], cur_end[warp / 4]);
  };
  while (begin < end && !reaches(begin)) ++begin;
  while (begin < end && !reaches(end - 1)) --end;
  begin = __shfl_sync(0xffffffffu, begin, 0);
  end = __shfl_sync(0xffffffffu, end, 0);

  // Warpgroups walk over different tiles, so no barrier of the whole block may stand here.
  const auto await = [&](int index) {
    // This warp released the tile two before, whose place the one to come takes, on its way here.
    if (threadIdx.x == 0 && index + kLead < walk.count) start_when_free(index + kLead);
    __syncwarp();
    wait_for(arrived[index % S::kStages], index / S::kStages & 1);
  };
  const auto release = [&](int index) {
    __syncwarp();
    if (lane == 0) arrive(released[index % S::kStages]);
  };
  const auto pass = [&](int index) {
    await(index);
    release(index);
  };
  const auto take = [&](int index) {
    await(index);
    const Tile tile = walk.tile(index);
    if (tile.begin + kTile <= tile.limit) return;
    // Behind the end of the cache lies anything; a weight of zero would not hide a NaN. Each warpgroup that multiplies
    // the tile writes these zeros and meets only itself.
    T* tile_v = values + index % S::kStages * S::kTileElements;
    const int rows = tile.limit - tile.begin;
    for (int i = threadIdx.x % 128; i < (kTile - rows) * (dim / 8); i += 128) {
      const int r = rows + i / (dim / 8), d = i % (dim / 8) * 8;
      *reinterpret_cast<Pack<T>*>(tile_v + S::TilePlace::at(r, d)) = Pack<T>{};
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(1 + warp / 4) : "memory");
  };
  const float scale = score_scale(args, cell);
  Softmax<dim> softmax;
  Scores scores;
  uint32_t weights[kTile / 16][4];  // of the tile before, whose product with its values is still to come
  const auto multiply_keys = [&](int index) {
    const T* tile_k = keys + index % S::kStages * S::kTileElements;
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) {
      multiply<T, false>(scores, held[k], slab_descriptor(tile_k + k / 4 * kTile * 64 + k % 4 * 16), k > 0);
    }
    commit_products();
  };
  const auto multiply_values = [&](int index) {
    const T* tile_v = values + index % S::kStages * S::kTileElements;
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
#pragma unroll
      for (int slab = 0; slab < dim / 64; ++slab) {
        multiply<T, true>(softmax.out + slab * 8, weights[k], slab_descriptor(tile_v + slab * kTile * 64 + k * 16 * 64),
                          1);
      }
    }
    commit_products();
  };
  float keep[2];
  const auto weigh = [&](int index) {
    const Tile tile = walk.tile(index);
    if (!tile.full) {
      const Sight sights[2] = {sights_of[warp * 16 + lane / 4], sights_of[warp * 16 + lane / 4 + 8]};
      Softmax<dim>::mask(scores, cell, walk, tile, sights);
    }
    softmax.weigh(scores, scale, keep);
  };
  const auto pack = [&] {
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) Softmax<dim>::template left_operand<T>(scores, k, weights[k]);
  };

  for (int index = 0; index < begin; ++index) pass(index);
  if (begin < end) {
    take(begin);
    fence_products();
    multiply_keys(begin);
    wait_products<0>();
    weigh(begin);
    pack();
    for (int index = begin + 1; index < end; ++index) {
      take(index);
      fence_products();
      multiply_keys(index);
      // The values of the tile before are added while the exponentials of this one are taken.
      multiply_values(index - 1);
      wait_products<1>();
      weigh(index);
      wait_products<0>();
      release(index - 1);
      if (__any_sync(0xffffffffu, keep[0] != 1.0f || keep[1] != 1.0f)) softmax.shrink(keep);
      pack();
    }
    fence_products();
    multiply_values(end - 1);
    wait_products<0>();
    release(end - 1);
  }
  for (int index = end; index < walk.count; ++index) pass(index);
  const int rows[2] = {first + warp * 16 + lane / 4, first + warp * 16 + lane / 4 + 8};
  softmax.template store<T>(args, cell, rows, head);
#else
  __trap();  // built for 9.0 without its own instructions (90 instead of 90a)
#endif
}

template <class T, int dim, int groups>
bool launch(const AttendArgs& args, cudaStream_t stream) {
  using S = Shape<dim, groups>;
  const auto kernel = hopper_kernel<T, dim, groups>;
  static const bool runs = has_hopper_code(reinterpret_cast<const void*>(kernel));
  if (!runs) return false;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes), "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>(ceil_div(args.batch.max_cell_rows, S::kRows)), args.q_heads,
                  args.batch.cell_count);
  launch_overlapped(kernel, grid, dim3(S::kThreads), S::kBytes, stream, args);
  return true;
}

template <class T>
bool launch_type(const AttendArgs& args, cudaStream_t stream) {
  if (args.head_dim == 64) return launch<T, 64, 3>(args, stream);
  if (args.head_dim == 128) return launch<T, 128, 2>(args, stream);
  return false;
}

}  // namespace

bool launch_hopper(DType dtype, const AttendArgs& args, cudaStream_t stream) {
  if (dtype == DType::bf16) return launch_type<__nv_bfloat16>(args, stream);
  return launch_type<__half>(args, stream);
}

}  // namespace armt::cuda
