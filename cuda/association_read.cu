// Reading the associative memory (docs/mathematics.md; arXiv 2407.04841, 2102.11174).
//
// Queries of all rows by one product; a warp a row turns them into features phi / (z . phi + 1e-5); then x += phi A.
// Where most models' 16-bit queries have their features made, one kernel does both (association_query.cu).
// Long cells of bfloat16: A is rounded into scratch, then the library multiplies. Otherwise: matrix instructions that
// round A on their way (16 bits), or float32 throughout.
#include <cuda_runtime.h>

#include <algorithm>

#include "association_query.h"
#include "check.h"
#include "overlap.cuh"
#include "tile_product.cuh"
#include "workspace.h"

namespace armt::cuda {
namespace {

template <class To>
__global__ void read_features(Batch batch, const float* queries, To* phi, MemoryShape shape) {
  let_next_kernel_start();
  wait_for_kernel_before();
  extern __shared__ float shared[];
  const DevGroup& group = batch.groups[blockIdx.y];
  const int warp = threadIdx.x / 32;
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kFeatureWarps + warp;
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

// Whether one kernel for queries and features pays: its tiles of rows must fill the GPU.
bool fills_with_queries(const Batch& batch, int processors) {
  return 4 * query_tiles(batch) >= int64_t{3} * processors;
}

// What the library multiplies by: A of each written cell rounded to bfloat16, in the order of stacked weights (the last
// group's cells first). 16 bytes of the result a thread and turn. grid: chunks, cells of a group, groups
constexpr int kRoundTurns = 4;
__device__ inline void round_matrix(const Batch& batch, __nv_bfloat16* out, int64_t packs) {
  const DevGroup& group = batch.groups[blockIdx.z];
  if (blockIdx.y >= group.cells) return;
  const int first = group.cell_begin - batch.cell_begin;
  const float* memory = batch.cells[first + blockIdx.y].memory;
  if (memory == nullptr) return;
  const int64_t place = batch.cell_count - first - group.cells + blockIdx.y;
  const auto* from = reinterpret_cast<const float4*>(memory);
  auto* to = reinterpret_cast<uint4*>(out) + place * packs;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * blockDim.x * kRoundTurns + threadIdx.x;
  float4 low[kRoundTurns], high[kRoundTurns];
#pragma unroll
  for (int k = 0; k < kRoundTurns; ++k) {
    const int64_t i = begin + k * blockDim.x;
    if (i >= packs) continue;
    low[k] = from[2 * i];
    high[k] = from[2 * i + 1];
  }
#pragma unroll
  for (int k = 0; k < kRoundTurns; ++k) {
    const int64_t i = begin + k * blockDim.x;
    if (i >= packs) continue;
    using Half = __nv_bfloat16;
    to[i] = {pack_pair<Half>(low[k].x, low[k].y), pack_pair<Half>(low[k].z, low[k].w),
             pack_pair<Half>(high[k].x, high[k].y), pack_pair<Half>(high[k].z, high[k].w)};
  }
}
// It needs nothing of the kernel before it, so it works beside that one (which lets it start when all before is done).
__global__ void round_matrices(Batch batch, __nv_bfloat16* out, int64_t packs) {
  round_matrix(batch, out, packs);
  wait_for_kernel_before();
}

// Whether rounding the matrices first pays: each is then read by several tiles of rows.
bool long_cells(const MemoryShape& shape, const Batch& batch, int64_t rows) {
  constexpr int64_t kLeastRows = 192;
  return shape.values % 8 == 0 && shape.features == shape.padded && rows >= kLeastRows * batch.cell_count;
}

// Rows of a cell whose memory was written.
struct Reader {
  int64_t place = 0;           // of its rounded matrix
  int64_t group = 0, row = 0;  // its group, and its first row there
  int64_t rows = 0;
};

std::vector<Reader> readers_of(Groups groups) {
  std::vector<Reader> found;
  int64_t place = 0;
  for (size_t g = groups.size(); g-- > 0;) {
    for (const Cell& cell : groups[g].cells) {
      if (cell.state->memory.written()) {
        found.push_back({.place = place,
                         .group = static_cast<int64_t>(g),
                         .row = cell.row_begin - groups[g].row_begin,
                         .rows = cell.row_count});
      }
      ++place;
    }
  }
  return found;
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
  int64_t rows = 0, all_rows = 0, x_rows = 0, stacks = 0;
  for (const DevGroup& group : part.groups) {
    x_rows = std::max(x_rows, row_index(group, x) + group.rows);
    stacks = std::max<int64_t>(stacks, group.stack + 1);
    rows = std::max(rows, group.scratch + group.rows);
    all_rows += group.rows;
  }
  grow(arena_, scratch.read_phi, rows * shape.heads * shape.padded * (exact ? 4 : 2));
  const char* weights = matrices_[static_cast<size_t>(Matrix::mem_query)].data();
  const bool in_one = makes_query_features(dtype_, shape) && fills_with_queries(batch, processors_);
  if (in_one) {
    launch_query_features(dtype_,
                          {.batch = batch,
                           .x = view(x),
                           .weights = weights,
                           .x_rows = x_rows,
                           .weight_rows = stacks * shape.keys,
                           .phi = scratch.read_phi.as<__nv_bfloat16>(),
                           .shape = shape},
                          stream());
  } else {
    const int64_t d_mem = config_.memory.d_mem;
    grow(arena_, scratch.read_query, rows * d_mem * 4);
    std::vector<Span> spans;
    for (const DevGroup& group : part.groups) {
      spans.push_back(
          {.stack = group.stack, .in_row = row_index(group, x), .out_row = group.scratch, .rows = group.rows});
    }
    const Operands operands = {.weight = weights, .weight_stride = d_mem * x.width, .cols = d_mem, .depth = x.width};
    Product base;
    base.type = dtype_;
    base.in = x.data;
    base.ld_in = x.width;
    base.out = scratch.read_query.data();
    base.ld_out = d_mem;
    products(std::move(spans), operands, base);
  }

  const dim3 grid(static_cast<unsigned>(ceil_div(batch.max_group_rows, kFeatureWarps)), batch.group_count);
  const auto bytes = static_cast<unsigned>(kFeatureWarps * 2 * shape.keys * sizeof(float));
  const auto* queries = scratch.read_query.as<float>();
  if (exact) {
    auto* phi = scratch.read_phi.as<float>();
    launch_overlapped(read_features<float>, grid, dim3(kFeatureWarps * 32), bytes, stream(), batch, queries, phi,
                      shape);
    const auto tiles = static_cast<int>(ceil_div(shape.values, TileProduct::kTile));
    const dim3 blocks(tiles * shape.heads, static_cast<unsigned>(ceil_div(batch.max_cell_rows, TileProduct::kTile)),
                      batch.cell_count);
    read_exact<<<blocks, TileProduct::kThreads, 0, stream()>>>(batch, phi, view(x), shape, tiles);
    check_launch("memory_read");
    return;
  }
  auto* phi = scratch.read_phi.as<__nv_bfloat16>();
  if (!in_one) {
    launch_overlapped(read_features<__nv_bfloat16>, grid, dim3(kFeatureWarps * 32), bytes, stream(), batch, queries,
                      phi, shape);
  }
  if (dtype_ != DType::bf16 || !long_cells(shape, batch, all_rows)) {
    const auto tiles = static_cast<int>(ceil_div(shape.values, 128));
    const dim3 blocks(tiles * shape.heads, static_cast<unsigned>(ceil_div(batch.max_cell_rows, 128)), batch.cell_count);
    if (dtype_ == DType::bf16) {
      read_mma<__nv_bfloat16><<<blocks, 256, 0, stream()>>>(batch, phi, view(x), shape, tiles);
    } else {
      read_mma<__half><<<blocks, 256, 0, stream()>>>(batch, phi, view(x), shape, tiles);
    }
    check_launch("memory_read");
    return;
  }

  const int64_t matrices = shape.heads * shape.matrix();  // elements of a cell
  grow(arena_, scratch.read_matrix, batch.cell_count * matrices * 2);
  size_t most_cells = 0;
  for (const Group& group : groups) most_cells = std::max(most_cells, group.cells.size());
  const dim3 chunks(static_cast<unsigned>(ceil_div(matrices / 8, 256 * kRoundTurns)), static_cast<unsigned>(most_cells),
                    batch.group_count);
  launch_overlapped(round_matrices, chunks, dim3(256), 0, stream(), batch, scratch.read_matrix.as<__nv_bfloat16>(),
                    matrices / 8);
  std::vector<Span> reads;
  for (const Reader& reader : readers_of(groups)) {
    const DevGroup& group = part.groups[reader.group];
    reads.push_back({.stack = reader.place,
                     .in_row = group.scratch + reader.row,
                     .out_row = row_index(group, x) + reader.row,
                     .rows = reader.rows});
  }
  for (int64_t h = 0; h < shape.heads; ++h) {
    const Operands read = {.weight = scratch.read_matrix.data() + h * shape.matrix() * 2,
                           .weight_stride = matrices,
                           .cols = shape.values,
                           .depth = shape.features};
    Product product;
    product.type = product.out_type = DType::bf16;
    product.by_depth = product.add = true;
    product.in = phi + h * shape.padded;
    product.ld_in = int64_t{shape.heads} * shape.padded;
    product.out = static_cast<char*>(x.data) + h * shape.values * 2;
    product.ld_out = x.width;
    products(reads, read, product);
  }
}

}  // namespace armt::cuda
