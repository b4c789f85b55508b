// What the parts of the decoding kernel share: the ring of weights, the barrier over the grid, shared memory.
#pragma once

#include "decode.h"
#include "hopper.cuh"
#include "types.cuh"

namespace armt::cuda {

constexpr int kDecodeWarps = 8, kDecodeThreads = kDecodeWarps * 32;
constexpr int kDecodePack = 8;                                 // elements that a lane handles together
constexpr int kDecodePasses = 8;                               // packs of a slab that a lane has at most
constexpr int kDecodeSlab = 32 * kDecodePack * kDecodePasses;  // elements of a slab at most
constexpr int kDecodeMostStages = 4;

constexpr int kStageBytes = 24;  // of a Stage

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// 16 bytes that another multiprocessor may have written a moment ago.
template <class T>
__device__ Pack<T> load_fresh(const T* from) {
  const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(from));
  return reinterpret_cast<const Pack<T>&>(bits);
}
// An instruction an element.
__device__ inline void widen(const Pack<__nv_bfloat16>& pack, float (&to)[8]) {
  const uint4 bits = reinterpret_cast<const uint4&>(pack);
  const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(pairs[i] << 16);
    to[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}
__device__ inline void widen(const Pack<__half>& pack, float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = to_float(pack.v[i]);
}

// All blocks are resident (one a multiprocessor, a cooperative launch), so they may wait for each other. They are
// counted in parts, in lines of their own: additions to one line wait for each other.
class Grid {
 public:
  __device__ explicit Grid(unsigned* counters) : counters_(counters) {
    const unsigned part = threadIdx.x % kDecodeParts;
    blocks_ = (gridDim.x + kDecodeParts - 1 - part) / kDecodeParts;
  }

  // By all threads: what the block wrote is there for those that wait.
  __device__ void arrive() {
    __syncthreads();
    awaited_ += blocks_;
    if (threadIdx.x != 0) return;
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter(blockIdx.x % kDecodeParts)) : "memory");
  }
  __device__ void wait() {
    if (threadIdx.x < kDecodeParts) {
      unsigned arrived;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter(threadIdx.x)) : "memory");
      } while (arrived < awaited_);
    }
    __syncthreads();
  }
  // The last block to leave makes the counters zero for the next kernel.
  __device__ void leave() {
    if (threadIdx.x != 0) return;
    if (atomicAdd(counter(kDecodeParts), 1u) != gridDim.x - 1) return;
    for (int part = 0; part <= kDecodeParts; ++part) *counter(part) = 0;
  }

 private:
  __device__ unsigned* counter(int part) const { return counters_ + part * kDecodeCounterStep; }

  unsigned* counters_;
  unsigned blocks_, awaited_ = 0;  // of this thread's part
};

// The columns of a product that a block makes.
struct Columns {
  int first, count;
};
__device__ inline Columns columns_of(const DecodeArgs& args, const DecodeProduct& product) {
  const int64_t block = blockIdx.x, blocks = gridDim.x;
  const auto begin = [&](int64_t b) {
    return static_cast<int>(product.shared ? min(b * args.own, int64_t{product.cols}) : b * product.cols / blocks);
  };
  return {begin(block), begin(block + 1) - begin(block)};
}

// What one stage of the ring holds: a slab for each warp. A block's rows of a weight lie in one piece, so it is one
// copy.
struct Stage {
  const char* from;  // in the first layer
  int64_t stride;    // from a layer to the next one
  int bytes;
};
static_assert(sizeof(Stage) == kStageBytes);

// The stages of a layer, in order; their count. By one thread.
__device__ inline int list_stages(const DecodeArgs& args, const Columns* columns, Stage* stages) {
  int count = 0;
#pragma unroll 1
  for (int which = 0; which < DecodeArgs::kProducts; ++which) {
    const DecodeProduct& product = args.products[which];
    const int64_t row = int64_t{product.depth} * 2, layer = row * product.cols * product.sides;
    const int stage_bytes = kDecodeWarps * product.slab * 2;
    const char* from = static_cast<const char*>(product.weight) + (args.layers - 1) * layer;
#pragma unroll 1
    for (int side = 0; side < product.sides; ++side) {
      const char* at = from + (int64_t{side} * product.cols + columns[which].first) * row;
#pragma unroll 1
      for (int left = columns[which].count * static_cast<int>(row); left > 0; left -= stage_bytes) {
        stages[count++] = {at, -layer, min(left, stage_bytes)};
        at += stage_bytes;
      }
    }
  }
  return count;
}

// The block's ring of weights: all that it needs of all layers, in order. The copies run ahead of the phases, so the
// memory has work while blocks wait for each other. Each warp has one; what they point to is shared.
class WeightRing {
 public:
  struct Shared {
    uint64_t filled[kDecodeMostStages];
    unsigned readers[kDecodeMostStages];  // that are done, ever
    int count;                            // of stages of a layer
  };

  __device__ WeightRing(const DecodeArgs& args, unsigned char* memory, const Stage* stages, Shared& shared)
      : memory_(memory), stages_(stages), shared_(shared), size_(args.stages), layers_(args.layers) {
    stage_bytes_ = kDecodeWarps * args.slot;
    for (int i = 0; i < size_; ++i) {
      if (threadIdx.x == 0) start(i);
      step();
    }
  }

  // Calls body(the next stage). The last warp to be done with it fills its place again.
  template <class Body>
  __device__ void take(const Body& body) {
    wait_for(shared_.filled[at_], parity_);
    body(memory_ + at_ * stage_bytes_);
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      unsigned before;
      asm volatile("atom.acq_rel.cta.shared.add.u32 %0, [%1], 1;"
                   : "=r"(before)
                   : "r"(shared_address(&shared_.readers[at_]))
                   : "memory");
      if (before % kDecodeWarps == kDecodeWarps - 1) start(at_);
    }
    step();
    if (++at_ < size_) return;
    at_ = 0;
    parity_ ^= 1;
  }

 private:
  __device__ void start(int place) const {
    if (layer_ >= layers_ || next_ >= shared_.count) return;  // the end, or a block without any
    const Stage stage = stages_[next_];
    expect_bytes(shared_.filled[place], stage.bytes);
    copy_bulk(memory_ + place * stage_bytes_, stage.from + layer_ * stage.stride, stage.bytes, shared_.filled[place]);
  }
  __device__ void step() {
    if (++next_ < shared_.count) return;
    next_ = 0;
    ++layer_;
  }

  unsigned char* memory_;
  const Stage* stages_;
  Shared& shared_;
  const int size_, layers_;
  int stage_bytes_;
  int layer_ = 0, next_ = 0;  // what is brought next
  int at_ = 0, parity_ = 0;   // what is taken next
};

#endif

// Shared memory of a block, in bytes from its beginning.
struct DecodeShared {
  int ring = 0, stages = 0, x = 0, parts = 0, query = 0, work = 0, phi = 0, cells = 0, turns = 0, bytes = 0;

  __host__ __device__ DecodeShared(const DecodeArgs& args, int blocks) {
    int most_units = 0, most_stages = 0;  // slabs of a product that a block has at most; of all
    for (const DecodeProduct& product : args.products) {
      const int columns = product.shared ? args.own : (product.cols + blocks - 1) / blocks;
      const int units = columns << product.slabs_log;
      most_units = units * product.sides > most_units ? units * product.sides : most_units;
      most_stages += product.sides * ((units + kDecodeWarps - 1) / kDecodeWarps);
    }
    int at = 0;
    const auto add = [&at](int size) {
      const int place = at;
      at += (size + 127) / 128 * 128;
      return place;
    };
    x = add(args.depth * 2);
    parts = add(most_units * 4);
    query = add(args.reads ? args.memory.heads * args.memory.keys * args.own * 2 : 0);
    const int heads = kDecodeWarps * (args.attend.head_dim + 2) * 4, shares = kDecodeThreads * 16;
    work = add(heads > shares ? heads : shares);
    phi = add(args.reads ? (args.memory.features + 3 * args.memory.heads * args.memory.keys) * 4 : 0);
    cells = add(args.layers * static_cast<int>(sizeof(DevCell)));
    turns = add(args.attend.half * 8);
    stages = add(most_stages * kStageBytes);
    ring = at;
    bytes = at + kDecodeWarps * args.stages * args.slot + 512;  // a slab's last pass may read behind its end
  }
};

}  // namespace armt::cuda
