// A write of up to 16 memory rows behind its first product (association_few.h; docs/mathematics.md).
//
// A block owns 32 columns of one cell's A. It asks for them before it waits for the kernel before; then come features,
// delta and A' = A + phi^T delta. Each warp has 32 features. Sums have one order whatever else is in the batch.
#include "association_few.h"
#include "association_update.cuh"
#include "check.h"
#include "overlap.cuh"
#include "row_features.cuh"

namespace armt::cuda {
namespace {

constexpr int kTokens = 16, kCols = 32, kFeatures = RowFeatures::kAll, kKeys = RowFeatures::kKeys;
constexpr int kWarps = kFeatures / 32, kThreads = kWarps * 32;

// Strides so that the lanes of a fragment lie in different banks.
struct Shared {
  float matrix[kFeatures][kCols + 4];
  float phi[kTokens][kFeatures + 8];
  float old[kWarps][kTokens][kCols];  // phi A of each warp's features
  union {
    float keys[kTokens][kKeys + 4];
    float delta[kTokens][kCols + 8];
  };
  float z[kFeatures];
  float inverse[kTokens], gamma[kTokens], beta[kTokens];
  bool last;  // of the cell's blocks to read z
};
static_assert(2 * (sizeof(Shared) + 1024) <= 228 * 1024, "two blocks a multiprocessor");

// Place of a column of a block in shared.delta, so that a lane of the last product has four neighbouring columns.
__device__ inline int delta_place(int e) {
  return e / 16 * 16 + e % 4 / 2 * 8 + e % 16 / 4 * 2 + e % 2;
}
// Columns of shared.old are exchanged by rows of tokens, against bank conflicts.
__device__ inline int old_place(int t, int e) {
  return e ^ (t & 3) * 8;
}

class FewWriter {
 public:
  __device__ FewWriter(const FewWrite& args, Shared& shared, const DevCell& cell)
      : args_(args), shared_(shared), cell_(cell), first_col_(static_cast<int>(blockIdx.x) * kCols) {}

  __device__ void run() {
    fetch_memory();
    wait_for_kernel_before();
    fetch_raw();
    wait_copies<1>();  // z; A may still come
    __syncthreads();
    count_readers();
    make_features();
    wait_copies<0>();
    __syncthreads();
    add_old();
    __syncthreads();
    make_delta();
    if (shared_.last) write_rest();
    __syncthreads();
    update();
  }

 private:
  // Starts copying z, then A's columns. The kernel before writes none of it.
  __device__ void fetch_memory() {
    const float* memory = cell_.memory;
    const bool there = memory != nullptr;
    const int64_t values = args_.shape.values;
    if (threadIdx.x < kFeatures / 4) {
      const bool has_z = there && args_.shape.denominator;
      const float* z = has_z ? args_.shape.normaliser(memory, 0) : args_.bias;
      copy_async(&shared_.z[threadIdx.x * 4], has_z ? z + threadIdx.x * 4 : z, has_z);
    }
    commit_copies();
#pragma unroll
    for (int i = 0; i < kCols / 4; ++i) {
      const int f = warp() * 32 + i * 4 + lane() / 8, e = lane() % 8 * 4;
      const float* from = there ? memory + f * values + first_col_ + e : args_.bias;
      copy_async(&shared_.matrix[f][e], from, there);
    }
    commit_copies();
  }

  // A memory may be written in place, and all blocks of a cell read its z: the one that reads it last writes the new
  // one.
  __device__ void count_readers() const {
    if (threadIdx.x != 0) return;
    unsigned& readers = args_.readers[cell_.writer];
    __threadfence();
    shared_.last = atomicAdd(&readers, 1u) == gridDim.x - 1;
    if (shared_.last) readers = 0;
  }

  // The keys of the cell to shared memory; this thread's two values and its row's gate stay with it.
  __device__ void fetch_raw() {
    if (threadIdx.x >= kTokens * 16) return;
    const int t = threadIdx.x / 16, place = threadIdx.x % 16;
    const bool there = t < cell_.write_rows;
    const int64_t row = int64_t{cell_.writer} * cell_.write_rows + (there ? t : 0);
    const float* mine = args_.raw + row * args_.shape.raw;
    const float4 key = *reinterpret_cast<const float4*>(mine + place * 4);
    value_ = *reinterpret_cast<const float2*>(mine + kKeys + first_col_ + place * 2);
    gate_ = mine[args_.shape.gate];
    *reinterpret_cast<float4*>(&shared_.keys[t][place * 4]) = there ? key : float4{};
  }
  static_assert(kKeys == 16 * 4 && kCols == 16 * 2 && RowFeatures::kLanes == 16, "16 threads a row");

  // phi (rounded to 10 bits of mantissa), 1 / den, gamma and beta.
  __device__ void make_features() const {
    constexpr int kLanes = RowFeatures::kLanes;
    if (threadIdx.x >= kTokens * kLanes) return;
    const int t = threadIdx.x / kLanes;
    const RowFeatures row(shared_.keys[t]);
    float squares = row.squares(), den = 0.0f;
    const float scale = feature_scale(args_.shape, squares);
    const bool divides = args_.shape.denominator && cell_.memory != nullptr;
    if (divides) {
      float z[RowFeatures::kRolls][RowFeatures::kEach];
      RowFeatures::load(shared_.z, z);
      den = row.dot(z);
    }
    den = den * scale + 1e-5f;
    squares *= scale * scale;
    if (RowFeatures::lane() == 0) {
      float gamma = 1.0f;
      if (divides && args_.shape.correction) {
        gamma = 1.0f - den / (squares + (args_.shape.paper ? 1e-5f : 0.0f));
        gamma = fminf(fmaxf(gamma, 0.0f), 1.0f);
      }
      shared_.gamma[t] = gamma;
      shared_.inverse[t] = cell_.memory == nullptr ? 0.0f : divides ? 1.0f / den : 1.0f;
      const float gate = gate_ + args_.bias[cell_.stack];
      shared_.beta[t] = t < cell_.write_rows ? 1.0f / (1.0f + expf(-gate)) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < RowFeatures::kRolls; ++j) {
      float* out = &shared_.phi[t][RowFeatures::first(j)];
#pragma unroll
      for (int i = 0; i < RowFeatures::kEach; i += 4) {
        *reinterpret_cast<uint4*>(out + i) =
            make_uint4(to_tf32(row.phi[j][i] * scale), to_tf32(row.phi[j][i + 1] * scale),
                       to_tf32(row.phi[j][i + 2] * scale), to_tf32(row.phi[j][i + 3] * scale));
      }
    }
  }

  // phi A over this warp's features.
  __device__ void add_old() const {
    float sum[kCols / 8][4] = {};
    const int g = lane() / 4;
#pragma unroll
    for (int k = 0; k < 32; k += 8) {
      const int f = warp() * 32 + k + lane() % 4 * 2;
      const uint2 low = *reinterpret_cast<const uint2*>(&shared_.phi[g][f]);
      const uint2 high = *reinterpret_cast<const uint2*>(&shared_.phi[g + 8][f]);
      const uint32_t a[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
      for (int n = 0; n < kCols / 8; ++n) {
        multiply_add_tf32(sum[n], a, half_up(shared_.matrix[f][n * 8 + g]), half_up(shared_.matrix[f + 1][n * 8 + g]));
      }
    }
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) {
      const int e = old_place(g, n * 8 + lane() % 4 * 2);  // the same for row g + 8
      *reinterpret_cast<float2*>(&shared_.old[warp()][g][e]) = make_float2(sum[n][0], sum[n][1]);
      *reinterpret_cast<float2*>(&shared_.old[warp()][g + 8][e]) = make_float2(sum[n][2], sum[n][3]);
    }
  }

  // delta = beta (v - phi A / den), rounded to 10 bits of mantissa.
  __device__ void make_delta() const {
    if (threadIdx.x >= kTokens * kCols / 2) return;
    const int t = threadIdx.x / (kCols / 2), e = threadIdx.x % (kCols / 2) * 2;
    float2 old = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part = *reinterpret_cast<const float2*>(&shared_.old[w][t][old_place(t, e)]);
      old.x += part.x, old.y += part.y;
    }
    const float beta = shared_.beta[t], inverse = shared_.inverse[t];
    const bool there = t < cell_.write_rows;
    const float x = there ? beta * (value_.x - old.x * inverse) : 0.0f;
    const float y = there ? beta * (value_.y - old.y * inverse) : 0.0f;
    *reinterpret_cast<uint2*>(&shared_.delta[t][delta_place(e)]) = make_uint2(to_tf32(x), to_tf32(y));
  }

  // A' = A + phi^T delta for this warp's features, four neighbours of which are a lane's.
  __device__ void update() const {
    const int g = lane() / 4, q = lane() % 4, f0 = warp() * 32 + g * 4;
    float sum[2][kCols / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kTokens; k += 8) {
      const uint4 low = *reinterpret_cast<const uint4*>(&shared_.phi[k + q][f0]);
      const uint4 high = *reinterpret_cast<const uint4*>(&shared_.phi[k + q + 4][f0]);
      const uint32_t a[2][4] = {{low.x, low.y, high.x, high.y}, {low.z, low.w, high.z, high.w}};
#pragma unroll
      for (int n = 0; n < kCols / 8; ++n) {
        const uint32_t b0 = __float_as_uint(shared_.delta[k + q][n * 8 + g]);
        const uint32_t b1 = __float_as_uint(shared_.delta[k + q + 4][n * 8 + g]);
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_add_tf32(sum[m][n], a[m], b0, b1);
      }
    }
    float* after = cell_.next_memory + int64_t{f0} * args_.shape.values + first_col_ + q * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < kCols / 8; n += 2) {
        const float* low = sum[i / 2][n] + i % 2 * 2;
        const float* high = sum[i / 2][n + 1] + i % 2 * 2;
        const float4 before = *reinterpret_cast<const float4*>(&shared_.matrix[f0 + i][n * 8 + q * 4]);
        *reinterpret_cast<float4*>(after + i * int64_t{args_.shape.values} + n * 8) =
            make_float4(before.x + low[0], before.y + low[1], before.z + high[0], before.w + high[1]);
      }
    }
  }

  // z' = z + sum gamma phi, and the statistics.
  __device__ void write_rest() const {
    const int count = cell_.write_rows;
    float* after = cell_.next_memory + args_.shape.matrix();
    if (args_.shape.denominator) {
      float sum = shared_.z[threadIdx.x];
      for (int t = 0; t < count; ++t) sum += shared_.gamma[t] * shared_.phi[t][threadIdx.x];
      after[threadIdx.x] = sum;
      after += kFeatures;
    }
    if (warp() != 0) return;
    const bool there = lane() < count;
    const float gamma = there ? shared_.gamma[lane()] : 0.0f;
    const float sum = warp_sum(gamma), betas = warp_sum(there ? shared_.beta[lane()] : 0.0f);
    const float least = -warp_max(there ? -gamma : -INFINITY), greatest = warp_max(there ? gamma : -INFINITY);
    if (lane() != 0) return;
    after[0] = sum / static_cast<float>(count);
    after[1] = least;
    after[2] = greatest;
    after[3] = betas / static_cast<float>(count);
  }

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }

  const FewWrite& args_;
  Shared& shared_;
  const DevCell& cell_;
  int first_col_;
  float2 value_ = {};
  float gate_ = 0.0f;
};

// grid: columns, cells
__global__ void __launch_bounds__(kThreads, 2) write_few(const __grid_constant__ FewWrite args) {
  extern __shared__ float4 memory[];
  let_next_kernel_start();
  const DevCell& cell = args.batch.cells[blockIdx.y];
  if (cell.next_memory == nullptr) {
    wait_for_kernel_before();
    return;
  }
  FewWriter(args, *reinterpret_cast<Shared*>(memory), cell).run();
}

}  // namespace

bool writes_few(DType dtype, const MemoryShape& shape, int64_t rows) {
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return most >= static_cast<int>(sizeof(Shared)) && dtype != DType::f32 && rows <= kTokens &&
         has_row_features(shape) && !shape.gating && shape.values % kCols == 0 && shape.raw % 4 == 0;
}

void launch_few_write(const FewWrite& write, cudaStream_t stream) {
  check(cudaFuncSetAttribute(write_few, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)),
        "cudaFuncSetAttribute");
  const dim3 grid(write.shape.values / kCols, write.batch.cell_count);
  launch_overlapped(write_few, grid, dim3(kThreads), sizeof(Shared), stream, write);
}

}  // namespace armt::cuda
