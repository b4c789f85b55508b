// What the two kernels for attention of many rows share (arXiv 2205.14135, 2307.08691): which tiles of 64 keys a block
// of query rows sees, how rows reach shared memory, and the running softmax. Both spread a score tile over threads in
// the same way: lane l of a warp of 16 rows holds rows l / 4 and l / 4 + 8, and of each 8 columns the two at l % 4 * 2.
#pragma once

#include "attention.cuh"
#include "mma.cuh"

namespace armt::cuda {

constexpr int kTile = 64;

// Scores of a warp's 16 rows: [8 columns][row, row, row + 8, row + 8].
using Scores = float[kTile / 8][4];

// What the rows of a block have in common.
struct Bounds {
  int prev_first, cur_first, cur_end;     // some row sees from / up to here
  int prev_full, cur_full, cur_full_end;  // every row sees from / up to here
  int uniform;
};

// By all threads of a block of at least `rows` threads (a multiple of 32); `bounds` is in shared memory, valid after
// the next barrier.
__device__ inline void find_bounds(const AttendArgs& args, const DevCell& cell, int first, int rows, Bounds& bounds) {
  const int r = threadIdx.x;
  if (r == 0) bounds = {cell.prev_rows, cell.cur_rows, 0, 0, 0, cell.cur_rows, 0};
  __syncthreads();
  if (r >= rows) return;
  constexpr unsigned kAll = 0xffffffffu;
  Sight sight{cell.prev_rows, cell.cur_rows, 0, 0};
  int prev_full = 0, cur_full = 0, cur_full_end = cell.cur_rows;
  if (first + r < cell.rows) {
    sight = sight_of(args.batch.rows[cell.row + first + r]);
    prev_full = sight.prev_begin;
    cur_full = sight.cur_begin;
    cur_full_end = sight.cur_end;
  }
  const int prev_first = __reduce_min_sync(kAll, sight.prev_begin),
            cur_first = __reduce_min_sync(kAll, sight.cur_begin);
  const int cur_end = __reduce_max_sync(kAll, sight.cur_end);
  prev_full = __reduce_max_sync(kAll, prev_full);
  cur_full = __reduce_max_sync(kAll, cur_full);
  cur_full_end = __reduce_min_sync(kAll, cur_full_end);
  const bool uniform = __any_sync(kAll, (sight.flags & DevRow::kUniform) != 0);
  if (r % 32 != 0) return;
  atomicMin(&bounds.prev_first, prev_first);
  atomicMin(&bounds.cur_first, cur_first);
  atomicMax(&bounds.cur_end, cur_end);
  atomicMax(&bounds.prev_full, prev_full);
  atomicMax(&bounds.cur_full, cur_full);
  atomicMin(&bounds.cur_full_end, cur_full_end);
  if (uniform) atomicOr(&bounds.uniform, 1);
}

// One tile of keys, seen by a block.
struct Tile {
  bool previous;
  int begin;  // first key
  int limit;  // rows of its cache
  bool full;  // every row of the block sees every key of it
};

// The tiles that a block walks over.
struct Walk {
  const Bounds& bounds;  // in shared memory
  int prev_rows, cur_rows;
  bool masks_prev, masks_cur;
  int prev_tile, prev_count, cur_tile, count;
  const char* const* cur_pages;
  const char* const* prev_pages;
  const char* cur_first_page = nullptr;  // nearly always the only one
  const char* prev_first_page = nullptr;

  __device__ Walk(const DevCell& cell, const Bounds& found)
      : bounds(found),
        prev_rows(cell.prev_rows),
        cur_rows(cell.cur_rows),
        masks_prev(found.uniform != 0 || cell.prev_visible != nullptr),
        masks_cur(found.uniform != 0 || cell.visible != nullptr) {
    const bool uniform = bounds.uniform != 0;
    const bool sees_previous = prev_rows > 0 && (uniform || bounds.prev_first < prev_rows);
    prev_tile = (uniform ? 0 : min(bounds.prev_first, prev_rows)) / kTile;
    prev_count = sees_previous ? (prev_rows + kTile - 1) / kTile - prev_tile : 0;
    cur_tile = (uniform ? 0 : bounds.cur_first) / kTile;
    const int cur_tiles = ((uniform ? cur_rows : min(bounds.cur_end, cur_rows)) + kTile - 1) / kTile;
    count = prev_count + max(0, cur_tiles - cur_tile);
    cur_pages = cell.cur_pages;
    prev_pages = cell.prev_pages;
    if (cur_rows > 0) cur_first_page = cur_pages[0];
    if (prev_rows > 0) prev_first_page = prev_pages[0];
  }

  __device__ Tile tile(int i) const {
    Tile tile;
    tile.previous = i < prev_count;
    tile.begin = (tile.previous ? prev_tile + i : cur_tile + i - prev_count) * kTile;
    tile.limit = tile.previous ? prev_rows : cur_rows;
    tile.full = tile.begin + kTile <= tile.limit && (tile.previous ? !masks_prev && tile.begin >= bounds.prev_full
                                                                   : !masks_cur && tile.begin >= bounds.cur_full &&
                                                                         tile.begin + kTile <= bounds.cur_full_end);
    return tile;
  }

  // A tile of keys, whose element (r, d) lies at kv_at(r, d); values lie kv_heads * page_rows * kv_row elements behind.
  template <class T>
  __device__ const T* keys_of(const AttendArgs& args, const Tile& tile, int kv_head) const {
    const char* page = tile.previous ? prev_first_page : cur_first_page;
    int row = tile.begin;
    if (row >= args.page_rows) {
      page = (tile.previous ? prev_pages : cur_pages)[row / args.page_rows];
      row %= args.page_rows;
    }
    return reinterpret_cast<const T*>(page) + static_cast<int64_t>(kv_head) * args.page_rows * args.kv_row +
           kv_tile(row, args.kv_row);
  }

  // False where rows that see [prev_begin, ..) and [.., cur_end) see nothing of the tile.
  __device__ bool reaches(const Tile& tile, int prev_begin, int cur_end) const {
    if (tile.full || (tile.previous ? masks_prev : masks_cur)) return true;
    return tile.previous ? tile.begin + kTile > prev_begin : tile.begin < cur_end;
  }
};

// Rows of up to 256 elements in shared memory: row r, element d at Place::at(r, d); 16-byte chunks stay whole.
template <int dim>
struct RowPlace {
  __device__ static int at(int r, int d) { return swizzled<dim>(r, d); }
};
// Slabs of 64 columns, 128-byte swizzle: what matrix instructions that read shared memory expect.
template <int rows>
struct SlabPlace {
  __device__ static int at(int r, int d) { return d / 64 * rows * 64 + r * 64 + ((d % 64 / 8 ^ (r & 7)) * 8 + d % 8); }
};

// 8 neighbours of a query row; zeros behind its end.
template <class T>
__device__ Pack<T> load_chunk(const T* row, int d, int c) {
  if (c % 8 == 0 && d < c) return *reinterpret_cast<const Pack<T>*>(row + d);
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < 8; ++k) pack.v[k] = d + k < c ? row[d + k] : from_float<T>(0.0f);
  return pack;
}

// Threads that load rows together.
struct WholeBlock {
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ static int threads() { return static_cast<int>(blockDim.x); }
  __device__ static void sync() { __syncthreads(); }
};

// `rows` query rows: [RMS norm], rotation. By all threads of the team; ends with its barrier.
template <class T, class Place, int rows, int dim, class Team = WholeBlock>
__device__ void load_queries(const AttendArgs& args, const DevCell& cell, int first, int head, T* queries) {
  const int c = args.head_dim, threads = Team::threads();
  if (c == dim && args.q_norm == nullptr && 2 * args.half == c) {
    // A thread turns 8 columns of the first half with their partners in the second; it loads for some at once.
    constexpr int kChunks = dim / 16, kAtOnce = 3;
#pragma unroll
    for (int begin = Team::thread(); begin < rows * kChunks; begin += kAtOnce * threads) {
      Pack<T> a[kAtOnce]{}, b[kAtOnce]{};
      float4 turns[kAtOnce][4]{};  // cosine, sine, cosine, sine
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = begin + j * threads, r = i / kChunks, d = i % kChunks * 8;
        if (r >= rows || first + r >= cell.rows) continue;
        const T* in = row_of<T>(args.qkv, cell, first + r) + head * c;
        a[j] = *reinterpret_cast<const Pack<T>*>(in + d);
        b[j] = *reinterpret_cast<const Pack<T>*>(in + d + dim / 2);
        const int64_t angle = args.batch.rows[cell.row + first + r].angle;
        const auto* from = reinterpret_cast<const float4*>(args.angles + angle * args.half + d);
#pragma unroll
        for (int k = 0; k < 4; ++k) turns[j][k] = from[k];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = begin + j * threads, r = i / kChunks, d = i % kChunks * 8;
        if (r >= rows) continue;
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
          const float4 two = turns[j][k / 2];
          const float x0 = to_float(a[j].v[k]), y0 = to_float(b[j].v[k]);
          const float x1 = to_float(a[j].v[k + 1]), y1 = to_float(b[j].v[k + 1]);
          a[j].v[k] = from_float<T>(x0 * two.x - y0 * two.y);
          b[j].v[k] = from_float<T>(y0 * two.x + x0 * two.y);
          a[j].v[k + 1] = from_float<T>(x1 * two.z - y1 * two.w);
          b[j].v[k + 1] = from_float<T>(y1 * two.z + x1 * two.w);
        }
        *reinterpret_cast<Pack<T>*>(queries + Place::at(r, d)) = a[j];
        *reinterpret_cast<Pack<T>*>(queries + Place::at(r, d + dim / 2)) = b[j];
      }
    }
    Team::sync();
    return;
  }
  constexpr int kAtOnce = 6;
#pragma unroll 1
  for (int begin = Team::thread(); begin < rows * (dim / 8); begin += kAtOnce * threads) {
    Pack<T> packs[kAtOnce]{};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = begin + j * threads, r = i / (dim / 8), d = i % (dim / 8) * 8;
      if (r >= rows || first + r >= cell.rows) continue;
      packs[j] = load_chunk(row_of<T>(args.qkv, cell, first + r) + head * c, d, c);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = begin + j * threads, r = i / (dim / 8), d = i % (dim / 8) * 8;
      if (r < rows) *reinterpret_cast<Pack<T>*>(queries + Place::at(r, d)) = packs[j];
    }
  }
  Team::sync();
  if (args.half == 0 && args.q_norm == nullptr) return;
  const int lane = threadIdx.x % 32;
  const float* weight = args.q_norm != nullptr ? args.q_norm + static_cast<int64_t>(cell.stack) * c : nullptr;
  for (int r = Team::thread() / 32; r < rows && first + r < cell.rows; r += threads / 32) {
    float scale = 1.0f;
    const auto at = [&](int d) -> T& { return queries[Place::at(r, d)]; };
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
  Team::sync();
}

// Starts the copy of one tile of keys and values; rows behind its cache's end become zero.
template <class T, class Place, int dim, int threads>
__device__ void start_tile(const AttendArgs& args, const Walk& walk, const Tile& tile, int kv_head, T* to_keys,
                           T* to_values) {
  const T* keys = walk.keys_of<T>(args, tile, kv_head);
  const int64_t values_behind = static_cast<int64_t>(args.kv_heads) * args.page_rows * args.kv_row;
#pragma unroll
  for (unsigned i = threadIdx.x; i < kTile * (dim / 8); i += threads) {
    const int r = static_cast<int>(i / (dim / 8)), d = static_cast<int>(i % (dim / 8) * 8);
    const bool there = tile.begin + r < tile.limit && d < args.kv_row;
    const T* from = keys + (there ? kv_at(r, d, args.kv_row, args.page_rows) : 0);
    copy_async(to_keys + Place::at(r, d), from, there);
    copy_async(to_values + Place::at(r, d), from + (there ? values_behind : 0), there);
  }
}

__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// One over the sum of a row's weights, of which each of four neighbouring threads has a part; zero where there are
// none.
__device__ inline float inverse_of_sum(float part) {
  part += __shfl_xor_sync(0xffffffffu, part, 1);
  part += __shfl_xor_sync(0xffffffffu, part, 2);
  return part > 0.0f ? 1.0f / part : 0.0f;
}

// Running softmax of a thread's two rows, with `dim` columns of the output.
template <int dim>
struct Softmax {
  float out[dim / 8][4] = {};
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

  // Scores that are not seen become -infinity. Bit n of seen[i][e] tells of row i, column n * 8 + e of the thread's.
  // `by_row`: what a row sees of the cache is more than a range.
  __device__ static void mask(Scores& scores, const DevCell& cell, bool by_row, const Tile& tile,
                              const Sight (&sights)[2]) {
    const int first = tile.begin + threadIdx.x % 4 * 2;
    uint32_t seen[2][2];
    if (!by_row) {
      const auto below = [&](int col) { return (1u << min(max((col - first + 7) >> 3, 0), kTile / 8)) - 1; };
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int begin = tile.previous ? sights[i].prev_begin : sights[i].cur_begin;
        const int end = tile.previous ? tile.limit : min(sights[i].cur_end, tile.limit);
#pragma unroll
        for (int e = 0; e < 2; ++e) seen[i][e] = below(end - e) & ~below(begin - e);
      }
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int e = k % 2;
        const Sight& sight = sights[k / 2];
        uint32_t bits = 0;
#pragma unroll 1
        for (int n = 0; n < kTile / 8; ++n) {
          const int col = first + n * 8 + e;
          if (col < tile.limit && sees(sight, cell, tile.previous, col)) bits |= 1u << n;
        }
        seen[k / 2][e] = bits;
      }
    }
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& score = scores[n][e];
        score = (seen[e / 2][e % 2] >> n & 1) == 0         ? -INFINITY
                : (sights[e / 2].flags & DevRow::kUniform) ? 0.0f
                                                           : score;
      }
    }
  }

  // Scores become weights 2^(scale (score - most)); `keep` is what brings the output so far to the new maximum.
  __device__ void weigh(Scores& scores, float scale, float (&keep)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float highest = most[i];
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) highest = fmaxf(highest, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      const float shift = highest == -INFINITY ? 0.0f : highest * scale;
      keep[i] = power_of_two(most[i] * scale - shift);
      most[i] = highest;
      total[i] *= keep[i];
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
        for (int e = 2 * i; e < 2 * i + 2; ++e) {
          scores[n][e] = power_of_two(scores[n][e] * scale - shift);
          total[i] += scores[n][e];
        }
      }
    }
  }

  __device__ void shrink(const float (&keep)[2]) {
#pragma unroll
    for (int n = 0; n < dim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n][e] *= keep[e / 2];
    }
  }

  // Weights of 16 keys as the left operand of a matrix instruction.
  template <class T>
  __device__ static void left_operand(const Scores& weights, int k, uint32_t (&a)[4]) {
    a[0] = pack_pair<T>(weights[2 * k][0], weights[2 * k][1]);
    a[1] = pack_pair<T>(weights[2 * k][2], weights[2 * k][3]);
    a[2] = pack_pair<T>(weights[2 * k + 1][0], weights[2 * k + 1][1]);
    a[3] = pack_pair<T>(weights[2 * k + 1][2], weights[2 * k + 1][3]);
  }

  template <class T>
  __device__ void store(const AttendArgs& args, const DevCell& cell, const int (&rows)[2], int head) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale = inverse_of_sum(total[i]);
      if (rows[i] >= cell.rows) continue;
      T* to = row_of<T>(args.context, cell, rows[i]) + head * args.head_dim;
#pragma unroll
      for (int n = 0; n < dim / 8; ++n) {
        const int d = n * 8 + lane % 4 * 2;
        const float a = out[n][2 * i] * scale, b = out[n][2 * i + 1] * scale;
        if (args.head_dim % 2 == 0) {
          if (d < args.head_dim) *reinterpret_cast<uint32_t*>(to + d) = pack_pair<T>(a, b);
        } else {
          if (d < args.head_dim) to[d] = from_float<T>(a);
          if (d + 1 < args.head_dim) to[d + 1] = from_float<T>(b);
        }
      }
    }
  }
};

// Factor of the scores, with log2(e).
__device__ inline float score_scale(const AttendArgs& args, const DevCell& cell) {
  constexpr float kLog2e = 1.4426950408889634f;
  return args.scale * kLog2e / (args.by_layer ? static_cast<float>(cell.layer + 1) : 1.0f);
}

// The two rows of this thread, in a block whose warps take 16 rows each, one after another.
__device__ inline void find_rows(const AttendArgs& args, const DevCell& cell, int first, int (&rows)[2],
                                 Sight (&sights)[2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows[i] = first + warp * 16 + lane / 4 + i * 8;
    sights[i] = {cell.prev_rows, cell.cur_rows, 0, 0};
    if (rows[i] < cell.rows) sights[i] = sight_of(args.batch.rows[cell.row + rows[i]]);
  }
}

}  // namespace armt::cuda
