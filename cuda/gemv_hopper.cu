// Dense layers of a few rows on Hopper GPUs: bound by reading the weights once. A block a multiprocessor; each of its
// warps takes some neighbouring rows of the weights, which the bulk copy engine brings through a ring of its own. The
// ring is filled before the kernel waits for the one before it: weights are constant. Two kernels fit beside each
// other, so that the memory always has work.
#include <algorithm>

#include "activation.cuh"
#include "check.h"
#include "gemv.cuh"
#include "hopper.cuh"

namespace armt::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32, kPack = 8;
constexpr int kMostSlab = 2048, kMostStages = 8, kRingBytes = 12 * 1024;  // a warp's
constexpr int64_t kMostShared = 200 * 1024;

struct StreamShape {
  int slab = 0, slabs = 0;  // elements of a row of the weights that come in one copy, and copies of a row
  int stages = 0;           // slabs in the ring of a warp
  int columns = 0;          // of a warp
};

StreamShape stream_shape(const FewProduct& product, int processors) {
  StreamShape shape;
  shape.slabs = static_cast<int>(ceil_div(product.depth, kMostSlab));
  shape.slab = static_cast<int>(ceil_div(product.depth, int64_t{kPack} * shape.slabs)) * kPack;
  shape.stages = std::min(kMostStages, kRingBytes / (shape.slab * 2));
  shape.columns = static_cast<int>(ceil_div(product.cols, int64_t{processors} * kWarps));
  return shape;
}

// Bytes: rings of the warps, the norm's weight and bias, input rows.
int64_t shared_bytes(const FewProduct& product, const StreamShape& shape, int rows) {
  const int64_t norms = product.norm_weight != nullptr ? 2 * product.depth * 4 : 0;
  return int64_t{kWarps} * shape.stages * shape.slab * 2 + norms + rows * product.depth * 2;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// One warp's ring of slabs.
template <class T>
class Ring {
 public:
  __device__ Ring(T* memory, uint64_t* arrived, const FewProduct& args, const StreamShape& shape, int64_t first,
                  int count, int sides)
      : memory_(memory), arrived_(arrived), args_(args), shape_(shape), first_(first), sides_(sides) {
    units_ = count * sides * shape.slabs;
  }

  // By lane 0.
  __device__ void fill() {
    for (int i = 0; i < shape_.stages; ++i) init_barrier(arrived_[i], 1);
    publish_barriers();
    for (int i = 0; i < shape_.stages; ++i) start(i);
  }

  // Calls body(slab, its elements); its place is then filled again.
  template <class Body>
  __device__ void take(const Body& body) {
    wait_for(arrived_[stage_], parity_);
    body(memory_ + stage_ * shape_.slab);
    __syncwarp();
    if (threadIdx.x % 32 == 0) start(stage_);
    if (++stage_ < shape_.stages) return;
    stage_ = 0;
    parity_ ^= 1;
  }

 private:
  // The slabs of a column follow each other, then those of its other side (gated), then the next column's.
  __device__ void start(int stage) {
    if (next_ == units_) return;
    ++next_;
    const int begin = slab_ * shape_.slab, depth = static_cast<int>(args_.depth);
    const int bytes = min(shape_.slab, depth - begin) * static_cast<int>(sizeof(T));
    const T* row = static_cast<const T*>(args_.weight) + (side_ * args_.cols + first_ + column_) * args_.depth;
    expect_bytes(arrived_[stage], bytes);
    copy_bulk(memory_ + stage * shape_.slab, row + begin, bytes, arrived_[stage]);
    if (++slab_ < shape_.slabs) return;
    slab_ = 0;
    if (++side_ < sides_) return;
    side_ = 0;
    ++column_;
  }

  T* memory_;
  uint64_t* arrived_;
  const FewProduct& args_;
  const StreamShape& shape_;
  int64_t first_;
  int sides_, units_;
  int next_ = 0, slab_ = 0, side_ = 0, column_ = 0;  // to be started
  int stage_ = 0, parity_ = 0;                       // to be taken
};

#endif

template <class T, class Out, int rows, bool gated>
__global__ void __launch_bounds__(kThreads, 2)
    stream_kernel(const __grid_constant__ FewProduct args, const __grid_constant__ StreamShape shape) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kSides = gated ? 2 : 1;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ uint64_t arrived[kWarps][kMostStages];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, depth = static_cast<int>(args.depth);
  const int ring_elements = shape.stages * shape.slab;
  T* rings = reinterpret_cast<T*>(memory);
  float* norms = reinterpret_cast<float*>(rings + kWarps * ring_elements);
  T* x = reinterpret_cast<T*>(norms + (args.norm_weight != nullptr ? 2 * depth : 0));  // [rows, depth]
  // Neighbouring warps' columns lie apart, so that all multiprocessors have the same share of them.
  const int64_t first = (static_cast<int64_t>(warp) * gridDim.x + blockIdx.x) * shape.columns;
  const int count = static_cast<int>(max(int64_t{0}, min(int64_t{shape.columns}, args.cols - first)));
  Ring<T> ring(rings + warp * ring_elements, arrived[warp], args, shape, first, count, kSides);
  if (lane == 0) ring.fill();
  let_next_kernel_start();
  if (args.norm_weight != nullptr) {
    for (int i = threadIdx.x; i < depth; i += kThreads) {
      norms[i] = args.norm_weight[i];
      norms[depth + i] = args.norm_bias != nullptr ? args.norm_bias[i] : 0.0f;
    }
  }
  wait_for_kernel_before();
  load_rows<T, rows, kThreads>(args, norms, norms + depth, x);

  for (int base = 0; base < count; base += 32) {
    // Lane l ends the column base + l.
    const bool mine = base + lane < count;
    const int64_t column = first + base + lane;
    Out* out = static_cast<Out*>(args.out) + column;
    float bias[kSides] = {}, before[rows] = {}, kept[kSides][rows] = {};
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      if (mine && args.bias != nullptr)
        bias[side] = to_float(static_cast<const T*>(args.bias)[side * args.cols + column]);
    }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (mine && args.add && r < args.rows) before[r] = to_float(out[r * args.ld_out]);
    }
    for (int i = 0; i < min(32, count - base); ++i) {
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
        float sum[rows] = {};
        for (int slab = 0; slab < shape.slabs; ++slab) {
          ring.take([&](const T* weights) {
            const int begin = slab * shape.slab, length = min(shape.slab, depth - begin);
#pragma unroll 4
            for (int k = lane * kPack; k < length; k += 32 * kPack) {
              const Pack<T> w = *reinterpret_cast<const Pack<T>*>(weights + k);
#pragma unroll
              for (int r = 0; r < rows; ++r) {
                const Pack<T> in = *reinterpret_cast<const Pack<T>*>(x + r * depth + begin + k);
#pragma unroll
                for (int j = 0; j < kPack; ++j) sum[r] = fmaf(to_float(w.v[j]), to_float(in.v[j]), sum[r]);
              }
            }
          });
        }
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          const float whole = warp_sum(sum[r]);
          if (lane == i) kept[side][r] = whole;
        }
      }
    }
    if (!mine) continue;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (r >= args.rows) continue;
      float value = kept[0][r] + bias[0];
      if (args.activate) value = activated(args.kind, value);
      if constexpr (gated) value *= kept[1][r] + bias[1];
      out[r * args.ld_out] = from_float<Out>(value + before[r]);
    }
  }
#else
  __trap();  // built for 9.0 without its own instructions (90 instead of 90a)
#endif
}

template <class T, class Out, int rows, bool gated>
bool launch(const FewProduct& product, int processors, cudaStream_t stream) {
  const auto kernel = stream_kernel<T, Out, rows, gated>;
  const StreamShape shape = stream_shape(product, processors);
  const int64_t bytes = shared_bytes(product, shape, rows);
  if (bytes > kMostShared) return false;
  if (!has_hopper_code(reinterpret_cast<const void*>(kernel))) return false;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMostShared)),
        "cudaFuncSetAttribute");
  launch_overlapped(kernel, dim3(processors), dim3(kThreads), static_cast<size_t>(bytes), stream, product, shape);
  return true;
}

template <class T, class Out, bool gated>
bool launch_rows(const FewProduct& product, int processors, cudaStream_t stream) {
  if (product.rows == 1) return launch<T, Out, 1, gated>(product, processors, stream);
  if (product.rows == 2) return launch<T, Out, 2, gated>(product, processors, stream);
  if (product.rows <= 4) return launch<T, Out, 4, gated>(product, processors, stream);
  return launch<T, Out, 8, gated>(product, processors, stream);
}

}  // namespace

bool launch_streamed_product(DType dtype, const FewProduct& product, int processors, cudaStream_t stream) {
  bool done = false;
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      if (product.float_out) {
        done = launch_rows<T, float, false>(product, processors, stream);
      } else if (product.gated) {
        done = launch_rows<T, T, true>(product, processors, stream);
      } else {
        done = launch_rows<T, T, false>(product, processors, stream);
      }
    }
  });
  return done;
}

}  // namespace armt::cuda
