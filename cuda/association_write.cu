// Writing the associative memory (docs/mathematics.md; arXiv 2407.04841, 2102.11174).
//
// Key, value and gate of the memory rows by one product; features, denominators, gamma and beta by a warp a row;
// delta = beta (v - phi A / den); A' = A + phi^T delta; z' = z + sum gamma phi. 16-bit models with up to 128 memory
// tokens make both later products in one kernel (association_update.cuh), with up to 16 the features as well
// (association_few.cu); others by tile_product.cuh.
#include <cuda_runtime.h>

#include <algorithm>

#include "association_few.h"
#include "association_update.cuh"
#include "check.h"
#include "overlap.cuh"
#include "tile_product.cuh"
#include "workspace.h"

namespace armt::cuda {
namespace {

// The rows that write, one after another. grid: memory rows, cells
template <class T>
__global__ void gather_writers(Batch batch, View x, T* out, int width) {
  const DevCell& cell = batch.cells[blockIdx.y];
  if (cell.next_memory == nullptr || blockIdx.x >= cell.write_rows) return;
  const T* from = row_of<T>(x, cell, cell.rows - cell.write_rows + blockIdx.x);
  T* to = out + (static_cast<int64_t>(cell.writer) * cell.write_rows + blockIdx.x) * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

// phi_t (rounded to 10 bits of mantissa unless exact), 1 / den_t and gamma_t of each memory row, and beta = sigmoid in
// place of the gate. grid: memory rows / 4, cells
template <bool exact>
__global__ void write_features(Batch batch, float* raw, float* phi, float* coef, const float* gate_bias,
                               MemoryShape shape) {
  extern __shared__ float shared[];
  let_next_kernel_start();
  wait_for_kernel_before();
  const DevCell& cell = batch.cells[blockIdx.y];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int t = blockIdx.x * kFeatureWarps + warp;
  if (cell.next_memory == nullptr || t >= cell.write_rows) return;
  const int64_t row = static_cast<int64_t>(cell.writer) * cell.write_rows + t;
  float* mine = raw + row * shape.raw;
  const int gates = shape.gating ? shape.width : shape.heads, n = shape.keys;
  float betas = 0.0f;
  for (int i = lane; i < gates; i += 32) {
    const float x = mine[shape.gate + i] + gate_bias[static_cast<int64_t>(cell.stack) * gates + i];
    const float beta = 1.0f / (1.0f + expf(-x));
    mine[shape.gate + i] = beta;
    betas += beta;
  }
  betas = warp_sum(betas);
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
    float* out = phi + (row * shape.heads + h) * shape.padded;
    if constexpr (exact) {
      store_features(u, shape, scale, out);
    } else {
      store_features(u, shape, scale, reinterpret_cast<Tf32*>(out));
    }
    if (lane == 0) {
      float* mine_coef = coef + (row * shape.heads + h) * kCoefs;
      mine_coef[0] = cell.memory == nullptr ? 0.0f : divides ? 1.0f / den : 1.0f;
      mine_coef[1] = gamma;
      mine_coef[2] = h == 0 ? betas : 0.0f;
    }
  }
}

// delta = beta (v - phi A / den). grid: columns of all heads, memory rows, cells
template <bool exact>
__global__ void write_delta(Batch batch, WriteRows rows, MemoryShape shape, int column_tiles) {
  __shared__ TileProduct::Shared shared;
  const DevCell& cell = batch.cells[blockIdx.z];
  if (cell.next_memory == nullptr) return;
  const int h = blockIdx.x / column_tiles;
  const float* matrix = cell.memory != nullptr ? cell.memory + h * shape.matrix() : nullptr;
  const int64_t row = static_cast<int64_t>(cell.writer) * cell.write_rows;
  tile_product<exact, false>(
      shared, blockIdx.y * TileProduct::kTile, blockIdx.x % column_tiles * TileProduct::kTile, cell.write_rows,
      shape.values, matrix != nullptr ? shape.features : 0,
      [&](int t, int f) { return rows.phi[((row + t) * shape.heads + h) * shape.padded + f]; },
      [&](int f, int e) { return matrix[static_cast<int64_t>(f) * shape.values + e]; },
      [&](int t, int e, float sum) {
        rows.delta[(row + t) * shape.width + h * shape.values + e] = delta_of(rows, shape, row + t, h, e, sum);
      });
}

// A' = A + phi^T delta. grid: columns of all heads, features, cells
template <bool exact>
__global__ void write_matrix(Batch batch, WriteRows rows, MemoryShape shape, int column_tiles) {
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
      [&](int f, int t) { return rows.phi[((row + t) * shape.heads + h) * shape.padded + f]; },
      [&](int t, int e) { return rows.delta[(row + t) * shape.width + h * shape.values + e]; },
      [&](int f, int e, float sum) {
        const int64_t at = static_cast<int64_t>(f) * shape.values + e;
        after[at] = (before != nullptr ? before[at] : 0.0f) + sum;
      });
}

constexpr int kRestThreads = 256;

// The statistics of a write, by one block.
__device__ void write_statistics(const DevCell& cell, const WriteRows& rows, const MemoryShape& shape, float* out) {
  __shared__ float partial[4][kRestThreads / 32];
  const int count = cell.write_rows * shape.heads;
  const float* coef = rows.coef + static_cast<int64_t>(cell.writer) * count * kCoefs;
  float sum = 0.0f, least = INFINITY, greatest = -INFINITY, betas = 0.0f;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const float gamma = coef[i * kCoefs + 1];
    sum += gamma;
    least = fminf(least, gamma);
    greatest = fmaxf(greatest, gamma);
    betas += coef[i * kCoefs + 2];
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
  const int gates = shape.gating ? shape.width : shape.heads;
  out[0] = sum / static_cast<float>(count);
  out[1] = least;
  out[2] = greatest;
  out[3] = betas / static_cast<float>(cell.write_rows * gates);
}

// z' = z + sum_t gamma_t phi_t for a share of the features, and the statistics by the first share's block.
__device__ void write_rest(const DevCell& cell, const WriteRows& rows, const MemoryShape& shape, int share,
                           int shares) {
  float* after = cell.next_memory + shape.heads * shape.matrix();
  const float* before = cell.memory != nullptr ? cell.memory + shape.heads * shape.matrix() : nullptr;
  const int features = shape.heads * shape.features;
  const int64_t row = static_cast<int64_t>(cell.writer) * cell.write_rows;
  for (int i = share * blockDim.x + threadIdx.x; shape.denominator && i < features; i += shares * blockDim.x) {
    const int h = i / shape.features, f = i % shape.features;
    const float* coef = rows.coef + (row * shape.heads + h) * kCoefs + 1;
    const float* phi = rows.phi + (row * shape.heads + h) * shape.padded + f;
    float sum = before != nullptr ? before[i] : 0.0f;
#pragma unroll 16
    for (int t = 0; t < cell.write_rows; ++t) {
      sum += coef[static_cast<int64_t>(t) * shape.heads * kCoefs] *
             phi[static_cast<int64_t>(t) * shape.heads * shape.padded];
    }
    after[i] = sum;
  }
  if (share == 0) write_statistics(cell, rows, shape, after + (shape.denominator ? features : 0));
}

// grid: shares of the features, cells
__global__ void write_rest_kernel(Batch batch, WriteRows rows, MemoryShape shape) {
  const DevCell& cell = batch.cells[blockIdx.y];
  if (cell.next_memory != nullptr) write_rest(cell, rows, shape, blockIdx.x, gridDim.x);
}

// All of a write behind its features. grid: columns of all heads and `shares` of the rest, cells
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    write_update(Batch batch, WriteRows rows, MemoryShape shape, int column_tiles, int shares) {
  extern __shared__ float4 tiles[];
  let_next_kernel_start();
  wait_for_kernel_before();
  const DevCell& cell = batch.cells[blockIdx.y];
  if (cell.next_memory == nullptr) return;
  // The rest first: it takes long, and little of the machine.
  if (blockIdx.x < shares) {
    write_rest(cell, rows, shape, blockIdx.x, shares);
    return;
  }
  const int column = blockIdx.x - shares;
  Updater<Tile>(reinterpret_cast<float*>(tiles), cell, rows, shape, column / column_tiles,
                column % column_tiles * Tile::kCols)
      .run();
}

int rest_shares(const MemoryShape& shape) {
  return static_cast<int>(ceil_div(static_cast<int64_t>(shape.heads) * shape.features, kRestThreads));
}

template <class Tile>
void launch_update(const Batch& batch, const WriteRows& rows, const MemoryShape& shape, cudaStream_t stream) {
  static_assert(Tile::kThreads == kRestThreads);
  check(cudaFuncSetAttribute(write_update<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kBytes),
        "cudaFuncSetAttribute");
  const auto tiles = static_cast<int>(ceil_div(shape.values, Tile::kCols));
  const int shares = rest_shares(shape);
  const dim3 grid(tiles * shape.heads + shares, batch.cell_count);
  launch_overlapped(write_update<Tile>, grid, dim3(Tile::kThreads), Tile::kBytes, stream, batch, rows, shape, tiles,
                    shares);
}

// Whether write_update() can: rows of A in whole 16 bytes, memory rows within its largest tile.
bool updates_in_one(const MemoryShape& shape, int64_t count) {
  return shape.values % 4 == 0 && count <= 128;
}

void launch_update(const Batch& batch, const WriteRows& rows, const MemoryShape& shape, int64_t count, int64_t cells,
                   int processors, cudaStream_t stream) {
  if (count <= 16) {
    launch_update<UpdateTile<16, 64, 64, 4>>(batch, rows, shape, stream);
  } else if (count <= 64) {
    launch_update<UpdateTile<64, 64, 32, 4>>(batch, rows, shape, stream);
  } else if (cells * shape.heads * ceil_div(shape.values, 128) < processors) {
    launch_update<UpdateTile<128, 64, 32, 3>>(batch, rows, shape, stream);
  } else {
    launch_update<UpdateTile<128, 128, 32, 2>>(batch, rows, shape, stream);
  }
}

template <bool exact>
void launch_products(const Batch& batch, const WriteRows& rows, const MemoryShape& shape, int64_t count,
                     cudaStream_t stream) {
  constexpr int kTile = TileProduct::kTile;
  const auto tiles = static_cast<int>(ceil_div(shape.values, kTile));
  const dim3 deltas(tiles * shape.heads, static_cast<unsigned>(ceil_div(count, kTile)), batch.cell_count);
  write_delta<exact><<<deltas, TileProduct::kThreads, 0, stream>>>(batch, rows, shape, tiles);
  check_launch("delta of a write");
  const dim3 rests(rest_shares(shape), batch.cell_count);
  write_rest_kernel<<<rests, kRestThreads, 0, stream>>>(batch, rows, shape);
  check_launch("normaliser of a write");
  const dim3 matrices(tiles * shape.heads, static_cast<unsigned>(ceil_div(shape.features, kTile)), batch.cell_count);
  write_matrix<exact><<<matrices, TileProduct::kThreads, 0, stream>>>(batch, rows, shape, tiles);
  check_launch("memory_write");
}

}  // namespace

void CudaBackend::memory_write(Groups groups, const Rows& x) {
  const Entry entry(*this);
  const Part part = part_of(groups);
  const Batch& batch = part.batch;
  int64_t writers = 0, cells = 0;  // up to the last place of any in this part; of this part
  bool alone = true;               // each writing group is one cell: its rows can be read where they are
  for (size_t g = 0; g < part.groups.size(); ++g) {
    if (part.writers[g].count == 0) continue;
    cells += part.writers[g].count;
    writers = std::max<int64_t>(writers, part.writers[g].first + part.writers[g].count);
    alone = alone && part.groups[g].cells == 1;
  }
  if (writers == 0) return;
  const MemoryShape shape = shape_of(config_, padded_features(), write_width());
  CudaScratch& scratch = *active_.scratch;
  const int64_t count = config_.memory.memory_tokens, rows = writers * count;
  const float* bias = vectors_[static_cast<size_t>(Vector::mem_gate_bias)].as<float>();
  const bool few = writes_few(dtype_, shape, count);
  grow(arena_, scratch.write_raw, rows * shape.raw * 4);
  if (!few) {
    grow(arena_, scratch.write_phi, rows * shape.heads * shape.padded * 4);
    grow(arena_, scratch.write_coef, rows * shape.heads * kCoefs * 4);
  }
  const bool in_one = dtype_ != DType::f32 && updates_in_one(shape, count);
  if (!in_one) grow(arena_, scratch.write_delta, rows * shape.width * 4);
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
  if (few) {
    grow_zeroed(arena_, scratch.readers, writers * 4, stream());
    launch_few_write(
        {.batch = batch, .raw = raw, .bias = bias, .readers = scratch.readers.as<unsigned>(), .shape = shape},
        stream());
    return;
  }
  auto* phi = scratch.write_phi.as<float>();
  auto* coef = scratch.write_coef.as<float>();
  const WriteRows write = {.raw = raw, .phi = phi, .coef = coef, .delta = scratch.write_delta.as<float>()};
  const auto bytes = static_cast<unsigned>(kFeatureWarps * 2 * shape.keys * sizeof(float));
  const dim3 grid(static_cast<unsigned>(ceil_div(count, kFeatureWarps)), batch.cell_count);
  const bool exact = dtype_ == DType::f32;
  const auto features = exact ? write_features<true> : write_features<false>;
  launch_overlapped(features, grid, dim3(kFeatureWarps * 32), bytes, stream(), batch, raw, phi, coef, bias, shape);
  if (exact) {
    launch_products<true>(batch, write, shape, count, stream());
  } else if (in_one) {
    launch_update(batch, write, shape, count, cells, processors_, stream());
  } else {
    launch_products<false>(batch, write, shape, count, stream());
  }
}

}  // namespace armt::cuda
