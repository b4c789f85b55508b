// Matrix products by cuBLASLt, which is loaded at first use, so that the package imports on a machine without it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <tuple>

#include "armt/config.h"

namespace armt::cuda {

enum class Fused : uint8_t { none, gelu, relu };

// out[b][r, n] (+)= act(sum_k in[b][r, k] weight[b][n, k] + bias[b][n]), b < batch; strides in elements.
struct Product {
  const void* weight = nullptr;
  const void* in = nullptr;
  void* out = nullptr;
  const void* bias = nullptr;  // in the type of `out`, or null
  int64_t rows = 0, cols = 0, depth = 0, batch = 1;
  int64_t ld_in = 0, ld_out = 0;
  int64_t weight_stride = 0, in_stride = 0, out_stride = 0, bias_stride = 0;
  DType type = DType::f32;      // of weight and in
  DType out_type = DType::f32;  // `type` or f32
  bool add = false;
  bool by_depth = false;  // weight is [depth, cols] instead of [cols, depth]
  Fused fused = Fused::none;
};

// A place to run: a stream and what a product running on it may use as scratch.
struct ProductSpace {
  cudaStream_t stream = nullptr;
  void* data = nullptr;
  int64_t bytes = 0;
};

class Lt {
 public:
  Lt();
  ~Lt();
  Lt(const Lt&) = delete;
  Lt& operator=(const Lt&) = delete;

  void multiply(const Product& product, const ProductSpace& space);

 private:
  struct Plan;
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int>;
  Plan& plan_for(const Product& product, const ProductSpace& space);

  void* handle_ = nullptr;
  std::map<Key, std::unique_ptr<Plan>> plans_;
};

// The same product by a plain kernel, for shapes that the library has no kernel for.
void simple_multiply(const Product& product, cudaStream_t stream);

}  // namespace armt::cuda
