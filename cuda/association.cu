// The associative memory: read and write (armt-math, sections 3 to 5; arXiv 2407.04841, 2102.11174).
//
// Read:  queries of all rows by one product; a warp a row turns them into features phi / (z . phi + 1e-5); then
//        x += phi A by matrix instructions (bfloat16 operands, or float32 throughout for float32 weights).
// Write: key, value and gate of the memory rows by one product; features, denominators, gamma and beta by a warp a row;
//        delta = beta (v - phi A / den); A' = A + phi^T delta; z' = z + sum gamma phi.
#include <cuda_runtime.h>

#include <algorithm>

#include "check.h"
#include "tile_product.cuh"
#include "workspace.h"

namespace armt::cuda {
namespace {

constexpr int kWarps = 4;

struct MemoryShape {
  int heads = 0, features = 0, padded = 0;  // h, F, F padded to 8
  int values = 0;                           // E
  int keys = 0;                             // d_mem / h
  int rolls = 0;
  int width = 0;          // D
  int raw = 0, gate = 0;  // row of the write's product, and where its gate begins
  bool normalise = false, denominator = false, correction = false, paper = false, gating = false;

  __host__ __device__ int64_t matrix() const { return static_cast<int64_t>(features) * values; }
  __device__ const float* normaliser(const float* memory, int head) const {
    return memory + heads * matrix() + static_cast<int64_t>(head) * features;
  }
};

// u = (max(x, 0), max(-x, 0)), by one warp.
__device__ void split_signs(const float* x, int n, float* u) {
  __syncwarp();
  for (int i = threadIdx.x % 32; i < n; i += 32) {
    u[i] = fmaxf(x[i], 0.0f);
    u[n + i] = fmaxf(-x[i], 0.0f);
  }
  __syncwarp();
}

// Calls body(f, phi_f) for this lane's features: block j of the map is u times u rolled right by j, j = 1 .. rolls.
template <class Body>
__device__ void each_feature(const float* u, const MemoryShape& shape, const Body& body) {
  const int length = 2 * shape.keys;
  for (int j = 1; j <= shape.rolls; ++j) {
    const int turn = j % length, first = (j - 1) * length;
    for (int i = threadIdx.x % 32; i < length; i += 32) {
      const int other = i - turn;
      body(first + i, u[i] * u[other < 0 ? other + length : other]);
    }
  }
}

// The map times `scale`, with zeros behind it up to the padded length.
template <class To>
__device__ void store_features(const float* u, const MemoryShape& shape, float scale, To* out) {
  each_feature(u, shape, [&](int f, float x) { out[f] = from_float<To>(x * scale); });
  const int rest = shape.padded - shape.features, lane = threadIdx.x % 32;
  if (lane < rest) out[shape.features + lane] = from_float<To>(0.0f);
}

// 1, or 1 / max(|phi|, 1e-12).
__device__ inline float feature_scale(const MemoryShape& shape, float squares) {
  return shape.normalise ? 1.0f / fmaxf(sqrtf(squares), 1e-12f) : 1.0f;
}

template <class To>
__global__ void read_features(Batch batch, const float* queries, To* phi, MemoryShape shape) {
  extern __shared__ float shared[];
  const DevGroup& group = batch.groups[blockIdx.y];
  const int warp = threadIdx.x / 32;
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (r >= group.rows) return;
  const float* memory = cell_of(batch, group, r).memory;
  if (memory == nullptr) return;
  const int n = shape.keys;
  float* u = shared + warp * 2 * n;
  for (int h = 0; h < shape.heads; ++h) {
    split_signs(queries + ((group.scratch + r) * shape.heads + h) * n, n, u);
    const float* z = shape.normaliser(memory, h);
    float squares = 0.0f, den = 0.0f;
    each_feature(u, shape, [&](int f, float x) {
      squares += x * x;
      if (shape.denominator) den += x * z[f];
    });
    float scale = feature_scale(shape, warp_sum(squares));
    if (shape.denominator) scale /= warp_sum(den) * scale + 1e-5f;
    store_features(u, shape, scale, phi + ((group.scratch + r) * shape.heads + h) * shape.padded);
  }
}

// x += phi A, float32 throughout. grid: columns of all heads, rows, cells
__global__ void read_exact(Batch batch, const float* phi, View x, MemoryShape shape, int column_tiles) {
  __shared__ TileProduct::Shared shared;
  const DevCell& cell = batch.cells[blockIdx.z];
  const int first = blockIdx.y * TileProduct::kTile;
  if (cell.memory == nullptr || first >= cell.rows) return;
  const int h = blockIdx.x / column_tiles;
  const float* matrix = cell.memory + h * shape.matrix();
  tile_product<true, false>(
      shared, first, blockIdx.x % column_tiles * TileProduct::kTile, cell.rows, shape.values, shape.features,
      [&](int r, int f) { return phi[((cell.scratch + r) * shape.heads + h) * shape.padded + f]; },
      [&](int f, int e) { return matrix[static_cast<int64_t>(f) * shape.values + e]; },
      [&](int r, int e, float sum) { row_of<float>(x, cell, r)[h * shape.values + e] += sum; });
}

// The same by bfloat16 matrix instructions: a block makes 128 rows by 128 columns, 8 warps of 32 x 64.
template <class T>
__global__ void __launch_bounds__(256, 2)
    read_mma(Batch batch, const __nv_bfloat16* phi, View x, MemoryShape shape, int column_tiles) {
  using Half = __nv_bfloat16;
  constexpr int kRows = 128, kCols = 128, kDepth = 32;
  __shared__ alignas(128) Half tile_phi[2][kRows * kDepth];
  __shared__ alignas(128) Half tile_a[2][kDepth * kCols];
  const DevCell& cell = batch.cells[blockIdx.z];
  const int first = blockIdx.y * kRows;
  if (cell.memory == nullptr || first >= cell.rows) return;
  const int h = blockIdx.x / column_tiles, first_col = blockIdx.x % column_tiles * kCols;
  const float* matrix = cell.memory + h * shape.matrix();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const bool fours = shape.values % 4 == 0;
  const int steps = static_cast<int>(ceil_div(shape.padded, kDepth));

  const auto start_phi = [&](int step) {
#pragma unroll
    for (int i = thread; i < kRows * kDepth / 8; i += 256) {
      const int r = i / (kDepth / 8), d = i % (kDepth / 8) * 8, f = step * kDepth + d;
      const bool there = first + r < cell.rows && f < shape.padded;
      const Half* from = phi + ((cell.scratch + (there ? first + r : 0)) * shape.heads + h) * shape.padded;
      copy_async(tile_phi[step % 2] + swizzled<kDepth>(r, d), from + (there ? f : 0), there);
    }
    commit_copies();
  };
  // Chunks of 8 columns of A on their way to shared memory.
  constexpr int kChunks = kDepth * kCols / 8 / 256;
  float fetched[kChunks][8];
  const auto fetch_a = [&](int step) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int i = c * 256 + thread, f = step * kDepth + i / (kCols / 8), e = first_col + i % (kCols / 8) * 8;
      const float* from = matrix + static_cast<int64_t>(f) * shape.values + e;
#pragma unroll
      for (int k = 0; k < 8; ++k) fetched[c][k] = 0.0f;
      if (f >= shape.features) continue;
      if (fours) {
#pragma unroll
        for (int k = 0; k < 8; k += 4) {
          if (e + k >= shape.values) continue;
          const float4 four = *reinterpret_cast<const float4*>(from + k);
          fetched[c][k] = four.x, fetched[c][k + 1] = four.y, fetched[c][k + 2] = four.z, fetched[c][k + 3] = four.w;
        }
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          if (e + k < shape.values) fetched[c][k] = from[k];
        }
      }
    }
  };
  const auto store_a = [&](int step) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int i = c * 256 + thread;
      uint4 chunk;
      chunk.x = pack_pair<Half>(fetched[c][0], fetched[c][1]);
      chunk.y = pack_pair<Half>(fetched[c][2], fetched[c][3]);
      chunk.z = pack_pair<Half>(fetched[c][4], fetched[c][5]);
      chunk.w = pack_pair<Half>(fetched[c][6], fetched[c][7]);
      *reinterpret_cast<uint4*>(tile_a[step % 2] + swizzled<kCols>(i / (kCols / 8), i % (kCols / 8) * 8)) = chunk;
    }
  };

  float sum[2][8][4] = {};
  start_phi(0);
  fetch_a(0);
  store_a(0);
  for (int step = 0; step < steps; ++step) {
    wait_copies<0>();
    __syncthreads();
    if (step + 1 < steps) {
      start_phi(step + 1);
      fetch_a(step + 1);
    }
    const Half* left = tile_phi[step % 2];
    const Half* right = tile_a[step % 2];
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_matrices(a[m], left + swizzled<kDepth>(warp / 2 * 32 + m * 16 + lane % 16, k + lane / 16 * 8));
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[4];
        load_matrices_transposed(
            b, right + swizzled<kCols>(k + lane / 8 % 2 * 8 + lane % 8, warp % 2 * 64 + n * 16 + lane / 16 * 8));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<Half>(sum[m][2 * n], a[m], b[0], b[1]);
          multiply_add<Half>(sum[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
    if (step + 1 < steps) store_a(step + 1);
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = first + warp / 2 * 32 + m * 16 + half * 8 + lane / 4;
      if (r >= cell.rows) continue;
      T* row = row_of<T>(x, cell, r) + h * shape.values;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int e = first_col + warp % 2 * 64 + n * 8 + lane % 4 * 2;
        const float p = sum[m][n][2 * half], q = sum[m][n][2 * half + 1];
        if (shape.values % 2 == 0) {
          if (e >= shape.values) continue;
          uint32_t& pair = *reinterpret_cast<uint32_t*>(row + e);
          const T* both = reinterpret_cast<const T*>(&pair);
          pair = pack_pair<T>(to_float(both[0]) + p, to_float(both[1]) + q);
        } else {
          if (e < shape.values) row[e] = from_float<T>(to_float(row[e]) + p);
          if (e + 1 < shape.values) row[e + 1] = from_float<T>(to_float(row[e + 1]) + q);
        }
      }
    }
  }
}

// The rows that write, one after another. grid: memory rows, cells
template <class T>
__global__ void gather_writers(Batch batch, View x, T* out, int width) {
  const DevCell& cell = batch.cells[blockIdx.y];
  if (cell.next_memory == nullptr || blockIdx.x >= cell.write_rows) return;
  const T* from = row_of<T>(x, cell, cell.rows - cell.write_rows + blockIdx.x);
  T* to = out + (static_cast<int64_t>(cell.writer) * cell.write_rows + blockIdx.x) * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

// phi_t, 1 / den_t and gamma_t of each memory row, and beta = sigmoid in place of the gate. grid: memory rows / 4,
// cells
__global__ void write_features(Batch batch, float* raw, float* phi, float* coef, const float* gate_bias,
                               MemoryShape shape) {
  extern __shared__ float shared[];
  const DevCell& cell = batch.cells[blockIdx.y];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int t = blockIdx.x * kWarps + warp;
  if (cell.next_memory == nullptr || t >= cell.write_rows) return;
  const int64_t row = static_cast<int64_t>(cell.writer) * cell.write_rows + t;
  float* mine = raw + row * shape.raw;
  const int gates = shape.gating ? shape.width : shape.heads, n = shape.keys;
  for (int i = lane; i < gates; i += 32) {
    const float x = mine[shape.gate + i] + gate_bias[static_cast<int64_t>(cell.stack) * gates + i];
    mine[shape.gate + i] = 1.0f / (1.0f + expf(-x));
  }
  float* u = shared + warp * 2 * n;
  for (int h = 0; h < shape.heads; ++h) {
    split_signs(mine + h * n, n, u);
    const bool divides = shape.denominator && cell.memory != nullptr;
    const float* z = divides ? shape.normaliser(cell.memory, h) : nullptr;
    float squares = 0.0f, den = 0.0f;
    each_feature(u, shape, [&](int f, float x) {
      squares += x * x;
      if (divides) den += x * z[f];
    });
    squares = warp_sum(squares);
    const float scale = feature_scale(shape, squares);
    den = warp_sum(den) * scale + 1e-5f;
    squares *= scale * scale;
    float gamma = 1.0f;
    if (divides && shape.correction) {
      gamma = 1.0f - den / (squares + (shape.paper ? 1e-5f : 0.0f));
      gamma = fminf(fmaxf(gamma, 0.0f), 1.0f);
    }
    store_features(u, shape, scale, phi + (row * shape.heads + h) * shape.padded);
    if (lane == 0) {
      coef[(row * shape.heads + h) * 2] = cell.memory == nullptr ? 0.0f : divides ? 1.0f / den : 1.0f;
      coef[(row * shape.heads + h) * 2 + 1] = gamma;
    }
  }
}

// delta = beta (v - phi A / den). grid: columns of all heads, memory rows, cells
template <bool exact>
__global__ void write_delta(Batch batch, const float* raw, const float* phi, const float* coef, float* delta,
                            MemoryShape shape, int column_tiles) {
  __shared__ TileProduct::Shared shared;
  const DevCell& cell = batch.cells[blockIdx.z];
  if (cell.next_memory == nullptr) return;
  const int h = blockIdx.x / column_tiles;
  const float* matrix = cell.memory != nullptr ? cell.memory + h * shape.matrix() : nullptr;
  const int64_t row = static_cast<int64_t>(cell.writer) * cell.write_rows;
  tile_product<exact, false>(
      shared, blockIdx.y * TileProduct::kTile, blockIdx.x % column_tiles * TileProduct::kTile, cell.write_rows,
      shape.values, matrix != nullptr ? shape.features : 0,
      [&](int t, int f) { return phi[((row + t) * shape.heads + h) * shape.padded + f]; },
      [&](int f, int e) { return matrix[static_cast<int64_t>(f) * shape.values + e]; },
      [&](int t, int e, float sum) {
        const float* mine = raw + (row + t) * shape.raw;
        const int column = h * shape.values + e;
        const float beta = mine[shape.gate + (shape.gating ? column : h)];
        const float value = mine[shape.heads * shape.keys + column];
        delta[(row + t) * shape.width + column] = beta * (value - sum * coef[((row + t) * shape.heads + h) * 2]);
      });
}

// A' = A + phi^T delta. grid: columns of all heads, features, cells
template <bool exact>
__global__ void write_matrix(Batch batch, const float* phi, const float* delta, MemoryShape shape, int column_tiles) {
  __shared__ TileProduct::Shared shared;
  const DevCell& cell = batch.cells[blockIdx.z];
  if (cell.next_memory == nullptr) return;
  const int h = blockIdx.x / column_tiles;
  const int64_t row = static_cast<int64_t>(cell.writer) * cell.write_rows;
  const float* before = cell.memory != nullptr ? cell.memory + h * shape.matrix() : nullptr;
  float* after = cell.next_memory + h * shape.matrix();
  tile_product<exact, true>(
      shared, blockIdx.y * TileProduct::kTile, blockIdx.x % column_tiles * TileProduct::kTile, shape.features,
      shape.values, cell.write_rows,
      [&](int f, int t) { return phi[((row + t) * shape.heads + h) * shape.padded + f]; },
      [&](int t, int e) { return delta[(row + t) * shape.width + h * shape.values + e]; },
      [&](int f, int e, float sum) {
        const int64_t at = static_cast<int64_t>(f) * shape.values + e;
        after[at] = (before != nullptr ? before[at] : 0.0f) + sum;
      });
}

// z' = z + sum_t gamma_t phi_t, and the statistics. grid: cells
__global__ void write_rest(Batch batch, const float* raw, const float* phi, const float* coef, MemoryShape shape) {
  __shared__ float partial[4][32];
  const DevCell& cell = batch.cells[blockIdx.x];
  if (cell.next_memory == nullptr) return;
  const int64_t row = static_cast<int64_t>(cell.writer) * cell.write_rows;
  float* after = cell.next_memory + shape.heads * shape.matrix();
  const float* before = cell.memory != nullptr ? cell.memory + shape.heads * shape.matrix() : nullptr;
  const int features = shape.heads * shape.features;
  for (int i = threadIdx.x; shape.denominator && i < features; i += blockDim.x) {
    const int h = i / shape.features, f = i % shape.features;
    float sum = before != nullptr ? before[i] : 0.0f;
    for (int t = 0; t < cell.write_rows; ++t) {
      const int64_t at = (row + t) * shape.heads + h;
      sum += coef[at * 2 + 1] * phi[at * shape.padded + f];
    }
    after[i] = sum;
  }
  const int gates = shape.gating ? shape.width : shape.heads;
  float sum = 0.0f, least = INFINITY, greatest = -INFINITY, betas = 0.0f;
  for (int i = threadIdx.x; i < cell.write_rows * shape.heads; i += blockDim.x) {
    const float gamma = coef[(row * shape.heads + i) * 2 + 1];
    sum += gamma;
    least = fminf(least, gamma);
    greatest = fmaxf(greatest, gamma);
  }
  for (int i = threadIdx.x; i < cell.write_rows * gates; i += blockDim.x) {
    betas += raw[(row + i / gates) * shape.raw + shape.gate + i % gates];
  }
  sum = warp_sum(sum);
  least = -warp_max(-least);
  greatest = warp_max(greatest);
  betas = warp_sum(betas);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) {
    partial[0][warp] = sum;
    partial[1][warp] = least;
    partial[2][warp] = greatest;
    partial[3][warp] = betas;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < warps; ++w) {
    sum += partial[0][w];
    least = fminf(least, partial[1][w]);
    greatest = fmaxf(greatest, partial[2][w]);
    betas += partial[3][w];
  }
  float* statistics = after + (shape.denominator ? features : 0);
  statistics[0] = sum / static_cast<float>(cell.write_rows * shape.heads);
  statistics[1] = least;
  statistics[2] = greatest;
  statistics[3] = betas / static_cast<float>(cell.write_rows * gates);
}

MemoryShape shape_of(const ModelConfig& config, int64_t padded, int64_t raw) {
  const MemoryConfig& memory = config.memory;
  return {.heads = static_cast<int>(memory.n_heads),
          .features = static_cast<int>(config.features()),
          .padded = static_cast<int>(padded),
          .values = static_cast<int>(config.value_dim()),
          .keys = static_cast<int>(memory.d_mem / memory.n_heads),
          .rolls = static_cast<int>(memory.rolls),
          .width = static_cast<int>(config.decoder.d_model),
          .raw = static_cast<int>(raw),
          .gate = static_cast<int>(memory.d_mem + config.decoder.d_model),
          .normalise = memory.normalise_keys,
          .denominator = memory.use_denom,
          .correction = memory.correction,
          .paper = memory.dialect == Dialect::paper,
          .gating = memory.gating};
}

}  // namespace

void CudaBackend::memory_read(Groups groups, const Rows& x) {
  const Entry entry(*this);
  const bool any = std::ranges::any_of(groups, [](const Group& group) {
    return std::ranges::any_of(group.cells, [](const Cell& cell) { return cell.state->memory.written(); });
  });
  if (!any) return;
  const Part part = part_of(groups);
  const Batch& batch = part.batch;
  if (batch.max_group_rows == 0) return;
  const MemoryShape shape = shape_of(config_, padded_features(), write_width());
  CudaScratch& scratch = *active_.scratch;
  const bool exact = dtype_ == DType::f32;
  const int64_t d_mem = config_.memory.d_mem;
  int64_t rows = 0;
  std::vector<Span> spans;
  for (const DevGroup& group : part.groups) {
    spans.push_back(
        {.stack = group.stack, .in_row = row_index(group, x), .out_row = group.scratch, .rows = group.rows});
    rows = std::max(rows, group.scratch + group.rows);
  }
  grow(arena_, scratch.read_query, rows * d_mem * 4);
  grow(arena_, scratch.read_phi, rows * shape.heads * shape.padded * (exact ? 4 : 2));
  const Operands operands = {.weight = matrices_[static_cast<size_t>(Matrix::mem_query)].data(),
                             .weight_stride = d_mem * x.width,
                             .cols = d_mem,
                             .depth = x.width};
  Product base;
  base.type = dtype_;
  base.in = x.data;
  base.ld_in = x.width;
  base.out = scratch.read_query.data();
  base.ld_out = d_mem;
  products(std::move(spans), operands, base);

  const dim3 grid(static_cast<unsigned>(ceil_div(batch.max_group_rows, kWarps)), batch.group_count);
  const auto bytes = static_cast<unsigned>(kWarps * 2 * shape.keys * sizeof(float));
  const auto* queries = scratch.read_query.as<float>();
  if (exact) {
    auto* phi = scratch.read_phi.as<float>();
    read_features<<<grid, kWarps * 32, bytes, stream()>>>(batch, queries, phi, shape);
    check_launch("features of a read");
    const auto tiles = static_cast<int>(ceil_div(shape.values, TileProduct::kTile));
    const dim3 blocks(tiles * shape.heads, static_cast<unsigned>(ceil_div(batch.max_cell_rows, TileProduct::kTile)),
                      batch.cell_count);
    read_exact<<<blocks, TileProduct::kThreads, 0, stream()>>>(batch, phi, view(x), shape, tiles);
  } else {
    auto* phi = scratch.read_phi.as<__nv_bfloat16>();
    read_features<<<grid, kWarps * 32, bytes, stream()>>>(batch, queries, phi, shape);
    check_launch("features of a read");
    const auto tiles = static_cast<int>(ceil_div(shape.values, 128));
    const dim3 blocks(tiles * shape.heads, static_cast<unsigned>(ceil_div(batch.max_cell_rows, 128)), batch.cell_count);
    if (dtype_ == DType::bf16) {
      read_mma<__nv_bfloat16><<<blocks, 256, 0, stream()>>>(batch, phi, view(x), shape, tiles);
    } else {
      read_mma<__half><<<blocks, 256, 0, stream()>>>(batch, phi, view(x), shape, tiles);
    }
  }
  check_launch("memory_read");
}

void CudaBackend::memory_write(Groups groups, const Rows& x) {
  const Entry entry(*this);
  const Part part = part_of(groups);
  const Batch& batch = part.batch;
  int64_t writers = 0;  // up to the last place of any in this part
  bool alone = true;    // each writing group is one cell: its rows can be read where they are
  for (size_t g = 0; g < part.groups.size(); ++g) {
    if (part.writers[g].count == 0) continue;
    writers = std::max<int64_t>(writers, part.writers[g].first + part.writers[g].count);
    alone = alone && part.groups[g].cells == 1;
  }
  if (writers == 0) return;
  const MemoryShape shape = shape_of(config_, padded_features(), write_width());
  CudaScratch& scratch = *active_.scratch;
  const int64_t count = config_.memory.memory_tokens, rows = writers * count;
  grow(arena_, scratch.write_raw, rows * shape.raw * 4);
  grow(arena_, scratch.write_phi, rows * shape.heads * shape.padded * 4);
  grow(arena_, scratch.write_coef, rows * shape.heads * 8);
  grow(arena_, scratch.write_delta, rows * shape.width * 4);
  if (!alone) {
    grow(arena_, scratch.write_rows, rows * shape.width * element());
    const dim3 grid(static_cast<unsigned>(count), batch.cell_count);
    dispatch(dtype_, [&](auto type) {
      using T = typename decltype(type)::type;
      gather_writers<<<grid, 128, 0, stream()>>>(batch, view(x), scratch.write_rows.as<T>(), shape.width);
    });
    check_launch("rows of a write");
  }
  std::vector<Span> spans;
  for (size_t g = 0; g < part.groups.size(); ++g) {
    const DevGroup& group = part.groups[g];
    const int64_t first = part.writers[g].first * count;
    spans.push_back({.stack = group.stack,
                     .in_row = alone ? row_index(group, x) + group.rows - count : first,
                     .out_row = first,
                     .rows = part.writers[g].count * count});
  }
  const Operands operands = {.weight = write_weights_.data(),
                             .weight_stride = shape.raw * int64_t{shape.width},
                             .cols = shape.raw,
                             .depth = shape.width};
  Product base;
  base.type = dtype_;
  base.in = alone ? x.data : scratch.write_rows.data();
  base.ld_in = shape.width;
  base.out = scratch.write_raw.data();
  base.ld_out = shape.raw;
  products(std::move(spans), operands, base);

  auto* raw = scratch.write_raw.as<float>();
  auto* phi = scratch.write_phi.as<float>();
  auto* coef = scratch.write_coef.as<float>();
  auto* delta = scratch.write_delta.as<float>();
  const float* bias = vectors_[static_cast<size_t>(Vector::mem_gate_bias)].as<float>();
  const auto bytes = static_cast<unsigned>(kWarps * 2 * shape.keys * sizeof(float));
  const dim3 feature_grid(static_cast<unsigned>(ceil_div(count, kWarps)), batch.cell_count);
  write_features<<<feature_grid, kWarps * 32, bytes, stream()>>>(batch, raw, phi, coef, bias, shape);
  check_launch("features of a write");
  const auto tiles = static_cast<int>(ceil_div(shape.values, TileProduct::kTile));
  const dim3 delta_grid(tiles * shape.heads, static_cast<unsigned>(ceil_div(count, TileProduct::kTile)),
                        batch.cell_count);
  const dim3 matrix_grid(tiles * shape.heads, static_cast<unsigned>(ceil_div(shape.features, TileProduct::kTile)),
                         batch.cell_count);
  const auto launch = [&](auto delta_kernel, auto matrix_kernel) {
    delta_kernel<<<delta_grid, TileProduct::kThreads, 0, stream()>>>(batch, raw, phi, coef, delta, shape, tiles);
    check_launch("delta of a write");
    write_rest<<<batch.cell_count, 256, 0, stream()>>>(batch, raw, phi, coef, shape);
    check_launch("normaliser of a write");
    matrix_kernel<<<matrix_grid, TileProduct::kThreads, 0, stream()>>>(batch, phi, delta, shape, tiles);
    check_launch("memory_write");
  };
  if (dtype_ == DType::f32) {
    launch(write_delta<true>, write_matrix<true>);
  } else {
    launch(write_delta<false>, write_matrix<false>);
  }
}

}  // namespace armt::cuda
