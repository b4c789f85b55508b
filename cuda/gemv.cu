// A warp takes up to 2048 columns of one row of the weights, which it asks for before it waits for the kernel before:
// weights are constant, so only the input rows must be awaited (programmatic dependent launch, Hopper and newer).
#include <algorithm>

#include "activation.cuh"
#include "gemv.cuh"

namespace armt::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kPack = 8, kLoads = 8, kSlab = 32 * kPack * kLoads;
constexpr int64_t kMostRows = 8, kMostShared = 96 * 1024;

// grid: columns / (warps of a block / warps of a column)
template <class T, int rows, bool gated>
__global__ void __launch_bounds__(kThreads) few_product_kernel(FewProduct args, int parts) {
  constexpr int kSides = gated ? 2 : 1;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float sums[kWarps][kSides][rows];
  T* x = reinterpret_cast<T*>(memory);  // [rows, depth]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, depth = static_cast<int>(args.depth);
  const int columns = kWarps / parts, first = blockIdx.x * columns;
  const int part = warp % parts;
  const int64_t column = min(static_cast<int64_t>(first + warp / parts), args.cols - 1);
  let_next_kernel_start();
  uint4 weights[kSides][kLoads];
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
    const T* from = static_cast<const T*>(args.weight) + (side * args.cols + column) * depth;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int k = part * kSlab + (i * 32 + lane) * kPack;
      weights[side][i] = k < depth ? load_once<uint4>(from + k) : uint4{};
    }
  }
  wait_for_kernel_before();
  load_rows<T, rows, kThreads>(args, args.norm_weight, args.norm_bias, x);
  float sum[kSides][rows] = {};
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int k = part * kSlab + (i * 32 + lane) * kPack;
    if (k >= depth) break;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(x + r * depth + k);
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
        const T* w = reinterpret_cast<const T*>(&weights[side][i]);
#pragma unroll
        for (int j = 0; j < kPack; ++j) sum[side][r] = fmaf(to_float(w[j]), to_float(pack.v[j]), sum[side][r]);
      }
    }
  }
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const float whole = warp_sum(sum[side][r]);
      if (lane == 0) sums[warp][side][r] = whole;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < columns * rows; i += kThreads) {
    const int c = i / rows, r = i % rows;
    if (r >= args.rows || first + c >= args.cols) continue;
    float value[kSides];
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      value[side] =
          args.bias != nullptr ? to_float(static_cast<const T*>(args.bias)[side * args.cols + first + c]) : 0.0f;
      for (int p = 0; p < parts; ++p) value[side] += sums[c * parts + p][side][r];
    }
    if (args.activate) value[0] = activated(args.kind, value[0]);
    if constexpr (gated) value[0] *= value[1];
    T& to = static_cast<T*>(args.out)[r * args.ld_out + first + c];
    if (args.add) value[0] += to_float(to);
    to = from_float<T>(value[0]);
  }
}

int parts_of(const FewProduct& product) {
  int parts = 1;
  while (parts * int64_t{kSlab} < product.depth) parts *= 2;
  return parts;
}

template <class T, int rows, bool gated>
void launch(const FewProduct& product, cudaStream_t stream) {
  const int parts = parts_of(product);
  const auto kernel = few_product_kernel<T, rows, gated>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMostShared)),
        "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>(ceil_div(product.cols, kWarps / parts)));
  const auto bytes = static_cast<size_t>(rows * product.depth * static_cast<int64_t>(sizeof(T)));
  launch_overlapped(kernel, grid, dim3(kThreads), bytes, stream, product, parts);
}

template <class T, bool gated>
void launch_rows(const FewProduct& product, cudaStream_t stream) {
  if (product.rows == 1) return launch<T, 1, gated>(product, stream);
  if (product.rows == 2) return launch<T, 2, gated>(product, stream);
  if (product.rows <= 4) return launch<T, 4, gated>(product, stream);
  launch<T, 8, gated>(product, stream);
}

}  // namespace

bool few_fits(const FewProduct& product) {
  const int64_t bytes = (product.rows == 3 ? 4 : product.rows > 4 ? 8 : product.rows) * product.depth * 2;
  return product.rows >= 1 && product.rows <= kMostRows && product.depth % kPack == 0 && product.ld_in % kPack == 0 &&
         parts_of(product) <= kWarps && bytes <= kMostShared;
}

bool launch_few_product(DType dtype, const FewProduct& product, int processors, cudaStream_t stream) {
  if (launch_streamed_product(dtype, product, processors, stream)) return true;
  if (product.float_out) return false;
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      if (product.gated) return launch_rows<T, true>(product, stream);
      launch_rows<T, false>(product, stream);
    }
  });
  return true;
}

}  // namespace armt::cuda
