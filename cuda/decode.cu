// One decoded row through all layers in one kernel, for Hopper GPUs. A block a multiprocessor; the phases of a layer
// (read of the memory, qkv, attention, its output, MLP) are parted by barriers over the grid. Bound by reading the
// weights: each warp's ring of slabs runs ahead of the phases, so that the memory has work while blocks wait.
#include <algorithm>

#include "activation.cuh"
#include "check.h"
#include "decode_attention.cuh"
#include "decode_memory.cuh"

namespace armt::cuda {
namespace {

constexpr int kMostShared = 230 * 1000;
constexpr int kNormPacks = 2;  // of a thread

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ inline float block_total(float x, float* partial) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kDecodeWarps; ++w) sum += partial[w];
  return sum;
}

// A norm's weights, asked for before its row is there.
class NormWeights {
 public:
  __device__ void begin(const DecodeArgs& args, const DecodeNorm& norm, int stack) {
#pragma unroll
    for (int p = 0; p < kNormPacks; ++p) {
      const int i = (p * kDecodeThreads + threadIdx.x) * kDecodePack;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        weight_[p][k] = bias_[p][k] = {};
        if (i >= args.width) continue;
        const int64_t at = static_cast<int64_t>(stack) * args.width + i + k * 4;
        weight_[p][k] = load_once<float4>(norm.weight + at);
        if (norm.bias != nullptr) bias_[p][k] = load_once<float4>(norm.bias + at);
      }
    }
  }

  // The residual row, normed.
  template <class T>
  __device__ void apply(const DecodeArgs& args, T* to) const {
    __shared__ float partial[2][kDecodeWarps];
    const T* from = static_cast<const T*>(args.x);
    Pack<T> row[kNormPacks];
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < kNormPacks; ++p) {
      const int i = (p * kDecodeThreads + threadIdx.x) * kDecodePack;
      row[p] = {};
      if (i < args.width) row[p] = load_fresh(from + i);
    }
#pragma unroll
    for (int p = 0; p < kNormPacks; ++p) {
#pragma unroll
      for (int k = 0; k < kDecodePack; ++k) {
        const float x = to_float(row[p].v[k]);
        sum += args.rms ? x * x : x;
      }
    }
    sum = block_total(sum, partial[0]) / static_cast<float>(args.width);
    float mean = 0.0f, variance = sum;
    if (!args.rms) {
      mean = sum;
      float squares = 0.0f;
#pragma unroll
      for (int p = 0; p < kNormPacks; ++p) {
        if ((p * kDecodeThreads + threadIdx.x) * kDecodePack >= args.width) continue;
#pragma unroll
        for (int k = 0; k < kDecodePack; ++k)
          squares += (to_float(row[p].v[k]) - mean) * (to_float(row[p].v[k]) - mean);
      }
      variance = block_total(squares, partial[1]) / static_cast<float>(args.width);
    }
    const float scale = rsqrtf(variance + args.eps);
#pragma unroll
    for (int p = 0; p < kNormPacks; ++p) {
      const int i = (p * kDecodeThreads + threadIdx.x) * kDecodePack;
      if (i >= args.width) continue;
      const float* weight = reinterpret_cast<const float*>(weight_[p]);
      const float* bias = reinterpret_cast<const float*>(bias_[p]);
#pragma unroll
      for (int k = 0; k < kDecodePack; ++k) {
        row[p].v[k] = from_float<T>((to_float(row[p].v[k]) - mean) * scale * weight[k] + bias[k]);
      }
      *reinterpret_cast<Pack<T>*>(to + i) = row[p];
    }
  }

 private:
  float4 weight_[kNormPacks][2], bias_[kNormPacks][2];
};

// A row that other blocks made.
template <class T>
__device__ void fetch_row(const T* from, int depth, T* to) {
#pragma unroll 4
  for (int i = threadIdx.x * kDecodePack; i < depth; i += kDecodeThreads * kDecodePack) {
    *reinterpret_cast<Pack<T>*>(to + i) = load_fresh(from + i);
  }
}

// Products of the row x in shared memory with the block's rows of the weights: parts[unit]. Ends with a barrier.
template <class T>
__device__ void multiply(const DecodeProduct& product, int count, const T* x, WeightRing& ring, float* parts) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int begin = (warp & ((1 << product.slabs_log) - 1)) * product.slab;  // all of a warp's slabs begin there
  float in[kDecodePasses][kDecodePack];
#pragma unroll
  for (int i = 0; i < kDecodePasses; ++i) {
    const int k = (i * 32 + lane) * kDecodePack;
    Pack<T> pack{};
    if (k < product.slab) pack = *reinterpret_cast<const Pack<T>*>(x + begin + k);
    widen(pack, in[i]);
  }
  const int units = count << product.slabs_log, passes = (product.slab + 32 * kDecodePack - 1) / (32 * kDecodePack);
#pragma unroll 1
  for (int side = 0; side < product.sides; ++side, parts += units) {
#pragma unroll 1
    for (int first = 0; first < units; first += kDecodeWarps) {
      float sum[kDecodePack] = {};
      ring.take([&](const unsigned char* stage) {
        // Behind a slab's end lie other weights, which meet zeros.
        const auto* weights = reinterpret_cast<const Pack<T>*>(stage + warp * product.slab * 2) + lane;
        const auto add = [&](int i) {
          float w[kDecodePack];
          widen(weights[i * 32], w);
#pragma unroll
          for (int j = 0; j < kDecodePack; ++j) sum[j] = fmaf(w[j], in[i][j], sum[j]);
        };
        if (passes == kDecodePasses) {
#pragma unroll
          for (int i = 0; i < kDecodePasses; ++i) add(i);
          return;
        }
#pragma unroll
        for (int i = 0; i < kDecodePasses; ++i) {
          if (i < passes) add(i);
        }
      });
      const float whole = warp_sum(((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7])));
      if (lane == 0 && first + warp < units) parts[first + warp] = whole;
    }
  }
  __syncthreads();
}

// Row `row` of the block's rows of the weights.
__device__ inline float joined(const DecodeProduct& product, const float* parts, int row) {
  const int slabs = 1 << product.slabs_log;
  float sum = 0.0f;
#pragma unroll 1
  for (int s = 0; s < slabs; ++s) sum += parts[row * slabs + s];
  return sum;
}

// This thread's column's bias, asked for early.
template <class T>
__device__ float bias_of(const DecodeProduct& product, const Columns& columns, int stack, int side) {
  if (product.bias == nullptr || static_cast<int>(threadIdx.x) >= columns.count || side >= product.sides) return 0.0f;
  const int64_t at = static_cast<int64_t>(stack * product.sides + side) * product.cols + columns.first + threadIdx.x;
  return to_float(static_cast<const T*>(product.bias)[at]);
}

// The residual row's columns that a block owns, one a thread.
template <class T>
class OwnColumns {
 public:
  __device__ OwnColumns(const DecodeArgs& args) : at_(static_cast<T*>(args.x) + blockIdx.x * args.own + threadIdx.x) {
    const int left = args.width - static_cast<int>(blockIdx.x) * args.own;
    mine_ = static_cast<int>(threadIdx.x) < min(args.own, left);
    if (mine_) value_ = to_float(__ldcg(at_));
  }
  __device__ float value() const { return value_; }
  __device__ void add(float x) {
    if (!mine_) return;
    const T sum = from_float<T>(value_ + x);
    value_ = to_float(sum);
    *at_ = sum;
  }

 private:
  T* at_;
  bool mine_;
  float value_ = 0.0f;
};

#endif

template <class T, int kLanes>
__global__ void __launch_bounds__(kDecodeThreads, 1) decode_kernel(const __grid_constant__ DecodeArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Args = DecodeArgs;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ WeightRing::Shared ring_shared;
  __shared__ Columns columns[Args::kProducts];
  const int thread = threadIdx.x, warp = thread / 32;
  const DecodeShared room(args, gridDim.x);
  if (thread < Args::kProducts) columns[thread] = columns_of(args, args.products[thread]);
  for (int i = thread; i < args.stages; i += kDecodeThreads) {
    init_barrier(ring_shared.filled[i], 1);
    ring_shared.readers[i] = 0;
    publish_barriers();
  }
  if (args.ragged) {
    for (int i = thread; i < (room.bytes - room.ring) / 16; i += kDecodeThreads) {
      reinterpret_cast<uint4*>(memory + room.ring)[i] = {};
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  Stage* stages = reinterpret_cast<Stage*>(memory + room.stages);
  __syncthreads();
  if (thread == 0) ring_shared.count = list_stages(args, columns, stages);
  __syncthreads();
  WeightRing ring(args, memory + room.ring, stages, ring_shared);

  T* x = reinterpret_cast<T*>(memory + room.x);
  float* parts = reinterpret_cast<float*>(memory + room.parts);
  float* work = reinterpret_cast<float*>(memory + room.work);
  DevCell* cells = reinterpret_cast<DevCell*>(memory + room.cells);
  float2* turns = reinterpret_cast<float2*>(memory + room.turns);
  const DevRow row = args.attend.batch.rows[0];
  for (int i = thread; i < args.layers * static_cast<int>(sizeof(DevCell) / 8); i += kDecodeThreads) {
    reinterpret_cast<uint64_t*>(cells)[i] = reinterpret_cast<const uint64_t*>(args.attend.batch.cells)[i];
  }
  for (int i = thread; i < args.attend.half; i += kDecodeThreads) {
    turns[i] = args.attend.angles[static_cast<int64_t>(row.angle) * args.attend.half + i];
  }
  __syncthreads();

  Grid grid(args.counters);
  OwnColumns<T> own(args);
  NormWeights norm;
  DecodeAttention<T, kLanes> attention(args, row, turns, work);
  DecodeMemory<T> memory_read(args, reinterpret_cast<T*>(memory + room.query), work,
                              reinterpret_cast<float*>(memory + room.phi));
  const auto reads = [&](int layer) { return args.reads && layer < args.layers && cells[layer].memory != nullptr; };
  const auto begin_read = [&](int layer) {
    if (!reads(layer)) return;
    memory_read.begin_query(args.layers - 1 - layer);
    memory_read.begin_read(cells[layer].memory);
  };
  const auto share_query = [&](int layer) {
    if (reads(layer) && warp == 0) memory_read.share_query(own.value());
  };

  begin_read(0);
  wait_copies<0>();
  __syncthreads();
  share_query(0);
  grid.arrive();
  for (int layer = 0; layer < args.layers; ++layer) {
    const DevCell& cell = cells[layer];
    const int stack = args.layers - 1 - layer;
    if (reads(layer)) {
      grid.wait();
      own.add(memory_read.read(cell.memory));
      grid.arrive();
    }
#pragma unroll 1
    for (int which = 0; which < Args::kProducts; ++which) {
      const DecodeProduct& product = args.products[which];
      const Columns mine = columns[which];
      const bool normed = which == Args::kQkv || which == Args::kUp;
      if (normed) norm.begin(args, args.norms[which == Args::kUp], stack);
      // Asked for a phase before they are needed: when a phase has emptied the ring, requests wait for its filling.
      if (which == Args::kQkv && attention.takes_part()) attention.begin(cell);
      if (which == Args::kUp) begin_read(layer + 1);
      const float bias = bias_of<T>(product, mine, stack, 0), other = bias_of<T>(product, mine, stack, 1);
      grid.wait();
      if (normed) {
        norm.apply(args, x);
      } else if (which == Args::kOut) {
        join_shares(args, x);
      } else {
        fetch_row(static_cast<const T*>(args.ff), product.depth, x);
        wait_copies<0>();
      }
      __syncthreads();
      multiply(product, mine.count, x, ring, parts);
      if (thread < mine.count) {
        float value = joined(product, parts, thread) + bias;
        if (product.shared) {
          own.add(value);
        } else if (which == Args::kQkv) {
          static_cast<T*>(args.qkv)[mine.first + thread] = from_float<T>(value);
        } else {
          value = activated(args.kind, value);
          if (product.sides == 2) value *= joined(product, parts, mine.count + thread) + other;
          static_cast<T*>(args.ff)[mine.first + thread] = from_float<T>(value);
        }
      }
      if (which == Args::kDown) {
        share_query(layer + 1);
        if (layer + 1 == args.layers) break;
      }
      grid.arrive();
      if (which != Args::kQkv) continue;
      grid.wait();
      if (attention.takes_part()) attention.run(cell);
      grid.arrive();
    }
  }
  grid.leave();
#else
  __trap();  // built for 9.0 without its own instructions (90 instead of 90a)
#endif
}

template <class T, int kLanes>
bool launch(const DecodeArgs& args, int processors, cudaStream_t stream) {
  const auto kernel = decode_kernel<T, kLanes>;
  const DecodeShared room(args, processors);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared), "cudaFuncSetAttribute");
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(processors));
  config.blockDim = dim3(kDecodeThreads);
  config.dynamicSmemBytes = static_cast<size_t>(room.bytes);
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  const cudaError_t code = cudaLaunchKernelEx(&config, kernel, args);
  if (code == cudaErrorCooperativeLaunchTooLarge || code == cudaErrorNotSupported) {
    cudaGetLastError();
    return false;
  }
  check(code, "decode");
  return true;
}

bool plan_product(DecodeProduct& product, int processors) {
  int slabs = 1;
  while (slabs * kDecodeSlab < product.depth) {
    slabs *= 2;
    ++product.slabs_log;
  }
  product.slab = product.depth / slabs;
  return product.depth % (slabs * kDecodePack) == 0 && slabs <= kDecodeWarps &&
         ceil_div(product.cols, processors) <= kDecodeThreads;
}

}  // namespace

bool plan_decode(DecodeArgs& args, DecodeRoom& room, int processors) {
  const AttendArgs& attend = args.attend;
  const MemoryShape& memory = args.memory;
  const int query = memory.heads * memory.keys;
  args.own = 8;
  while (args.own * processors < args.width) args.own *= 2;
  bool fits = args.own <= 32 && args.width % kDecodePack == 0 &&
              args.width <= kNormPacks * kDecodeThreads * kDecodePack && attend.head_dim % 8 == 0 &&
              attend.head_dim <= 128 && attend.half % 8 == 0 && attend.q_heads <= processors;
  if (args.reads) {
    fits = fits && query % 4 == 0 && query <= 4 * kDecodeThreads && memory.features <= 2 * kDecodeThreads &&
           memory.values % 4 == 0 && (memory.heads == 1 || memory.values % args.own == 0);
  }
  for (DecodeProduct& product : args.products) {
    fits = plan_product(product, processors) && fits;
    args.slot = std::max(args.slot, product.slab * 2);
    args.ragged = args.ragged || product.slab % (32 * kDecodePack) != 0;
    args.depth = std::max(args.depth, product.depth);
  }
  if (!fits) return false;
  args.splits = std::clamp(processors / attend.q_heads, 1, 4);
  args.stages = 0;
  const DecodeShared other(args, processors);
  args.stages = std::min(kDecodeMostStages, (kMostShared - other.bytes) / (kDecodeWarps * args.slot));
  room.sums = int64_t{args.splits} * attend.q_heads * attend.head_dim * 4;
  room.totals = int64_t{args.splits} * attend.q_heads * 8;
  room.queries = args.reads ? ceil_div(args.width, args.own) * query * 4 : 0;
  return args.stages >= 2;
}

bool decodes_here(DType dtype) {
  if (dtype == DType::f32) return false;
  return has_hopper_code(reinterpret_cast<const void*>(decode_kernel<__nv_bfloat16, 8>));
}

bool launch_decode(DType dtype, const DecodeArgs& args, int processors, cudaStream_t stream) {
  bool launched = false;
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      launched =
          args.attend.head_dim <= 64 ? launch<T, 8>(args, processors, stream) : launch<T, 16>(args, processors, stream);
    }
  });
  return launched;
}

}  // namespace armt::cuda
