// Queries of a read and their features in one kernel (association_query.h; docs/mathematics.md).
//
// A block has some rows of one cell. One warp asks the bulk copy engine for rows and weights, as many as shared memory
// holds, weights before it waits for the kernel before; the others multiply, two of them the same queries, each with
// half of the depth. From the queries in shared memory 16 lanes a row make the features.
#include "association_query.h"
#include "check.h"
#include "mma.cuh"
#include "overlap.cuh"
#include "row_features.cuh"
#include "tensor_tiles.cuh"

namespace armt::cuda {
namespace {

constexpr int kKeys = RowFeatures::kKeys, kTile = 64, kParts = 2;  // columns of a tile, tiles of a stage
constexpr int kDepth = kParts * kTile;

constexpr int kStages = 6;
// Warps lie below each other by 16 rows, two beside each other, two behind each other; one more fetches.
constexpr int kWarps = kQueryRows / 16 * 4, kThreads = (kWarps + 1) * 32;

template <class T>
struct Shared {
  alignas(1024) T weights[kStages][kParts][kKeys * kTile];
  alignas(1024) T rows[kStages][kParts][kQueryRows * kTile];
  float queries[kQueryRows][kKeys + 4];
  alignas(16) float z[RowFeatures::kAll];
  uint64_t full[kStages], empty[kStages];
};

struct QueryMaps {
  CUtensorMap rows, weights;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Barrier of the warps that multiply.
template <int threads>
__device__ inline void sync_multipliers() {
  asm volatile("bar.sync 1, %0;" ::"n"(threads) : "memory");
}

template <class T>
class Query {
 public:
  __device__ Query(const QueryMaps& maps, const QueryFeatures& args, Shared<T>& shared, const DevCell& cell, int first)
      : maps_(maps),
        args_(args),
        shared_(shared),
        cell_(cell),
        first_(first),
        valid_(min(cell.rows - first, kQueryRows)),
        steps_(static_cast<int>(ceil_div(args.shape.width, kDepth))),
        row_(static_cast<int>(args.x.scratch ? cell.scratch : cell.row) + first),
        weight_row_(cell.stack * kKeys) {}

  __device__ void run() {
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) {
        init_barrier(shared_.full[s], 1);
        init_barrier(shared_.empty[s], kWarps);
      }
      publish_barriers();
    }
    __syncthreads();
    if (warp() == kWarps) {
      if (lane() == 0) fetch();
    } else {
      multiply();
      make_features();
    }
  }

 private:
  // By one thread: all stages, in order.
  __device__ void fetch() const {
    const int ahead = min(steps_, kStages);
    for (int step = 0; step < ahead; ++step) fetch_weights(step);
    wait_for_kernel_before();
    let_next_kernel_start();  // what follows may read memories, which the kernel before wrote
    for (int step = 0; step < ahead; ++step) fetch_rows(step);
    for (int step = ahead; step < steps_; ++step) {
      wait_for(shared_.empty[step % kStages], (step / kStages - 1) & 1);
      fetch_weights(step);
      fetch_rows(step);
    }
  }
  // Tiles are whole: beyond the matrix they are zeros, beyond the cell its neighbour's rows, which no one uses.
  __device__ void fetch_weights(int step) const {
    const int stage = step % kStages;
    const int more = step == 0 && args_.shape.denominator ? sizeof(shared_.z) : 0;
    expect_bytes(shared_.full[stage], sizeof(shared_.weights[0]) + sizeof(shared_.rows[0]) + more);
    for (int part = 0; part < kParts; ++part) {
      copy_tile(shared_.weights[stage][part], maps_.weights, step * kDepth + part * kTile, weight_row_,
                shared_.full[stage]);
    }
  }
  __device__ void fetch_rows(int step) const {
    const int stage = step % kStages;
    for (int part = 0; part < kParts; ++part) {
      copy_tile(shared_.rows[stage][part], maps_.rows, step * kDepth + part * kTile, row_, shared_.full[stage]);
    }
    if (step == 0 && args_.shape.denominator) {  // behind the first rows: it is needed last
      copy_bulk(shared_.z, args_.shape.normaliser(cell_.memory, 0), sizeof(shared_.z), shared_.full[stage]);
    }
  }

  // shared.queries = x W^T; rows behind the cell's last are anything.
  __device__ void multiply() const {
    const int row0 = warp() / 4 * 16, col0 = warp() / 2 % 2 * (kKeys / 2), half = warp() % 2;
    float sum[kKeys / 16][4] = {};
    for (int step = 0; step < steps_; ++step) {
      const int stage = step % kStages;
      wait_for(shared_.full[stage], step / kStages & 1);
#pragma unroll
      for (int i = 0; i < kDepth / 32; ++i) {
        const T* left = shared_.rows[stage][i / (kTile / 32)];
        const T* right = shared_.weights[stage][i / (kTile / 32)];
        const int k = i % (kTile / 32) * 32 + half * 16;
        uint32_t a[4];
        load_matrices(a, left + swizzled<kTile>(row0 + lane() % 16, k + lane() / 16 * 8));
#pragma unroll
        for (int n = 0; n < kKeys / 32; ++n) {
          uint32_t b[4];
          load_matrices(b,
                        right + swizzled<kTile>(col0 + n * 16 + lane() / 16 * 8 + lane() % 8, k + lane() / 8 % 2 * 8));
          multiply_add<T>(sum[2 * n], a, b[0], b[1]);
          multiply_add<T>(sum[2 * n + 1], a, b[2], b[3]);
        }
      }
      __syncwarp();
      if (lane() == 0) arrive(shared_.empty[stage]);
    }
    float* out = &shared_.queries[row0 + lane() / 4][col0 + lane() % 4 * 2];
    if (half == 1) add_to<false>(out, sum);
    sync_multipliers<kWarps * 32>();
    if (half == 0) add_to<true>(out, sum);
    sync_multipliers<kWarps * 32>();
  }
  // A warp's part of the queries, in place of what is there or added to it.
  template <bool add>
  __device__ static void add_to(float* out, const float (&sum)[kKeys / 16][4]) {
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float2& at = *reinterpret_cast<float2*>(out + n * 8 + i * 8 * (kKeys + 4));
        float2 before = {};
        if constexpr (add) before = at;
        at = make_float2(before.x + sum[n][2 * i], before.y + sum[n][2 * i + 1]);
      }
    }
  }

  __device__ void make_features() const {
    float z[RowFeatures::kRolls][RowFeatures::kEach] = {};
    if (args_.shape.denominator) RowFeatures::load(shared_.z, z);
    constexpr int kAtOnce = kWarps * 32 / RowFeatures::kLanes;
    __nv_bfloat16* out = args_.phi + (cell_.scratch + first_) * RowFeatures::kAll;
#pragma unroll 2
    for (int r = threadIdx.x / RowFeatures::kLanes; r < kQueryRows; r += kAtOnce) {
      const RowFeatures row(shared_.queries[r]);
      float scale = feature_scale(args_.shape, args_.shape.normalise ? row.squares() : 1.0f);
      if (args_.shape.denominator) scale /= row.dot(z) * scale + 1e-5f;
      if (r >= valid_) continue;
#pragma unroll
      for (int j = 0; j < RowFeatures::kRolls; ++j) {
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          packed[i] = pack_pair<__nv_bfloat16>(row.phi[j][2 * i] * scale, row.phi[j][2 * i + 1] * scale);
        }
        *reinterpret_cast<uint4*>(out + int64_t{r} * RowFeatures::kAll + RowFeatures::first(j)) =
            make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
    }
  }

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }

  const QueryMaps& maps_;
  const QueryFeatures& args_;
  Shared<T>& shared_;
  const DevCell& cell_;
  int first_, valid_, steps_;
  int row_, weight_row_;  // where its rows begin
};

#endif

// grid: rows, cells
template <class T>
__global__ void __launch_bounds__(kThreads)
    read_queries(const __grid_constant__ QueryMaps maps, const __grid_constant__ QueryFeatures args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];
  const DevCell& cell = args.batch.cells[blockIdx.y];
  const int first = blockIdx.x * kQueryRows;
  if (cell.memory == nullptr || first >= cell.rows) {
    wait_for_kernel_before();
    let_next_kernel_start();
    return;
  }
  Query<T>(maps, args, *reinterpret_cast<Shared<T>*>(memory), cell, first).run();
#else
  __trap();  // built for 9.0 without its own instructions (90 instead of 90a)
#endif
}

template <class T>
void launch(const QueryFeatures& query, cudaStream_t stream) {
  constexpr size_t kBytes = sizeof(Shared<T>);
  static_assert(kBytes <= 227 * 1024);
  check(cudaFuncSetAttribute(read_queries<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "cudaFuncSetAttribute");
  const int64_t width = query.shape.width;
  const QueryMaps maps = {.rows = tiles_of(query.x.data, query.x_rows, width, 2, kQueryRows),
                          .weights = tiles_of(query.weights, query.weight_rows, width, 2, kKeys)};
  const dim3 grid(static_cast<unsigned>(ceil_div(query.batch.max_cell_rows, kQueryRows)), query.batch.cell_count);
  launch_overlapped(read_queries<T>, grid, dim3(kThreads), kBytes, stream, maps, query);
}

}  // namespace

bool makes_query_features(DType dtype, const MemoryShape& shape) {
  return has_hopper_code(reinterpret_cast<const void*>(read_queries<__nv_bfloat16>)) && dtype != DType::f32 &&
         has_row_features(shape) && shape.width % 8 == 0;
}

void launch_query_features(DType dtype, const QueryFeatures& query, cudaStream_t stream) {
  if (dtype == DType::bf16) {
    launch<__nv_bfloat16>(query, stream);
  } else {
    launch<__half>(query, stream);
  }
}

}  // namespace armt::cuda
