// Rows of bfloat16, or their norms, to 8 bits: a block a row, which stays in registers between the search for its
// largest value and the conversion.
#include <cuda_fp8.h>

#include "check.h"
#include "fp8.h"
#include "overlap.cuh"
#include "types.cuh"

namespace armt::cuda {
namespace {

constexpr int kPacks = 4;  // of 8 values a thread

using Half = __nv_bfloat16;

// The part of a row that a thread holds.
struct Held {
  float v[kPacks][8];
};

// Calls body(pack, first column) for the packs of this thread.
template <class Body>
__device__ void each_pack(int width, const Body& body) {
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int i = (p * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * 8;
    if (i < width) body(p, i);
  }
}

__device__ float block_max(float x, float* partial) {
  x = warp_max(x);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  float most = 0.0f;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) most = fmaxf(most, partial[w]);
  return most;
}

__device__ void load_row(Held& held, const Half* in, int width) {
  each_pack(width, [&](int p, int i) {
    const Pack<Half> pack = *reinterpret_cast<const Pack<Half>*>(in + i);
#pragma unroll
    for (int k = 0; k < 8; ++k) held.v[p][k] = to_float(pack.v[k]);
  });
}

// A value that is no number stays none: infinities too, since their row's scale is infinite.
__device__ void store_row(const Held& held, __nv_fp8_e4m3* out, float* scale, int width, float* partial) {
  float most = 0.0f;
  each_pack(width, [&](int p, int) {
#pragma unroll
    for (int k = 0; k < 8; ++k) most = fmaxf(most, fabsf(held.v[p][k]));
  });
  most = block_max(most, partial);
  const float down = most > 0.0f ? kFp8Largest / most : 0.0f;
  if (threadIdx.x == 0) *scale = most / kFp8Largest;
  each_pack(width, [&](int p, int i) {
    uint32_t words[2];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 pair = {held.v[p][2 * k] * down, held.v[p][2 * k + 1] * down};
      const uint32_t both = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
      words[k / 2] = k % 2 == 0 ? both : words[k / 2] | both << 16;
    }
    *reinterpret_cast<uint2*>(out + i) = {words[0], words[1]};
  });
}

// The norm of a row, in place; as norms.cu has it.
__device__ void norm_row(Held& held, const float* weight, const float* bias, int width, float eps, bool rms,
                         float* partial) {
  float mean = 0.0f, sum = 0.0f;
  if (!rms) {
    each_pack(width, [&](int p, int) {
#pragma unroll
      for (int k = 0; k < 8; ++k) sum += held.v[p][k];
    });
    mean = block_sum(sum, partial) / static_cast<float>(width);
  }
  float squares = 0.0f;
  each_pack(width, [&](int p, int) {
#pragma unroll
    for (int k = 0; k < 8; ++k) squares += (held.v[p][k] - mean) * (held.v[p][k] - mean);
  });
  const float scale = rsqrtf(block_sum(squares, partial) / static_cast<float>(width) + eps);
  each_pack(width, [&](int p, int i) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      held.v[p][k] = (held.v[p][k] - mean) * scale * weight[i + k] + (bias != nullptr ? bias[i + k] : 0.0f);
    }
  });
}

__global__ void quantise_kernel(const Half* in, __nv_fp8_e4m3* out, float* scale, int width) {
  __shared__ float partial[32];
  const int64_t row = blockIdx.x;
  Held held;
  load_row(held, in + row * width, width);
  store_row(held, out + row * width, scale + row, width, partial);
}

template <bool normed>
__global__ void quantise_batch_kernel(View in, __nv_fp8_e4m3* out, float* scale, Batch batch, Fp8Norm norm) {
  __shared__ float partial[32];
  let_next_kernel_start();
  wait_for_kernel_before();
  const DevGroup& group = batch.groups[blockIdx.y];
  if (blockIdx.x >= group.rows) return;
  const int64_t row = group.scratch + blockIdx.x;
  const int width = static_cast<int>(in.width);
  Held held;
  load_row(held, row_of<Half>(in, group, blockIdx.x), width);
  if constexpr (normed) {
    const int64_t offset = group.stack * in.width;
    const float* bias = norm.bias != nullptr ? norm.bias + offset : nullptr;
    norm_row(held, norm.weight + offset, bias, width, norm.eps, norm.rms, partial);
  }
  store_row(held, out + row * in.width, scale + row, width, partial);
}

int threads_for(int64_t width) {
  return static_cast<int>((width + 8 * kPacks * 32 - 1) / (8 * kPacks * 32) * 32);
}

}  // namespace

bool quantises(int64_t width) {
  return width % 16 == 0 && width <= 1024 * 8 * kPacks;
}

void launch_quantise(const void* in, void* out, float* scale, int64_t count, int64_t width, cudaStream_t stream) {
  if (count == 0) return;
  quantise_kernel<<<static_cast<unsigned>(count), threads_for(width), 0, stream>>>(
      static_cast<const Half*>(in), static_cast<__nv_fp8_e4m3*>(out), scale, static_cast<int>(width));
  check_launch("conversion of weights to 8 bits");
}

void launch_quantise(const View& in, void* out, float* scale, const Batch& batch, const Fp8Norm& norm,
                     cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(batch.max_group_rows), static_cast<unsigned>(batch.group_count));
  const auto kernel = norm.weight != nullptr ? quantise_batch_kernel<true> : quantise_batch_kernel<false>;
  launch_overlapped(kernel, grid, dim3(threads_for(in.width)), 0, stream, in, static_cast<__nv_fp8_e4m3*>(out), scale,
                    batch, norm);
  check_launch("conversion of rows to 8 bits");
}

}  // namespace armt::cuda
