// Operations on single rows: embedding, copies, activations.
#include <algorithm>

#include "check.h"
#include "kernels.h"
#include "types.cuh"
#include "workspace.h"

namespace armt::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void probe() {}

struct Sources {
  const void* embedding = nullptr;
  const void* positions = nullptr;  // null: none
  const void* memory = nullptr;
  const void* sink = nullptr;
  const float* frequencies = nullptr;
  float2* angles = nullptr;  // of the rows' first
  int half = 0;              // rotary_dims / 2
  int width = 0;
};

// One block a row: its vector, and the rotation that its keys and queries will need.
template <class T>
__global__ void embed_kernel(const DevRow* rows, T* out, Sources from) {
  const DevRow row = rows[blockIdx.x];
  out += static_cast<int64_t>(blockIdx.x) * from.width;
  const T* vector = static_cast<const T*>(from.sink);
  if (row.source >= 0) {
    vector = static_cast<const T*>(from.embedding) + static_cast<int64_t>(row.source) * from.width;
  } else if (row.source <= -2) {
    vector = static_cast<const T*>(from.memory) + static_cast<int64_t>(-2 - row.source) * from.width;
  }
  const T* position = static_cast<const T*>(from.positions);
  if (position != nullptr) position += row.position * from.width;
  for (int i = threadIdx.x; i < from.width; i += kThreads) {
    float x = row.vector != nullptr ? row.vector[i] : to_float(vector[i]);
    if (position != nullptr) x += to_float(position[i]);
    out[i] = from_float<T>(x);
  }
  float2* angles = from.angles + static_cast<int64_t>(blockIdx.x) * from.half;
  for (int i = threadIdx.x; i < from.half; i += kThreads) {
    double sine, cosine;
    sincos(static_cast<double>(row.position) * from.frequencies[i], &sine, &cosine);
    angles[i] = make_float2(static_cast<float>(cosine), static_cast<float>(sine));
  }
}

template <class T>
__global__ void gather_kernel(const T* from, const DevRow* from_rows, const int64_t* index, T* to, DevRow* to_rows,
                              int width) {
  const int64_t row = index[blockIdx.x];
  from += row * width;
  to += static_cast<int64_t>(blockIdx.x) * width;
  constexpr int kCount = Pack<T>::kCount;
  if (width % kCount == 0) {
    for (int i = threadIdx.x; i < width / kCount; i += kThreads) {
      reinterpret_cast<Pack<T>*>(to)[i] = reinterpret_cast<const Pack<T>*>(from)[i];
    }
  } else {
    for (int i = threadIdx.x; i < width; i += kThreads) to[i] = from[i];
  }
  if (threadIdx.x == 0) to_rows[blockIdx.x] = from_rows[row];
}

template <class To, class From>
__global__ void convert_kernel(const From* from, To* to, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) to[i] = from_float<To>(to_float(from[i]));
}

template <ActivationKind kind>
__device__ float activated(float x) {
  if constexpr (kind == ActivationKind::relu) return fmaxf(x, 0.0f);
  if constexpr (kind == ActivationKind::silu) return x / (1.0f + expf(-x));
  if constexpr (kind == ActivationKind::gelu_erf) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

// A pack of outputs a thread.
template <class T, ActivationKind kind, bool gated>
__global__ void activate_kernel(Batch batch, View up, View out, int64_t width) {
  constexpr int kCount = Pack<T>::kCount;
  const DevGroup& group = batch.groups[blockIdx.y];
  const int64_t packs = ceil_div(width, kCount);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t r = index / packs, i = index % packs * kCount;
  if (r >= group.rows) return;
  const T* in = row_of<T>(up, group, r) + i;
  T* to = row_of<T>(out, group, r) + i;
  if (width % kCount == 0) {
    const Pack<T> gate = *reinterpret_cast<const Pack<T>*>(in);
    Pack<T> value;
    if constexpr (gated) value = *reinterpret_cast<const Pack<T>*>(in + width);
    Pack<T> result;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      float y = activated<kind>(to_float(gate.v[k]));
      if constexpr (gated) y *= to_float(value.v[k]);
      result.v[k] = from_float<T>(y);
    }
    *reinterpret_cast<Pack<T>*>(to) = result;
    return;
  }
  for (int k = 0; k < kCount && i + k < width; ++k) {
    float y = activated<kind>(to_float(in[k]));
    if constexpr (gated) y *= to_float(in[width + k]);
    to[k] = from_float<T>(y);
  }
}

template <bool gated>
void activate_rows(DType dtype, ActivationKind kind, const Batch& batch, const View& up, const View& out,
                   cudaStream_t stream) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t packs = ceil_div(out.width, Pack<T>::kCount);
    const dim3 grid(static_cast<unsigned>(ceil_div(batch.max_group_rows * packs, kThreads)), batch.group_count);
    const auto launch = [&](auto kernel) { kernel<<<grid, kThreads, 0, stream>>>(batch, up, out, out.width); };
    switch (kind) {
      case ActivationKind::gelu_tanh:
        launch(activate_kernel<T, ActivationKind::gelu_tanh, gated>);
        break;
      case ActivationKind::gelu_erf:
        launch(activate_kernel<T, ActivationKind::gelu_erf, gated>);
        break;
      case ActivationKind::silu:
        launch(activate_kernel<T, ActivationKind::silu, gated>);
        break;
      case ActivationKind::relu:
        launch(activate_kernel<T, ActivationKind::relu, gated>);
        break;
    }
  });
  check_launch("activation");
}

}  // namespace

bool runs_here() {
  cudaFuncAttributes found{};
  const bool runs = cudaFuncGetAttributes(&found, probe) == cudaSuccess;
  cudaGetLastError();
  return runs;
}

void launch_gate(DType dtype, ActivationKind kind, const Batch& batch, const View& up, const View& out,
                 cudaStream_t stream) {
  activate_rows<true>(dtype, kind, batch, up, out, stream);
}

void launch_activate(DType dtype, ActivationKind kind, const Batch& batch, const View& rows, cudaStream_t stream) {
  activate_rows<false>(dtype, kind, batch, rows, rows, stream);
}

void CudaBackend::embed(const Group& group, const Rows& out) {
  const Entry entry(*this);
  if (group.row_count == 0) return;
  CudaWorkspace& ws = workspace_of(out);
  const int64_t width = config_.decoder.d_model, bytes = group.row_count * static_cast<int64_t>(sizeof(DevRow));
  auto* rows = reinterpret_cast<DevRow*>(staging_.reserve(bytes));
  int64_t r = 0;
  for (size_t c = 0; c < group.cells.size(); ++c) {
    const Cell& cell = group.cells[c];
    for (int64_t i = 0; i < cell.row_count; ++i, ++r) {
      const Row& from = group.rows[r];
      DevRow row;
      row.position = from.position;
      row.source = from.source;
      if (cell.carried != nullptr && from.source <= Row::kFirstMemory) {
        row.vector = static_cast<const float*>(cell.carried->data) + (Row::kFirstMemory - from.source) * width;
      }
      row.prev_begin = from.prev_begin;
      row.cur_begin = from.cur_begin;
      row.cur_end = from.cur_end;
      row.cell = static_cast<int32_t>(c);
      row.angle = static_cast<int32_t>(group.row_begin + r);
      row.flags = (from.sees_padding ? DevRow::kSeesPadding : 0) |
                  (from.sees_prev_padding ? DevRow::kSeesPrevPadding : 0) | (from.uniform ? DevRow::kUniform : 0);
      rows[r] = row;
    }
  }
  DevRow* there = ws.row_meta.as<DevRow>() + group.row_begin;
  // Beside the last step, unless that still works on these rows' place.
  const bool beside = ws.chains > 1 && !ws.busy.empty() && std::ranges::find(ws.busy, group.row_begin) == ws.busy.end();
  const cudaStream_t stream = beside ? entry_stream() : main_.stream;
  ws.entering = ws.entering || beside;
  staging_.upload(there, bytes, stream);
  const int64_t half = config_.decoder.rotary_dims / 2;
  const auto matrix = [&](Matrix which) { return matrices_[static_cast<size_t>(which)].data(); };
  const Sources sources = {.embedding = matrix(Matrix::embedding),
                           .positions = matrix(Matrix::positions),
                           .memory = matrix(Matrix::memory),
                           .sink = matrix(Matrix::sink),
                           .frequencies = frequencies_.as<float>(),
                           .angles = ws.angles.as<float2>() + group.row_begin * half,
                           .half = static_cast<int>(half),
                           .width = static_cast<int>(width)};
  dispatch(dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    embed_kernel<<<static_cast<unsigned>(group.row_count), kThreads, 0, stream>>>(
        there, static_cast<T*>(out.data) + group.row_begin * width, sources);
  });
  check_launch("embed");
  unchecked_rows_ += group.row_count;
}

void CudaBackend::gather(const Rows& from, std::span<const int64_t> rows, const Rows& to) {
  const Entry entry(*this);
  if (rows.empty()) return;
  CudaWorkspace& ws = workspace_of(from);
  const auto bytes = static_cast<int64_t>(rows.size_bytes());
  std::copy(rows.begin(), rows.end(), reinterpret_cast<int64_t*>(staging_.reserve(bytes)));
  staging_.upload(ws.gathered.data(), bytes, stream());
  dispatch(dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    gather_kernel<<<static_cast<unsigned>(rows.size()), kThreads, 0, stream()>>>(
        static_cast<const T*>(from.data), ws.row_meta.as<DevRow>(), ws.gathered.as<int64_t>(), static_cast<T*>(to.data),
        ws.last_meta.as<DevRow>(), static_cast<int>(from.width));
  });
  check_launch("gather");
}

void CudaBackend::save_rows(const Rows& from, int64_t first, int64_t count, Block& to) {
  const Entry entry(*this);
  const int64_t elements = count * from.width;
  if (elements == 0) return;
  dispatch(dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    convert_kernel<<<static_cast<unsigned>(ceil_div(elements, kThreads)), kThreads, 0, main_.stream>>>(
        static_cast<const T*>(from.data) + first * from.width, static_cast<float*>(to.data), elements);
  });
  check_launch("save_rows");
  // The end of a stream's call: faults of its kernels belong to it. A few rows are waited for with their logits.
  constexpr int64_t kFewRows = 256;
  if (unchecked_rows_ > kFewRows) {
    check(cudaStreamSynchronize(main_.stream), "running the model");
    unchecked_rows_ = 0;
  }
}

void CudaBackend::load_rows(const Block& from, int64_t count, const Rows& to, int64_t first) {
  const Entry entry(*this);
  const int64_t elements = count * to.width;
  if (elements == 0) return;
  dispatch(dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    convert_kernel<<<static_cast<unsigned>(ceil_div(elements, kThreads)), kThreads, 0, main_.stream>>>(
        static_cast<const float*>(from.data), static_cast<T*>(to.data) + first * to.width, elements);
  });
  check_launch("load_rows");
}

}  // namespace armt::cuda
