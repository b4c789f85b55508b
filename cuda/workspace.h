// Device buffers of a running call.
#pragma once

#include "check.h"
#include "cuda_backend.h"

namespace armt::cuda {

// Scratch of one chain of operations; row counts are those of the chain. The lower half grows on demand.
struct CudaScratch {
  Scratch rows;
  DeviceBuffer hidden, qkv, context, ff;
  DeviceBuffer gated;        // [rows, 2 d_ff]: gate and up before the activation
  DeviceBuffer fp8;          // [rows, widest input of a dense layer] e4m3
  DeviceBuffer fp8_scale;    // [rows] float32
  DeviceBuffer read_query;   // [rows, d_mem] float32
  DeviceBuffer read_phi;     // [rows, h, padded F], divided by the denominator
  DeviceBuffer read_matrix;  // [cells, h, F, E] bfloat16: rounded memories
  // W = memory rows that write, over all cells
  DeviceBuffer write_rows;   // [W, D]
  DeviceBuffer write_raw;    // [W, write_width()] float32: key, value, gate
  DeviceBuffer write_phi;    // [W, h, padded F] float32
  DeviceBuffer write_coef;   // [W, h, 3] float32: 1 / den (0: nothing to subtract), gamma, betas
  DeviceBuffer write_delta;  // [W, D] float32: beta (v - old)
  DeviceBuffer readers;      // [cells that write] blocks that have read z
  DeviceBuffer partial;      // attention of few rows: shares of the sums
  DeviceBuffer counters;     // and how many shares are done
  DeviceBuffer decode;       // one row through all layers: what its blocks tell each other
  DeviceBuffer arrivals;     // and their barrier
};

struct CudaWorkspace : Workspace {
  explicit CudaWorkspace(CudaBackend& owner) : backend(owner) {}
  ~CudaWorkspace() override;

  CudaBackend& backend;
  int64_t chains = 0;         // waves in flight
  std::vector<int64_t> busy;  // first rows of the last step's groups; empty: unknown
  bool entering = false;      // the side's stream is at work on the next step's rows or table
  DeviceBuffer residual_rows, last_rows, normed_rows;
  DeviceBuffer row_meta;   // DevRow [slots * slot_rows]
  DeviceBuffer last_meta;  // DevRow [slot_rows]
  DeviceBuffer angles;     // float2 [slots * slot_rows, rotary_dims / 2]: cosine, sine
  DeviceBuffer gathered;   // int64 [slot_rows]
  CudaScratch main, side;
};

// Held by each entry point: one thread enqueues at a time, on the engine's device.
struct CudaBackend::Entry {
  explicit Entry(const CudaBackend& backend) : lock(backend.mutex_), scope(backend.device_) {}
  std::lock_guard<std::recursive_mutex> lock;
  DeviceScope scope;
};

// The bias that goes with a dense layer's matrix; count: none.
Vector bias_of(Matrix which);

// Makes `buffer` at least `bytes` large; its content is lost.
inline void grow(Arena& arena, DeviceBuffer& buffer, int64_t bytes) {
  if (buffer.bytes() >= bytes) return;
  buffer = DeviceBuffer();
  buffer = DeviceBuffer(arena, bytes);
}

// The same, full of zeros when it is made; what uses it leaves zeros.
inline void grow_zeroed(Arena& arena, DeviceBuffer& buffer, int64_t bytes, cudaStream_t stream) {
  if (buffer.bytes() >= bytes) return;
  grow(arena, buffer, bytes);
  const cudaError_t code = cudaMemsetAsync(buffer.data(), 0, static_cast<size_t>(buffer.bytes()), stream);
  if (code != cudaSuccess) buffer = DeviceBuffer();
  check(code, "cudaMemsetAsync");
}

}  // namespace armt::cuda
