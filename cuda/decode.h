// All layers of one decoded row in one kernel (Hopper).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "armt/config.h"
#include "association.cuh"
#include "attention.cuh"

namespace armt::cuda {

// The barrier counts blocks in parts; each counter has a line of its own.
constexpr int kDecodeParts = 4, kDecodeCounterStep = 32, kDecodeCounters = (kDecodeParts + 1) * kDecodeCounterStep;

// One of the block's dense layers, in all layers' stacked weights [layers reversed][sides * cols][depth].
struct DecodeProduct {
  const void* weight = nullptr;
  const void* bias = nullptr;  // [layers reversed][sides * cols] or null
  int cols = 0, depth = 0;
  int sides = 1;        // 2: gate and up
  int slab = 0;         // elements of a row that come in one copy
  int slabs_log = 0;    // log2 of the copies of a row
  bool shared = false;  // blocks own the columns as they own those of the residual row
};

struct DecodeNorm {
  const float* weight = nullptr;  // [layers reversed][width]
  const float* bias = nullptr;
};

struct DecodeArgs {
  enum { kQkv, kOut, kUp, kDown, kProducts };
  DecodeProduct products[kProducts];
  DecodeNorm norms[2];
  float eps = 0.0f;
  bool rms = false;
  ActivationKind kind = ActivationKind::silu;
  AttendArgs attend;   // its batch: one cell a layer, one row
  int splits = 1;      // shares of a query head's keys
  bool reads = false;  // layers whose cell has a memory read it
  MemoryShape memory;
  const void* mem_query = nullptr;  // [layers reversed][heads * keys][width]
  int layers = 0, width = 0;
  int own = 0;               // columns of the residual row that a block owns
  int slot = 0, stages = 0;  // of the ring: bytes of a warp's slab at most, stages
  bool ragged = false;       // slabs end within a pass
  int depth = 0;             // the deepest product
  // Device memory of this kernel's own; `counters` (kDecodeCounters) are zero between calls.
  void* x = nullptr;  // the residual row
  void* qkv = nullptr;
  void* ff = nullptr;
  float* sums = nullptr;     // [splits, query width]: attention before it is divided
  float2* totals = nullptr;  // [splits, heads]: greatest score, total
  float* queries = nullptr;  // [blocks that own columns, heads * keys]: shares of the memory's query
  unsigned* counters = nullptr;
};

// Sizes of the buffers above, in bytes.
struct DecodeRoom {
  int64_t sums = 0, totals = 0, queries = 0;
};

// Chooses how `args` (sizes set) divides the work; false where it does not fit this kernel.
bool plan_decode(DecodeArgs& args, DecodeRoom& room, int processors);
// False where the launch is refused, since this process has only a part of the GPU.
bool launch_decode(DType dtype, const DecodeArgs& args, int processors, cudaStream_t stream);
// Whether this build and the current GPU have the kernel.
bool decodes_here(DType dtype);

}  // namespace armt::cuda
