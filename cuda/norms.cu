// Norms of rows: a warp a row where the row fits into its registers, else a block a row.
#include "check.h"
#include "overlap.cuh"
#include "slots.h"
#include "types.cuh"
#include "workspace.h"

namespace armt::cuda {
namespace {

constexpr int kThreads = 128;

// out = (x - mean) / sqrt(var + eps) * w + b, or without mean and bias for RMS. The row stays in registers.
template <class T, bool rms>
__device__ void norm_row(const T* in, T* out, const float* weight, const float* bias, int width, float eps) {
  constexpr int kCount = Pack<T>::kCount, kPacks = 4;
  __shared__ float partial[32];
  float x[kPacks][kCount];
  const bool whole = width % kCount == 0;
  const auto each = [&](auto&& body) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int i = (p * blockDim.x + threadIdx.x) * kCount;
      if (i < width) body(p, i);
    }
  };
  float sum = 0.0f;
  each([&](int p, int i) {
    if (whole) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(in + i);
#pragma unroll
      for (int k = 0; k < kCount; ++k) x[p][k] = to_float(pack.v[k]);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) x[p][k] = i + k < width ? to_float(in[i + k]) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum += x[p][k];
  });
  float mean = 0.0f;
  if (!rms) mean = block_sum(sum, partial) / static_cast<float>(width);
  float squares = 0.0f;
  each([&](int p, int i) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float d = i + k < width ? x[p][k] - mean : 0.0f;
      squares += d * d;
    }
  });
  const float scale = rsqrtf(block_sum(squares, partial) / static_cast<float>(width) + eps);
  each([&](int p, int i) {
    Pack<T> pack;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (i + k >= width) break;
      float y = (x[p][k] - mean) * scale * weight[i + k];
      if (bias != nullptr) y += bias[i + k];
      if (whole) {
        pack.v[k] = from_float<T>(y);
      } else {
        out[i + k] = from_float<T>(y);
      }
    }
    if (whole) *reinterpret_cast<Pack<T>*>(out + i) = pack;
  });
}

// The same by one warp, which holds the row as it was loaded; `width` is a multiple of a pack, and at most kPacks of
// them a lane.
template <class T, bool rms, int kPacks>
__device__ void norm_row_by_warp(const T* in, T* out, const float* weight, const float* bias, int width, float eps) {
  constexpr int kCount = Pack<T>::kCount;
  const int first = threadIdx.x % 32 * kCount;
  Pack<T> row[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int i = first + p * 32 * kCount;
    if (i < width) {
      row[p] = *reinterpret_cast<const Pack<T>*>(in + i);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) row[p].v[k] = from_float<T>(0.0f);
    }
  }
  float mean = 0.0f;
  if constexpr (!rms) {
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) sum += to_float(row[p].v[k]);
    }
    mean = warp_sum(sum) / static_cast<float>(width);
  }
  float squares = 0.0f;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (first + p * 32 * kCount >= width) continue;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float d = to_float(row[p].v[k]) - mean;
      squares += d * d;
    }
  }
  const float scale = rsqrtf(warp_sum(squares) / static_cast<float>(width) + eps);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int i = first + p * 32 * kCount;
    if (i >= width) continue;
#pragma unroll
    for (int k = 0; k < kCount; k += 4) {
      const float4 w = *reinterpret_cast<const float4*>(weight + i + k);
      float4 b = {};
      if (bias != nullptr) b = *reinterpret_cast<const float4*>(bias + i + k);
      const float* ws = &w.x;
      const float* bs = &b.x;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        T& x = row[p].v[k + j];
        x = from_float<T>((to_float(x) - mean) * scale * ws[j] + bs[j]);
      }
    }
    *reinterpret_cast<Pack<T>*>(out + i) = row[p];
  }
}

// Where the rows of a norm lie: of the groups of a batch, or one after another.
struct NormRows {
  View in, out;
  const DevGroup* groups = nullptr;  // null: `count` rows, one after another
  int64_t count = 0;
  const float* weight = nullptr;
  const float* bias = nullptr;
  int width = 0;
  float eps = 0.0f;
};

// The row of this block's `index`th row: body(in, out, weight, bias).
template <class T, class Body>
__device__ void with_norm_row(const NormRows& rows, int64_t index, const Body& body) {
  const int64_t width = rows.width;
  if (rows.groups == nullptr) {
    if (index >= rows.count) return;
    body(static_cast<const T*>(rows.in.data) + index * width, static_cast<T*>(rows.out.data) + index * width,
         rows.weight, rows.bias);
    return;
  }
  const DevGroup& group = rows.groups[blockIdx.y];
  if (index >= group.rows) return;
  const int64_t offset = group.stack * width;
  body(row_of<T>(rows.in, group, index), row_of<T>(rows.out, group, index), rows.weight + offset,
       rows.bias != nullptr ? rows.bias + offset : nullptr);
}

// A block a row.
template <class T, bool rms>
__global__ void norm_kernel(NormRows rows) {
  let_next_kernel_start();
  wait_for_kernel_before();
  with_norm_row<T>(rows, blockIdx.x, [&](const T* in, T* out, const float* weight, const float* bias) {
    norm_row<T, rms>(in, out, weight, bias, rows.width, rows.eps);
  });
}

// A warp a row.
template <class T, bool rms, int kPacks>
__global__ void __launch_bounds__(kThreads) norm_warp_kernel(NormRows rows) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  with_norm_row<T>(rows, index, [&](const T* in, T* out, const float* weight, const float* bias) {
    norm_row_by_warp<T, rms, kPacks>(in, out, weight, bias, rows.width, rows.eps);
  });
}

// Threads so that a row fits into the registers of norm_row.
int norm_threads(int64_t width, int64_t element) {
  const int64_t packs = ceil_div(width, 16 / element);
  int threads = 64;
  while (threads < 1024 && packs > threads * 2) threads *= 2;
  return threads;
}

template <class T, bool rms>
void launch_norm(const NormRows& rows, int64_t count, int64_t groups, cudaStream_t stream) {
  const int64_t packs = ceil_div(rows.width, 32 * Pack<T>::kCount);  // of a lane
  const auto by_warp = [&](auto kernel) {
    const dim3 grid(static_cast<unsigned>(ceil_div(count, kThreads / 32)), static_cast<unsigned>(groups));
    launch_overlapped(kernel, grid, dim3(kThreads), 0, stream, rows);
  };
  if (rows.width % Pack<T>::kCount != 0 || packs > 16) {
    const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(groups));
    launch_overlapped(norm_kernel<T, rms>, grid, dim3(norm_threads(rows.width, sizeof(T))), 0, stream, rows);
  } else if (packs <= 2) {
    by_warp(norm_warp_kernel<T, rms, 2>);
  } else if (packs <= 4) {
    by_warp(norm_warp_kernel<T, rms, 4>);
  } else if (packs <= 8) {
    by_warp(norm_warp_kernel<T, rms, 8>);
  } else {
    by_warp(norm_warp_kernel<T, rms, 16>);
  }
  check_launch("norm");
}

void launch_norm(DType dtype, NormKind kind, const NormRows& rows, int64_t count, int64_t groups, cudaStream_t stream) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (kind == NormKind::rms) {
      launch_norm<T, true>(rows, count, groups, stream);
    } else {
      launch_norm<T, false>(rows, count, groups, stream);
    }
  });
}

}  // namespace

void CudaBackend::norm(Vector which, Groups groups, const Rows& in, const Rows& out) {
  const Entry entry(*this);
  if (active_.few) {  // the product that follows does it
    active_.norm = which;
    active_.norm_in = in;
    return;
  }
  const Part part = part_of(groups);
  if (part.batch.max_group_rows == 0) return;
  if (fp8_norm(which, part, in, out)) return;
  const NormRows rows = {.in = view(in),
                         .out = view(out),
                         .groups = part.batch.groups,
                         .weight = vectors_[static_cast<size_t>(which)].as<float>(),
                         .bias = vectors_[static_cast<size_t>(norm_bias(which))].as<float>(),
                         .width = static_cast<int>(in.width),
                         .eps = static_cast<float>(config_.decoder.norm_eps)};
  launch_norm(dtype_, config_.decoder.norm, rows, part.batch.max_group_rows, part.batch.group_count, stream());
}

void CudaBackend::final_norm(const Rows& in, const Rows& out, int64_t count) {
  const Entry entry(*this);
  if (count == 0) return;
  const NormRows rows = {.in = {.data = in.data, .width = in.width},
                         .out = {.data = out.data, .width = out.width},
                         .count = count,
                         .weight = vectors_[static_cast<size_t>(Vector::final_norm)].as<float>(),
                         .bias = vectors_[static_cast<size_t>(Vector::final_norm_bias)].as<float>(),
                         .width = static_cast<int>(in.width),
                         .eps = static_cast<float>(config_.decoder.norm_eps)};
  launch_norm(dtype_, config_.decoder.norm, rows, count, 1, stream());
}

}  // namespace armt::cuda
