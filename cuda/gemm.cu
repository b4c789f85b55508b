// Matrix products by a plain kernel, for shapes that cuBLASLt declines.
#include "check.h"
#include "lt.h"
#include "tile_product.cuh"

namespace armt::cuda {
namespace {

template <class T, class Out>
__global__ void simple_kernel(Product p) {
  __shared__ TileProduct::Shared shared;
  const int64_t g = blockIdx.z;
  const T* in = static_cast<const T*>(p.in) + g * p.in_stride;
  const T* weight = static_cast<const T*>(p.weight) + g * p.weight_stride;
  Out* out = static_cast<Out*>(p.out) + g * p.out_stride;
  const Out* bias = p.bias != nullptr ? static_cast<const Out*>(p.bias) + g * p.bias_stride : nullptr;
  const auto store = [&](int r, int n, float x) {
    Out& to = out[r * p.ld_out + n];
    if (bias != nullptr) x += to_float(bias[n]);
    if (p.add) x += to_float(to);
    if (p.fused == Fused::relu) x = fmaxf(x, 0.0f);
    if (p.fused == Fused::gelu) x = 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    to = from_float<Out>(x);
  };
  tile_product<true, false>(
      shared, blockIdx.y * TileProduct::kTile, blockIdx.x * TileProduct::kTile, static_cast<int>(p.rows),
      static_cast<int>(p.cols), static_cast<int>(p.depth), [&](int r, int k) { return to_float(in[r * p.ld_in + k]); },
      [&](int k, int n) { return to_float(weight[p.by_depth ? k * p.cols + n : n * p.depth + k]); }, store);
}

}  // namespace

void simple_multiply(const Product& product, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(product.cols, TileProduct::kTile)),
                  static_cast<unsigned>(ceil_div(product.rows, TileProduct::kTile)),
                  static_cast<unsigned>(product.batch));
  dispatch(product.type, [&](auto type) {
    using T = typename decltype(type)::type;
    if (product.out_type == DType::f32) {
      simple_kernel<T, float><<<grid, TileProduct::kThreads, 0, stream>>>(product);
    } else {
      simple_kernel<T, T><<<grid, TileProduct::kThreads, 0, stream>>>(product);
    }
  });
  check_launch("product");
}

}  // namespace armt::cuda
