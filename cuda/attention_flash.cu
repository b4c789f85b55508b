// Attention of many rows for any GPU and head size: a block holds 16 query rows a warp and walks over the visible tiles
// of 64 keys. Scores and sums are float32.
#include <cuda_runtime.h>

#include "attention_tiles.cuh"
#include "check.h"

namespace armt::cuda {
namespace {

template <int dim, int warps>
struct Shape {
  static constexpr int kRows = warps * 16;
  static constexpr int kThreads = warps * 32;
  static constexpr int kTileElements = kTile * dim;
  static constexpr int kBytes = (kRows * dim + 4 * kTileElements) * 2;
};

template <class T, int dim, int warps>
__global__ void __launch_bounds__(warps * 32, dim <= 64 ? 16 / warps : 1) flash_kernel(AttendArgs args) {
  using S = Shape<dim, warps>;
  using Place = RowPlace<dim>;
  constexpr bool kHoldQueries = dim <= 64;
  const DevCell& cell = args.batch.cells[blockIdx.z];
  const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * S::kRows;  // the longest blocks start first
  if (first >= cell.rows) return;
  const int head = blockIdx.y, kv_head = head * args.kv_heads / args.q_heads;
  extern __shared__ __align__(128) unsigned char memory[];
  T* queries = reinterpret_cast<T*>(memory);
  T* keys = queries + S::kRows * dim;       // [2][64, dim]
  T* values = keys + 2 * S::kTileElements;  // [2][64, dim]
  __shared__ Bounds bounds;
  find_bounds(args, cell, first, S::kRows, bounds);
  load_queries<T, Place, S::kRows, dim>(args, cell, first, head, queries);
  __syncthreads();
  const Walk walk(cell, bounds);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int rows[2];
  Sight sights[2];
  find_rows(args, cell, first, rows, sights);
  const int prev_begin = min(sights[0].prev_begin, sights[1].prev_begin);
  const int cur_end = max(sights[0].cur_end, sights[1].cur_end);

  const auto start = [&](int index) {
    const int stage = index % 2 * S::kTileElements;
    start_tile<T, Place, dim, S::kThreads>(args, walk, walk.tile(index), kv_head, keys + stage, values + stage);
  };
  if (walk.count > 0) start(0);
  commit_copies();

  uint32_t held[kHoldQueries ? dim / 16 : 1][4];
  const auto load_query = [&](uint32_t (&out)[4], int k) {
    load_matrices(out, queries + Place::at(warp * 16 + lane % 16, k * 16 + lane / 16 * 8));
  };
  if constexpr (kHoldQueries) {
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) load_query(held[k], k);
  }

  const float scale = score_scale(args, cell);
  Softmax<dim> softmax;
  for (int index = 0; index < walk.count; ++index) {
    if (index + 1 < walk.count) start(index + 1);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    const Tile tile = walk.tile(index);
    const T* tile_k = keys + index % 2 * S::kTileElements;
    const T* tile_v = values + index % 2 * S::kTileElements;
    if (__any_sync(0xffffffffu, walk.reaches(tile, prev_begin, cur_end))) {
      Scores scores = {};
#pragma unroll
      for (int k = 0; k < dim / 16; ++k) {
        uint32_t loaded[4];
        if constexpr (!kHoldQueries) load_query(loaded, k);
        uint32_t (&query)[4] = kHoldQueries ? held[kHoldQueries ? k : 0] : loaded;
#pragma unroll
        for (int n = 0; n < kTile / 16; ++n) {
          uint32_t b[4];
          load_matrices(b, tile_k + Place::at(n * 16 + lane / 16 * 8 + lane % 8, k * 16 + lane / 8 % 2 * 8));
          multiply_add<T>(scores[2 * n], query, b[0], b[1]);
          multiply_add<T>(scores[2 * n + 1], query, b[2], b[3]);
        }
      }
      const bool by_row = tile.previous ? walk.masks_prev : walk.masks_cur;
      if (!tile.full) Softmax<dim>::mask(scores, cell, by_row, tile, sights);
      float keep[2];
      softmax.weigh(scores, scale, keep);
      softmax.shrink(keep);
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) {
        uint32_t weights[4];
        Softmax<dim>::template left_operand<T>(scores, k, weights);
#pragma unroll
        for (int n = 0; n < dim / 16; ++n) {
          uint32_t b[4];
          load_matrices_transposed(b, tile_v + Place::at(k * 16 + lane / 8 % 2 * 8 + lane % 8, n * 16 + lane / 16 * 8));
          multiply_add<T>(softmax.out[2 * n], weights, b[0], b[1]);
          multiply_add<T>(softmax.out[2 * n + 1], weights, b[2], b[3]);
        }
      }
    }
    __syncthreads();
  }
  softmax.template store<T>(args, cell, rows, head);
}

template <class T, int dim, int warps>
void launch(const AttendArgs& args, cudaStream_t stream) {
  using S = Shape<dim, warps>;
  const auto kernel = flash_kernel<T, dim, warps>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes), "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>(ceil_div(args.batch.max_cell_rows, S::kRows)), args.q_heads,
                  args.batch.cell_count);
  kernel<<<grid, S::kThreads, S::kBytes, stream>>>(args);
  check_launch("flash attention");
}

template <class T>
void launch_type(const AttendArgs& args, cudaStream_t stream) {
  const bool small = args.batch.max_cell_rows <= 64;
  if (args.head_dim <= 32) return small ? launch<T, 32, 4>(args, stream) : launch<T, 32, 8>(args, stream);
  if (args.head_dim <= 64) return small ? launch<T, 64, 4>(args, stream) : launch<T, 64, 8>(args, stream);
  if (args.head_dim <= 128) return small ? launch<T, 128, 4>(args, stream) : launch<T, 128, 8>(args, stream);
  return launch<T, 256, 4>(args, stream);
}

}  // namespace

void launch_flash(DType dtype, const AttendArgs& args, cudaStream_t stream) {
  if (dtype == DType::bf16) return launch_type<__nv_bfloat16>(args, stream);
  launch_type<__half>(args, stream);
}

}  // namespace armt::cuda
