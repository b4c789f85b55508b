// Both products of a write in one kernel, for 16-bit models: delta = beta (v - phi A / den), then A' = A + phi^T delta.
//
// A block owns some columns of one head of one cell. It walks over the features twice, in chunks of phi and A that come
// by asynchronous copies; delta stays in registers between the walks. Operands are rounded to 10 bits of mantissa (phi
// comes rounded), sums are float32.
#pragma once

#include "association.cuh"
#include "mma.cuh"

namespace armt::cuda {

// A float32 of 10 bits of mantissa.
struct Tf32 {
  float value;
};
template <>
__device__ inline Tf32 from_float<Tf32>(float x) {
  return {__uint_as_float(to_tf32(x))};
}

// What the products of a write read and write besides memories. Rows are memory rows of the cells that write.
struct WriteRows {
  const float* raw = nullptr;   // [rows, shape.raw]: key, value, beta
  const float* phi = nullptr;   // [rows, h, padded F]
  const float* coef = nullptr;  // [rows, h, kCoefs]
  float* delta = nullptr;       // [rows, D]
};
constexpr int kCoefs = 3;  // 1 / den (0: nothing to subtract); gamma; sum of betas, with the first head

__device__ inline float delta_of(const WriteRows& rows, const MemoryShape& shape, int64_t row, int h, int e,
                                 float old) {
  const float* mine = rows.raw + row * shape.raw;
  const int column = h * shape.values + e;
  const float beta = mine[shape.gate + (shape.gating ? column : h)];
  return beta * (mine[shape.heads * shape.keys + column] - old * rows.coef[(row * shape.heads + h) * kCoefs]);
}

// Rounds half up to 10 bits of mantissa, when a matrix instruction then drops the rest.
__device__ inline uint32_t half_up(float x) {
  return __float_as_uint(x) + 0x1000u;
}

// Four neighbours; `aligned`: at a multiple of 16 bytes.
__device__ inline float4 load_four(const float* from, bool aligned) {
  if (aligned) return *reinterpret_cast<const float4*>(from);
  return make_float4(from[0], from[1], from[2], from[3]);
}

// Tiles for up to kTokens memory rows and kCols columns; chunks of kDepth features (a multiple of 32).
template <int kTokens_, int kCols_, int kDepth_, int kStages_>
struct UpdateTile {
  static constexpr int kTokens = kTokens_, kCols = kCols_, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  // Strides of rows in shared memory, so that the lanes of a fragment lie in different banks: of phi as it is, of phi
  // turned, of A and delta.
  static constexpr int kPhiRow = kDepth + 4, kTurnedRow = kDepth + 8, kColRow = kCols + 8;
  static constexpr int kPhi = kTokens * kTurnedRow, kStage = kPhi + kDepth * kColRow;  // floats
  static constexpr int kBytes = 4 * (kStages * kStage > kTokens * kColRow ? kStages * kStage : kTokens * kColRow);
  // First walk: warps by rows and columns, and each one's matrix instructions.
  static constexpr int kWarpsDown = kTokens >= 64 ? 4 : 1, kWarpsAcross = kWarps / kWarpsDown;
  static constexpr int kM = kTokens / kWarpsDown / 16, kN = kCols / kWarpsAcross / 8;
  // Second walk: all warps beside each other.
  static constexpr int kTurnedN = kCols / kWarps / 8;
  // Which column of a warp's own the place `n` of its matrix instruction `j` is: any order does, and one in which a
  // lane has neighbours makes for wide loads.
  static constexpr bool kWide = kN % 4 == 0;
  __device__ static int column(int j, int n) { return kWide ? j / 4 * 32 + n * 4 + j % 4 : j * 8 + n; }
  __device__ static int turned_column(int j, int n) { return kTurnedN == 2 ? n / 2 * 4 + j * 2 + n % 2 : j * 8 + n; }
};

template <class Tile>
class Updater {
 public:
  __device__ Updater(float* shared, const DevCell& cell, const WriteRows& rows, const MemoryShape& shape, int h,
                     int first_col)
      : shared_(shared),
        rows_(rows),
        shape_(shape),
        h_(h),
        first_col_(first_col),
        tokens_(cell.write_rows),
        first_row_(static_cast<int64_t>(cell.writer) * cell.write_rows),
        chunks_(static_cast<int>(ceil_div(shape.features, Tile::kDepth))),
        before_(cell.memory != nullptr ? cell.memory + h * shape.matrix() : nullptr),
        after_(cell.next_memory + h * shape.matrix()) {}

  __device__ void run() {
    float sum[Tile::kM][Tile::kN][4] = {};
    if (before_ != nullptr) {
      walk<Tile::kPhiRow>([&](int, const float* phi, const float* matrix) { add_old(sum, phi, matrix); });
    }
    store_delta(sum);
    __syncthreads();
    uint32_t delta[Tile::kTokens / 8][Tile::kTurnedN][2];
    load_delta(delta);
    __syncthreads();
    walk<Tile::kTurnedRow>(
        [&](int chunk, const float* phi, const float* matrix) { update(delta, chunk, phi, matrix); });
  }

 private:
  // Starts copying a chunk of features: phi [tokens, kDepth] and A [kDepth, columns].
  template <int phi_row>
  __device__ void start(int chunk) {
    if (chunk < chunks_) {
      float* phi = shared_ + chunk % Tile::kStages * Tile::kStage;
      const int first = chunk * Tile::kDepth;
      constexpr int kPhiPacks = Tile::kDepth / 4, kColPacks = Tile::kCols / 4;
#pragma unroll
      for (int i = threadIdx.x; i < Tile::kTokens * kPhiPacks; i += Tile::kThreads) {
        const int t = i / kPhiPacks, f = i % kPhiPacks * 4;
        const bool there = t < tokens_ && first + f < shape_.padded;
        const int64_t row = (first_row_ + (there ? t : 0)) * shape_.heads + h_;
        copy_async(phi + t * phi_row + f, rows_.phi + row * shape_.padded + (there ? first + f : 0), there);
      }
      float* matrix = phi + Tile::kPhi;
#pragma unroll
      for (int i = threadIdx.x; i < Tile::kDepth * kColPacks; i += Tile::kThreads) {
        const int f = i / kColPacks, e = i % kColPacks * 4;
        const bool there = before_ != nullptr && first + f < shape_.features && first_col_ + e < shape_.values;
        const float* from =
            there ? before_ + static_cast<int64_t>(first + f) * shape_.values + first_col_ + e : rows_.phi;
        copy_async(matrix + f * Tile::kColRow + e, from, there);
      }
    }
    commit_copies();
  }

  // Calls body(chunk, phi, A) for each chunk of features, in order.
  template <int phi_row, class Body>
  __device__ void walk(const Body& body) {
    for (int chunk = 0; chunk < Tile::kStages - 1; ++chunk) start<phi_row>(chunk);
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      wait_copies<Tile::kStages - 2>();
      __syncthreads();
      start<phi_row>(chunk + Tile::kStages - 1);
      const float* phi = shared_ + chunk % Tile::kStages * Tile::kStage;
      body(chunk, phi, phi + Tile::kPhi);
    }
    wait_copies<0>();
    __syncthreads();
  }

  // sum += phi A: this warp's part of the chunk.
  __device__ void add_old(float (&sum)[Tile::kM][Tile::kN][4], const float* phi, const float* matrix) const {
    const float* rows = phi + (first_token() + lane() % 16) * Tile::kPhiRow + lane() / 16 * 4;
    const float* cols = matrix + lane() % 4 * Tile::kColRow + warp() % Tile::kWarpsAcross * Tile::kN * 8;
#pragma unroll
    for (int k = 0; k < Tile::kDepth; k += 8) {
      uint32_t a[Tile::kM][4];
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) load_matrices(a[m], rows + m * 16 * Tile::kPhiRow + k);
      const float* low = cols + k * Tile::kColRow;
      const float* high = low + 4 * Tile::kColRow;
      if constexpr (Tile::kWide) {
#pragma unroll
        for (int n = 0; n < Tile::kN; n += 4) {
          const int e = Tile::column(n, lane() / 4);
          const float4 b0 = *reinterpret_cast<const float4*>(low + e), b1 = *reinterpret_cast<const float4*>(high + e);
#pragma unroll
          for (int m = 0; m < Tile::kM; ++m) {
            multiply_add_tf32(sum[m][n], a[m], half_up(b0.x), half_up(b1.x));
            multiply_add_tf32(sum[m][n + 1], a[m], half_up(b0.y), half_up(b1.y));
            multiply_add_tf32(sum[m][n + 2], a[m], half_up(b0.z), half_up(b1.z));
            multiply_add_tf32(sum[m][n + 3], a[m], half_up(b0.w), half_up(b1.w));
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < Tile::kN; ++n) {
          const int e = Tile::column(n, lane() / 4);
#pragma unroll
          for (int m = 0; m < Tile::kM; ++m) multiply_add_tf32(sum[m][n], a[m], half_up(low[e]), half_up(high[e]));
        }
      }
    }
  }

  // delta of this block's columns to shared memory, rounded; zeros behind the last row and column.
  __device__ void store_delta(const float (&sum)[Tile::kM][Tile::kN][4]) const {
    const int e0 = warp() % Tile::kWarpsAcross * Tile::kN * 8;
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = first_token() + m * 16 + half * 8 + lane() / 4;
        const bool there = t < tokens_;
        const int64_t row = first_row_ + (there ? t : 0);
        const float inverse = rows_.coef[(row * shape_.heads + h_) * kCoefs];
        float* out = shared_ + t * Tile::kColRow;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int place = lane() % 4 * 2 + i;
          if constexpr (Tile::kWide) {
#pragma unroll
            for (int n = 0; n < Tile::kN; n += 4) {
              const int e = e0 + Tile::column(n, place);
              const float old[4] = {sum[m][n][2 * half + i], sum[m][n + 1][2 * half + i], sum[m][n + 2][2 * half + i],
                                    sum[m][n + 3][2 * half + i]};
              *reinterpret_cast<float4*>(out + e) =
                  there && first_col_ + e < shape_.values ? four_deltas(row, first_col_ + e, old, inverse) : float4{};
            }
          } else {
#pragma unroll
            for (int n = 0; n < Tile::kN; ++n) {
              const int e = e0 + Tile::column(n, place);
              const float delta = there && first_col_ + e < shape_.values
                                      ? delta_of(rows_, shape_, row, h_, first_col_ + e, sum[m][n][2 * half + i])
                                      : 0.0f;
              out[e] = __uint_as_float(to_tf32(delta));
            }
          }
        }
      }
    }
  }

  // delta of four neighbouring columns of the head.
  __device__ float4 four_deltas(int64_t row, int e, const float (&old)[4], float inverse) const {
    const float* mine = rows_.raw + row * shape_.raw;
    const int column = h_ * shape_.values + e, keys = shape_.heads * shape_.keys;
    const bool aligned = keys % 4 == 0;
    const float4 value = load_four(mine + keys + column, aligned);
    float4 beta;
    if (shape_.gating) {
      beta = load_four(mine + shape_.gate + column, aligned);
    } else {
      beta.x = beta.y = beta.z = beta.w = mine[shape_.gate + h_];
    }
    return make_float4(__uint_as_float(to_tf32(beta.x * (value.x - old[0] * inverse))),
                       __uint_as_float(to_tf32(beta.y * (value.y - old[1] * inverse))),
                       __uint_as_float(to_tf32(beta.z * (value.z - old[2] * inverse))),
                       __uint_as_float(to_tf32(beta.w * (value.w - old[3] * inverse))));
  }

  __device__ void load_delta(uint32_t (&delta)[Tile::kTokens / 8][Tile::kTurnedN][2]) const {
#pragma unroll
    for (int k = 0; k < Tile::kTokens / 8; ++k) {
#pragma unroll
      for (int n = 0; n < Tile::kTurnedN; ++n) {
        const int e = warp() * Tile::kTurnedN * 8 + Tile::turned_column(n, lane() / 4);
        const float* at = shared_ + (k * 8 + lane() % 4) * Tile::kColRow + e;
        delta[k][n][0] = __float_as_uint(at[0]);
        delta[k][n][1] = __float_as_uint(at[4 * Tile::kColRow]);
      }
    }
  }

  // A' = A + phi^T delta for the chunk's features: 32 at a time, four neighbours of which are a lane's.
  __device__ void update(const uint32_t (&delta)[Tile::kTokens / 8][Tile::kTurnedN][2], int chunk, const float* phi,
                         const float* matrix) const {
#pragma unroll
    for (int group = 0; group < Tile::kDepth; group += 32) {
      const int f0 = group + lane() / 4 * 4;
      float sum[2][Tile::kTurnedN][4] = {};
      __syncwarp();  // after the lanes' own stores of the group before
#pragma unroll
      for (int k = 0; k < Tile::kTokens / 8; ++k) {
        const float* at = phi + (k * 8 + lane() % 4) * Tile::kTurnedRow + f0;
        const uint4 low = *reinterpret_cast<const uint4*>(at);
        const uint4 high = *reinterpret_cast<const uint4*>(at + 4 * Tile::kTurnedRow);
        const uint32_t a[2][4] = {{low.x, low.y, high.x, high.y}, {low.z, low.w, high.z, high.w}};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int n = 0; n < Tile::kTurnedN; ++n) multiply_add_tf32(sum[m][n], a[m], delta[k][n][0], delta[k][n][1]);
        }
      }
      const int e = warp() * Tile::kTurnedN * 8 + lane() % 4 * 2 * Tile::kTurnedN;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t feature = chunk * Tile::kDepth + f0 + i;
        if (feature >= shape_.features || first_col_ + e >= shape_.values) continue;
        const float* old = matrix + (f0 + i) * Tile::kColRow + e;
        float* out = after_ + feature * shape_.values + first_col_ + e;
        const float* low = sum[i / 2][0] + i % 2 * 2;
        if constexpr (Tile::kTurnedN == 2) {
          const float* high = sum[i / 2][1] + i % 2 * 2;
          const float4 before = *reinterpret_cast<const float4*>(old);
          *reinterpret_cast<float4*>(out) =
              make_float4(before.x + low[0], before.y + low[1], before.z + high[0], before.w + high[1]);
        } else {
          const float2 before = *reinterpret_cast<const float2*>(old);
          *reinterpret_cast<float2*>(out) = make_float2(before.x + low[0], before.y + low[1]);
        }
      }
    }
  }

  // First memory row of this warp in the first walk.
  __device__ static int first_token() { return warp() / Tile::kWarpsAcross * Tile::kM * 16; }
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }

  float* shared_;
  const WriteRows& rows_;
  const MemoryShape& shape_;
  int h_, first_col_, tokens_;
  int64_t first_row_;
  int chunks_;
  const float* before_;
  float* after_;
};

}  // namespace armt::cuda
