// Attention of many rows: a block holds 16 query rows a warp and walks over the visible tiles of 64 keys
// (arXiv 2205.14135, 2307.08691). Scores and sums are float32.
#include <cuda_runtime.h>

#include "attention.cuh"
#include "check.h"
#include "mma.cuh"

namespace armt::cuda {
namespace {

constexpr int kTile = 64;

template <int dim, int warps>
struct Shape {
  static constexpr int kRows = warps * 16;
  static constexpr int kThreads = warps * 32;
  static constexpr int kTileElements = kTile * dim;
  static constexpr int kBytes = (kRows * dim + 4 * kTileElements) * 2;
};

// What the tiles of a block have in common.
struct Bounds {
  int prev_first, cur_first, cur_end;     // some row sees from / up to here
  int prev_full, cur_full, cur_full_end;  // every row sees from / up to here
  int uniform;
};

// Query rows of the block into shared memory: [RMS norm], rotation.
template <class T, int dim, int warps>
__device__ void load_queries(const AttendArgs& args, const DevCell& cell, int first, int head, T* queries) {
  constexpr int kRows = Shape<dim, warps>::kRows, kThreads = Shape<dim, warps>::kThreads;
  const int c = args.head_dim;
  for (int i = threadIdx.x; i < kRows * (dim / 8); i += kThreads) {
    const int r = i / (dim / 8), d = i % (dim / 8) * 8;
    Pack<T> pack;
#pragma unroll
    for (int k = 0; k < 8; ++k) pack.v[k] = from_float<T>(0.0f);
    if (first + r < cell.rows && d < c) {
      const T* in = row_of<T>(args.qkv, cell, first + r) + head * c + d;
      if (c % 8 == 0) {
        pack = *reinterpret_cast<const Pack<T>*>(in);
      } else {
        for (int k = 0; k < 8 && d + k < c; ++k) pack.v[k] = in[k];
      }
    }
    *reinterpret_cast<Pack<T>*>(queries + swizzled<dim>(r, d)) = pack;
  }
  __syncthreads();
  if (args.half == 0 && args.q_norm == nullptr) return;
  const int lane = threadIdx.x % 32;
  const float* weight = args.q_norm != nullptr ? args.q_norm + static_cast<int64_t>(cell.stack) * c : nullptr;
  for (int r = threadIdx.x / 32; r < kRows && first + r < cell.rows; r += warps) {
    float scale = 1.0f;
    const auto at = [&](int d) -> T& { return queries[swizzled<dim>(r, d)]; };
    if (weight != nullptr) {
      float squares = 0.0f;
      for (int d = lane; d < c; d += 32) squares += to_float(at(d)) * to_float(at(d));
      scale = rsqrtf(warp_sum(squares) / static_cast<float>(c) + args.eps);
    }
    const auto value = [&](int d) { return to_float(at(d)) * (weight != nullptr ? scale * weight[d] : 1.0f); };
    const float2* turns = args.angles + static_cast<int64_t>(args.batch.rows[cell.row + first + r].angle) * args.half;
    for (int d = lane; d < args.half; d += 32) {
      const float a = value(d), b = value(d + args.half);
      at(d) = from_float<T>(a * turns[d].x - b * turns[d].y);
      at(d + args.half) = from_float<T>(b * turns[d].x + a * turns[d].y);
    }
    if (weight == nullptr) continue;
    for (int d = 2 * args.half + lane; d < c; d += 32) at(d) = from_float<T>(value(d));
  }
  __syncthreads();
}

// Starts the copy of one tile of keys and values; rows from `valid` on become zero.
template <class T, int dim, int threads>
__device__ void start_tile(const AttendArgs& args, const T* keys, int valid, T* to_keys, T* to_values) {
  const int64_t values_behind = static_cast<int64_t>(args.kv_heads) * args.page_rows * args.kv_row;
#pragma unroll
  for (int i = threadIdx.x; i < kTile * (dim / 8); i += threads) {
    const int r = i / (dim / 8), d = i % (dim / 8) * 8;
    const bool there = r < valid && d < args.kv_row;
    const T* from = keys + (there ? r * args.kv_row + d : 0);
    copy_async(to_keys + swizzled<dim>(r, d), from, there);
    copy_async(to_values + swizzled<dim>(r, d), from + (there ? values_behind : 0), there);
  }
}

template <class T, int dim, int warps>
__global__ void __launch_bounds__(warps * 32, dim <= 64 ? 16 / warps : 1) flash_kernel(AttendArgs args) {
  using S = Shape<dim, warps>;
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
  const int prev_rows = cell.prev_rows, cur_rows = cell.cur_rows;

  if (threadIdx.x == 0) bounds = {prev_rows, cur_rows, 0, 0, 0, cur_rows, 0};
  __syncthreads();
  for (int r = threadIdx.x; r < S::kRows && first + r < cell.rows; r += S::kThreads) {
    const Sight sight = sight_of(args.batch.rows[cell.row + first + r]);
    atomicMin(&bounds.prev_first, sight.prev_begin);
    atomicMin(&bounds.cur_first, sight.cur_begin);
    atomicMax(&bounds.cur_end, sight.cur_end);
    atomicMax(&bounds.prev_full, sight.prev_begin);
    atomicMax(&bounds.cur_full, sight.cur_begin);
    atomicMin(&bounds.cur_full_end, sight.cur_end);
    if (sight.flags & DevRow::kUniform) atomicOr(&bounds.uniform, 1);
  }
  load_queries<T, dim, warps>(args, cell, first, head, queries);
  __syncthreads();

  const bool uniform = bounds.uniform != 0;
  const int prev_tile = (uniform ? 0 : min(bounds.prev_first, prev_rows)) / kTile;
  const int prev_tiles = static_cast<int>(ceil_div(prev_rows, kTile));
  const int cur_tile = (uniform ? 0 : bounds.cur_first) / kTile;
  const int cur_tiles = static_cast<int>(ceil_div(uniform ? cur_rows : min(bounds.cur_end, cur_rows), kTile));
  const bool sees_previous = prev_rows > 0 && (uniform || bounds.prev_first < prev_rows);
  const int prev_count = sees_previous ? prev_tiles - prev_tile : 0;
  const int count = prev_count + max(0, cur_tiles - cur_tile);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows[2] = {first + warp * 16 + lane / 4, first + warp * 16 + lane / 4 + 8};
  Sight sights[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sights[i] = {prev_rows, cur_rows, 0, 0};
    if (rows[i] < cell.rows) sights[i] = sight_of(args.batch.rows[cell.row + rows[i]]);
  }

  const auto start = [&](int index) {
    const bool previous = index < prev_count;
    const int tile = previous ? prev_tile + index : cur_tile + index - prev_count;
    const int valid = min(kTile, (previous ? prev_rows : cur_rows) - tile * kTile);
    const int stage = index % 2 * S::kTileElements;
    start_tile<T, dim, S::kThreads>(args, tile_keys<T>(args, cell, previous, tile, kv_head), valid, keys + stage,
                                    values + stage);
  };
  if (count > 0) start(0);
  commit_copies();

  uint32_t held[kHoldQueries ? dim / 16 : 1][4];
  const auto load_query = [&](uint32_t (&out)[4], int k) {
    load_matrices(out, queries + swizzled<dim>(warp * 16 + lane % 16, k * 16 + lane / 16 * 8));
  };
  if constexpr (kHoldQueries) {
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) load_query(held[k], k);
  }

  constexpr float kLog2e = 1.4426950408889634f;
  const float scale = args.scale * kLog2e / (args.by_layer ? static_cast<float>(cell.layer + 1) : 1.0f);
  float out[dim / 8][4];
#pragma unroll
  for (int n = 0; n < dim / 8; ++n) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.0f;
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

  for (int index = 0; index < count; ++index) {
    if (index + 1 < count) start(index + 1);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    const bool previous = index < prev_count;
    const int tile = previous ? prev_tile + index : cur_tile + index - prev_count;
    const int begin = tile * kTile, limit = previous ? prev_rows : cur_rows;
    const T* tile_k = keys + index % 2 * S::kTileElements;
    const T* tile_v = values + index % 2 * S::kTileElements;

    const bool masks = uniform || (previous ? cell.prev_visible : cell.visible) != nullptr;
    const bool full =
        !masks && begin + kTile <= limit &&
        (previous ? begin >= bounds.prev_full : begin >= bounds.cur_full && begin + kTile <= bounds.cur_full_end);
    // A tile behind all of this warp's rows adds nothing.
    const bool some = full || masks ||
                      __any_sync(0xffffffffu, previous ? begin + kTile > min(sights[0].prev_begin, sights[1].prev_begin)
                                                       : begin < max(sights[0].cur_end, sights[1].cur_end));
    if (some) {
      float scores[kTile / 8][4];
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
#pragma unroll
      for (int k = 0; k < dim / 16; ++k) {
        uint32_t loaded[4];
        if constexpr (!kHoldQueries) load_query(loaded, k);
        uint32_t (&query)[4] = kHoldQueries ? held[kHoldQueries ? k : 0] : loaded;
#pragma unroll
        for (int n = 0; n < kTile / 16; ++n) {
          uint32_t b[4];
          load_matrices(b, tile_k + swizzled<dim>(n * 16 + lane / 16 * 8 + lane % 8, k * 16 + lane / 8 % 2 * 8));
          multiply_add<T>(scores[2 * n], query, b[0], b[1]);
          multiply_add<T>(scores[2 * n + 1], query, b[2], b[3]);
        }
      }
      if (!full) {
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int col = begin + n * 8 + lane % 4 * 2 + e % 2;
            const Sight& sight = sights[e / 2];
            if (col >= limit || !sees(sight, cell, previous, col)) {
              scores[n][e] = -INFINITY;
            } else if (sight.flags & DevRow::kUniform) {
              scores[n][e] = 0.0f;
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float highest = most[i];
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) highest = fmaxf(highest, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        const float shift = highest == -INFINITY ? 0.0f : highest * scale;
        const float keep = exp2f(most[i] * scale - shift);
        most[i] = highest;
        total[i] *= keep;
#pragma unroll
        for (int n = 0; n < dim / 8; ++n) {
          out[n][2 * i] *= keep;
          out[n][2 * i + 1] *= keep;
        }
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; ++e) {
            scores[n][e] = exp2f(scores[n][e] * scale - shift);
            total[i] += scores[n][e];
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) {
        const uint32_t weights[4] = {pack_pair<T>(scores[2 * k][0], scores[2 * k][1]),
                                     pack_pair<T>(scores[2 * k][2], scores[2 * k][3]),
                                     pack_pair<T>(scores[2 * k + 1][0], scores[2 * k + 1][1]),
                                     pack_pair<T>(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < dim / 16; ++n) {
          uint32_t b[4];
          load_matrices_transposed(
              b, tile_v + swizzled<dim>(k * 16 + lane / 8 % 2 * 8 + lane % 8, n * 16 + lane / 16 * 8));
          multiply_add<T>(out[2 * n], weights, b[0], b[1]);
          multiply_add<T>(out[2 * n + 1], weights, b[2], b[3]);
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = total[i];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (rows[i] >= cell.rows) continue;
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    T* to = row_of<T>(args.context, cell, rows[i]) + head * args.head_dim;
#pragma unroll
    for (int n = 0; n < dim / 8; ++n) {
      const int d = n * 8 + lane % 4 * 2;
      const float a = out[n][2 * i] * inverse, b = out[n][2 * i + 1] * inverse;
      if (args.head_dim % 2 == 0) {
        if (d < args.head_dim) *reinterpret_cast<uint32_t*>(to + d) = pack_pair<T>(a, b);
      } else {
        if (d < args.head_dim) to[d] = from_float<T>(a);
        if (d + 1 < args.head_dim) to[d + 1] = from_float<T>(b);
      }
    }
  }
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
