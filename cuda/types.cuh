// Element types, 16-byte packs of them, and reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "armt/config.h"
#include "meta.h"

namespace armt::cuda {

template <class T>
struct Type {
  using type = T;
};

// Calls `body` with the Type of `dtype`.
template <class Body>
void dispatch(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32:
      return body(Type<float>{});
    case DType::bf16:
      return body(Type<__nv_bfloat16>{});
    case DType::f16:
      return body(Type<__half>{});
  }
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes that stay what they are while the kernel runs, and that this multiprocessor reads once. The request leaves
// where it stands.
template <class Type>
__device__ Type load_once(const void* from) {
  uint4 bits;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(from));
  return reinterpret_cast<const Type&>(bits);
}

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ inline float to_float(__half x) {
  return __half2float(x);
}

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Two neighbours in one register, the first in the low half.
template <class T>
__device__ uint32_t pack_pair(float low, float high);
template <>
__device__ inline uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ inline uint32_t pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// 16 bytes of T.
template <class T>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(T);
  T v[kCount];
};

template <class T>
__device__ T* row_of(const View& view, const DevGroup& group, int64_t r) {
  return static_cast<T*>(view.data) + ((view.scratch ? group.scratch : group.row) + r) * view.width;
}

template <class T>
__device__ T* row_of(const View& view, const DevCell& cell, int64_t r) {
  return static_cast<T*>(view.data) + ((view.scratch ? cell.scratch : cell.row) + r) * view.width;
}

// The cell that holds row r of a group of the batch.
__device__ inline const DevCell& cell_of(const Batch& batch, const DevGroup& group, int64_t r) {
  return batch.cells[group.cell_begin - batch.cell_begin + batch.rows[group.row + r].cell];
}

// Place of element d of row r in one head's part of a page [page_rows, kv_row]. Rows of whole 64s lie in slabs of 64
// columns whose chunks of 8 are exchanged as matrix instructions expect 16-bit elements in shared memory: a tile of 64
// rows of a slab is one copy.
__device__ inline int64_t kv_at(int r, int d, int kv_row, int page_rows) {
  if (kv_row % 64 != 0) return static_cast<int64_t>(r) * kv_row + d;
  return static_cast<int64_t>(d / 64) * page_rows * 64 + r * 64 + ((d % 64 / 8) ^ (r & 7)) * 8 + d % 8;
}
// Where row r, a multiple of 8, begins.
__device__ inline int64_t kv_tile(int r, int kv_row) {
  return static_cast<int64_t>(r) * (kv_row % 64 != 0 ? kv_row : 64);
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// Sum over the block, the same in every thread. `partial` [32] is shared memory.
__device__ inline float block_sum(float x, float* partial) {
  x = warp_sum(x);
  const int warps = blockDim.x / 32;
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < warps; ++w) sum += partial[w];
  return sum;
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace armt::cuda
