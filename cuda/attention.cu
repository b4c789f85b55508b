// Attention: choice of the kernel, and the one for few rows (decoding) and for float32. A block takes one query row and
// all query heads of one key head over its share of the keys; the last block of a row to finish joins the shares.
#include <algorithm>
#include <cmath>

#include "attention.cuh"
#include "check.h"
#include "workspace.h"

namespace armt::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kThreads = 128;

// Shared memory of few_kernel, in floats, heads = query heads per key head.
struct FewLayout {
  int heads, dim;
  __host__ __device__ int queries() const { return 0; }
  __host__ __device__ int sums() const { return heads * dim; }
  __host__ __device__ int scores() const { return 2 * heads * dim; }
  __host__ __device__ int state() const { return scores() + heads * kTile; }  // most, total, keep of each head
  __host__ __device__ int floats() const { return state() + 3 * heads; }
};

// Of a query with key r of a tile.
template <class T>
__device__ float dot(const AttendArgs& args, const float* query, const T* keys, int r) {
  constexpr int kCount = Pack<T>::kCount;
  const int dim = args.head_dim;
  const auto at = [&](int d) { return keys + kv_at(r, d, args.kv_row, args.page_rows); };
  float sum = 0.0f;
  int d = 0;
  for (; d + kCount <= dim; d += kCount) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(at(d));
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum += query[d + k] * to_float(pack.v[k]);
  }
  for (; d < dim; ++d) sum += query[d] * to_float(*at(d));
  return sum;
}

template <class T>
__device__ void load_row_queries(const AttendArgs& args, const DevCell& cell, const DevRow& row, const T* in,
                                 const FewLayout& layout, float* queries) {
  const int lane = threadIdx.x % 32, dim = layout.dim;
  const float* weight = args.q_norm != nullptr ? args.q_norm + static_cast<int64_t>(cell.stack) * dim : nullptr;
  const float2* turns = args.angles + static_cast<int64_t>(row.angle) * args.half;
  for (int g = threadIdx.x / 32; g < layout.heads; g += kThreads / 32) {
    const T* head = in + g * dim;
    float scale = 1.0f;
    if (weight != nullptr) {
      float squares = 0.0f;
      for (int d = lane; d < dim; d += 32) squares += to_float(head[d]) * to_float(head[d]);
      scale = rsqrtf(warp_sum(squares) / static_cast<float>(dim) + args.eps);
    }
    const auto value = [&](int d) { return to_float(head[d]) * (weight != nullptr ? scale * weight[d] : 1.0f); };
    for (int d = lane; d < dim; d += 32) {
      float x = value(d);
      if (d < args.half) {
        x = x * turns[d].x - value(d + args.half) * turns[d].y;
      } else if (d < 2 * args.half) {
        x = x * turns[d - args.half].x + value(d - args.half) * turns[d - args.half].y;
      }
      queries[g * dim + d] = x;
    }
  }
}

// Adds one tile of keys to the running sums of all heads.
template <class T>
__device__ void add_tile(const AttendArgs& args, const DevCell& cell, const Sight& sight, bool previous, int tile,
                         int kv_head, float scale, const FewLayout& layout, float* memory) {
  float* scores = memory + layout.scores();
  float* sums = memory + layout.sums();
  float* state = memory + layout.state();
  const float* queries = memory + layout.queries();
  const T* keys = tile_keys<T>(args, cell, previous, tile, kv_head);
  const T* values = keys + static_cast<int64_t>(args.kv_heads) * args.page_rows * args.kv_row;
  const int begin = tile * kTile, limit = min(kTile, (previous ? cell.prev_rows : cell.cur_rows) - begin);
  const int lane = threadIdx.x % 32, dim = layout.dim;
  for (int i = threadIdx.x; i < layout.heads * kTile; i += kThreads) {
    const int key = i % kTile;
    float score = -INFINITY;
    if (key < limit && sees(sight, cell, previous, begin + key)) {
      const bool uniform = (sight.flags & DevRow::kUniform) != 0;
      score = uniform ? 0.0f : scale * dot(args, queries + i / kTile * dim, keys, key);
    }
    scores[i] = score;
  }
  __syncthreads();
  for (int g = threadIdx.x / 32; g < layout.heads; g += kThreads / 32) {
    float* mine = scores + g * kTile;
    const float most = state[3 * g];
    const float highest = fmaxf(most, warp_max(fmaxf(mine[lane], mine[lane + 32])));
    const float shift = highest == -INFINITY ? 0.0f : highest;
    const float a = expf(mine[lane] - shift), b = expf(mine[lane + 32] - shift);
    mine[lane] = a;
    mine[lane + 32] = b;
    const float sum = warp_sum(a + b), keep = expf(most - shift);
    __syncwarp();
    if (lane == 0) {
      state[3 * g] = highest;
      state[3 * g + 1] = state[3 * g + 1] * keep + sum;
      state[3 * g + 2] = keep;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < layout.heads * dim; i += kThreads) {
    const int g = i / dim, d = i % dim;
    float sum = sums[i] * state[3 * g + 2];
    for (int key = 0; key < limit; ++key) {
      sum += scores[g * kTile + key] * to_float(values[kv_at(key, d, args.kv_row, args.page_rows)]);
    }
    sums[i] = sum;
  }
  __syncthreads();
}

// grid: rows of all cells, key heads, splits
template <class T>
__global__ void __launch_bounds__(kThreads) few_kernel(AttendArgs args) {
  const DevCell& cell = args.batch.cells[blockIdx.x / args.batch.max_cell_rows];
  const int r = blockIdx.x % args.batch.max_cell_rows;
  if (r >= cell.rows) return;
  const int kv_head = blockIdx.y;
  const FewLayout layout{args.q_heads / args.kv_heads, args.head_dim};
  extern __shared__ float shared[];
  const int first_head = kv_head * layout.heads, dim = layout.dim;
  const DevRow& row = args.batch.rows[cell.row + r];
  const Sight sight = sight_of(row);
  for (int i = threadIdx.x; i < layout.heads * dim; i += kThreads) shared[layout.sums() + i] = 0.0f;
  for (int i = threadIdx.x; i < layout.heads; i += kThreads) {
    shared[layout.state() + 3 * i] = -INFINITY;
    shared[layout.state() + 3 * i + 1] = 0.0f;
  }
  load_row_queries(args, cell, row, row_of<T>(args.qkv, cell, r) + first_head * dim, layout, shared);
  __syncthreads();

  const bool uniform = (sight.flags & DevRow::kUniform) != 0;
  const int prev_tiles = static_cast<int>(ceil_div(cell.prev_rows, kTile));
  const int prev_first = uniform ? 0 : min(sight.prev_begin / kTile, prev_tiles);
  const int cur_first = uniform ? 0 : sight.cur_begin / kTile;
  const int cur_tiles = static_cast<int>(ceil_div(uniform ? cell.cur_rows : min(sight.cur_end, cell.cur_rows), kTile));
  const int prev_count = prev_tiles - prev_first, count = prev_count + max(0, cur_tiles - cur_first);
  const float scale = args.scale / (args.by_layer ? static_cast<float>(cell.layer + 1) : 1.0f);
  for (int i = blockIdx.z; i < count; i += args.splits) {
    const bool previous = i < prev_count;
    add_tile<T>(args, cell, sight, previous, previous ? prev_first + i : cur_first + i - prev_count, kv_head, scale,
                layout, shared);
  }

  const float* state = shared + layout.state();
  const float* sums = shared + layout.sums();
  T* out = row_of<T>(args.context, cell, r) + first_head * dim;
  if (args.splits == 1) {
    for (int i = threadIdx.x; i < layout.heads * dim; i += kThreads) {
      const float total = state[3 * (i / dim) + 1];
      out[i] = from_float<T>(total > 0.0f ? sums[i] / total : 0.0f);
    }
    return;
  }
  const int64_t share = dim + 2;
  float* partial = args.partial + (static_cast<int64_t>(blockIdx.x) * args.q_heads + first_head) * args.splits * share;
  for (int i = threadIdx.x; i < layout.heads * dim; i += kThreads) {
    partial[(i / dim * args.splits + blockIdx.z) * share + 2 + i % dim] = sums[i];
  }
  for (int g = threadIdx.x; g < layout.heads; g += kThreads) {
    partial[(g * args.splits + blockIdx.z) * share] = state[3 * g];
    partial[(g * args.splits + blockIdx.z) * share + 1] = state[3 * g + 1];
  }
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  int* counter = args.counters + blockIdx.x * args.kv_heads + kv_head;
  if (threadIdx.x == 0) last = atomicAdd(counter, 1) == args.splits - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0) *counter = 0;
  for (int i = threadIdx.x; i < layout.heads * dim; i += kThreads) {
    const volatile float* shares = partial + static_cast<int64_t>(i / dim) * args.splits * share;
    float highest = -INFINITY;
    for (int s = 0; s < args.splits; ++s) highest = fmaxf(highest, shares[s * share]);
    float total = 0.0f, sum = 0.0f;
    for (int s = 0; s < args.splits && highest > -INFINITY; ++s) {
      const float weight = expf(shares[s * share] - highest);
      total += weight * shares[s * share + 1];
      sum += weight * shares[s * share + 2 + i % dim];
    }
    out[i] = from_float<T>(total > 0.0f ? sum / total : 0.0f);
  }
}

}  // namespace

void launch_few(DType dtype, const AttendArgs& args, cudaStream_t stream) {
  const FewLayout layout{args.q_heads / args.kv_heads, args.head_dim};
  const auto bytes = static_cast<int>(layout.floats() * sizeof(float));
  const dim3 grid(static_cast<unsigned>(args.batch.cell_count) * args.batch.max_cell_rows, args.kv_heads, args.splits);
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (bytes > 48 * 1024) {
      check(cudaFuncSetAttribute(few_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
            "cudaFuncSetAttribute");
    }
    few_kernel<T><<<grid, kThreads, bytes, stream>>>(args);
  });
  check_launch("attention of few rows");
}

void CudaBackend::attend(Groups groups, const Rows& qkv, const Rows& context) {
  const Entry entry(*this);
  const Part part = part_of(groups);
  if (part.batch.max_cell_rows == 0) return;
  const DecoderConfig& decoder = config_.decoder;
  AttendArgs args;
  args.batch = part.batch;
  args.qkv = view(qkv);
  args.context = view(context);
  args.angles = active_.workspace->angles.as<float2>();
  args.q_norm = vectors_[static_cast<size_t>(Vector::q_norm)].as<float>();
  args.q_heads = static_cast<int>(decoder.n_heads);
  args.kv_heads = static_cast<int>(decoder.n_kv_heads);
  args.head_dim = static_cast<int>(decoder.head_dim);
  args.kv_row = static_cast<int>(kv_row());
  args.page_rows = static_cast<int>(kv_page_rows());
  args.half = static_cast<int>(decoder.rotary_dims / 2);
  args.scale = static_cast<float>(
      decoder.attention_scale > 0.0 ? decoder.attention_scale : 1.0 / std::sqrt(static_cast<double>(decoder.head_dim)));
  args.by_layer = decoder.scale_by_inverse_layer;
  args.eps = static_cast<float>(decoder.norm_eps);

  constexpr int kFewRows = 16;
  if (dtype_ != DType::f32 && args.batch.max_cell_rows > kFewRows) {
    constexpr int kManyRows = 64;
    if (args.batch.max_cell_rows > kManyRows && launch_hopper(dtype_, args, stream())) return;
    launch_flash(dtype_, args, stream());
    return;
  }
  // Shares of the keys, so that a few rows fill the chip.
  const int64_t rows = int64_t{args.batch.cell_count} * args.batch.max_cell_rows;
  const int64_t blocks = rows * args.kv_heads, wanted = 2 * processors_;
  if (blocks < wanted) {
    args.splits = static_cast<int>(std::clamp<int64_t>(wanted / blocks, 1, ceil_div(args.batch.max_keys, kTile)));
  }
  if (args.splits > 1) {
    const int64_t floats = rows * args.q_heads * args.splits * (args.head_dim + 2);
    const int64_t counters = rows * args.kv_heads;
    CudaScratch& scratch = *active_.scratch;
    grow(arena_, scratch.partial, floats * 4);
    if (scratch.counters.bytes() < counters * 4) {  // zero again after each launch
      grow(arena_, scratch.counters, counters * 4);
      check(cudaMemsetAsync(scratch.counters.data(), 0, static_cast<size_t>(scratch.counters.bytes()), stream()),
            "cudaMemsetAsync");
    }
    args.partial = scratch.partial.as<float>();
    args.counters = scratch.counters.as<int>();
  }
  launch_few(dtype_, args, stream());
}

}  // namespace armt::cuda
