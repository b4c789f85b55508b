// The decoding kernel's read of the associative memory. A block owns some columns of the residual row; who has ended
// them in one layer multiplies them by the next layer's query weights, so that the query is a sum of shares.
#pragma once

#include "decode.cuh"
#include "mma.cuh"

namespace armt::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <class T>
class DecodeMemory {
 public:
  __device__ DecodeMemory(const DecodeArgs& args, T* query, float* work, float* phi)
      : args_(args), shape_(args.memory), query_(query), work_(work), phi_(phi), u_(phi + args.memory.features) {
    width_ = shape_.heads * shape_.keys;
    first_ = min(static_cast<int>(blockIdx.x) * args.own, args.width);
    count_ = min(args.own, args.width - first_);
    owners_ = (args.width + args.own - 1) / args.own;
    head_ = count_ > 0 ? first_ / shape_.values : 0;
    chunks_ = args.own / 4;
    team_ = threadIdx.x / chunks_;
    chunk_ = threadIdx.x % chunks_ * 4;
    const int query_chunks = max(1, width_ / 4), length = max(1, 2 * shape_.keys);
    query_team_ = threadIdx.x / query_chunks;
    query_chunk_ = threadIdx.x % query_chunks * 4;
#pragma unroll
    for (int i = 0; i < kNormaliser; ++i) {
      const int f = i * kDecodeThreads + threadIdx.x, turn = (f / length + 1) % length;
      left_[i] = f % length;
      right_[i] = left_[i] - turn + (left_[i] < turn ? length : 0);
    }
  }

  // Asks for the layer's query weights of the block's columns.
  __device__ void begin_query(int stack) {
    const int chunks = args_.own / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < width_ * chunks; i += kDecodeThreads) {
      const int j = i / chunks, c = i % chunks * 8;
      if (c >= count_) continue;
      const T* from = static_cast<const T*>(args_.mem_query) +
                      (static_cast<int64_t>(stack) * width_ + j) * args_.width + first_ + c;
      copy_async(query_ + j * args_.own + c, from, true);
    }
    commit_copies();
  }
  // By the first warp, whose lane c has the block's column c; the weights are there and a barrier has followed.
  __device__ void share_query(float x) const {
    if (count_ == 0) return;
    const int lane = threadIdx.x;
    float* to = args_.queries + static_cast<int64_t>(blockIdx.x) * width_;
#pragma unroll 1
    for (int base = 0; base < width_; base += 32) {
      const int j = base + lane;
      float sum = 0.0f;
#pragma unroll 1
      for (int c = 0; c < count_; c += 8) {
        Pack<T> pack{};
        if (j < width_) pack = *reinterpret_cast<const Pack<T>*>(query_ + j * args_.own + c);
#pragma unroll
        for (int k = 0; k < 8; ++k) sum = fmaf(to_float(pack.v[k]), __shfl_sync(0xffffffffu, x, c + k), sum);
      }
      if (j < width_) to[j] = sum;
    }
  }

  // Asks for the block's columns of A, and for z.
  __device__ void begin_read(const float* memory) {
    ask(memory, 0);
    const float* z = shape_.normaliser(memory, head_);
#pragma unroll
    for (int i = 0; i < kNormaliser; ++i) {
      const int f = i * kDecodeThreads + threadIdx.x;
      z_[i] = shape_.denominator && f < shape_.features ? __ldg(z + f) : 0.0f;
    }
  }

  // What the memory answers, for lane c of the first warp in column c; by all threads.
  __device__ float read(const float* memory) {
    __shared__ float partial[2][kDecodeWarps];
    __shared__ float columns[kDecodeWarps][32];
    sum_query();
    const int n = shape_.keys, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = threadIdx.x; i < n; i += kDecodeThreads) {
      const float q = u_[2 * width_ + head_ * n + i];
      u_[i] = fmaxf(q, 0.0f);
      u_[n + i] = fmaxf(-q, 0.0f);
    }
    __syncthreads();
    float squares = 0.0f, den = 0.0f;
#pragma unroll
    for (int i = 0; i < kNormaliser; ++i) {
      const int f = i * kDecodeThreads + threadIdx.x;
      if (f >= shape_.features) continue;
      const float x = u_[left_[i]] * u_[right_[i]];
      phi_[f] = x;
      squares += x * x;
      den += x * z_[i];
    }
    squares = warp_sum(squares);
    den = warp_sum(den);
    if (lane == 0) {
      partial[0][warp] = squares;
      partial[1][warp] = den;
    }
    __syncthreads();
    const int teams = kDecodeThreads / chunks_;
    float sum[4] = {};
    for (int begin = 0; begin < shape_.features; begin += kHeld * teams) {
      if (begin > 0) ask(memory, begin);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int f = begin + i * teams + team_;
        if (f >= shape_.features) continue;
        const float x = phi_[f];
        sum[0] = fmaf(x, held_[i].x, sum[0]);
        sum[1] = fmaf(x, held_[i].y, sum[1]);
        sum[2] = fmaf(x, held_[i].z, sum[2]);
        sum[3] = fmaf(x, held_[i].w, sum[3]);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int step = 16; step >= 2; step /= 2) {  // a block owns at least two chunks
        if (step >= chunks_) sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], step);
      }
      if (lane < chunks_) columns[warp][lane * 4 + k] = sum[k];
    }
    __syncthreads();
    float value = 0.0f;
    if (static_cast<int>(threadIdx.x) < count_) {
      squares = den = 0.0f;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        squares += partial[0][w];
        den += partial[1][w];
        value += columns[w][threadIdx.x];
      }
      float scale = feature_scale(shape_, squares);
      if (shape_.denominator) scale /= den * scale + 1e-5f;
      value *= scale;
    }
    return value;
  }

 private:
  static constexpr int kHeld = 6, kNormaliser = 2;  // packs of A and values of z that a thread asks for ahead

  __device__ void ask(const float* memory, int begin) {
    const int teams = kDecodeThreads / chunks_;
    const float* from = memory + head_ * shape_.matrix() + (first_ - head_ * shape_.values) + chunk_;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int f = begin + i * teams + team_;
      held_[i] = {};
      if (f < shape_.features && chunk_ < count_) {
        held_[i] = load_once<float4>(from + static_cast<int64_t>(f) * shape_.values);
      }
    }
  }

  // The shares of all blocks, into u_[2 width ..); ends with a barrier.
  __device__ void sum_query() {
    const int teams = 4 * kDecodeThreads / width_;
    float4 sum = {};
    if (query_team_ < teams) {
#pragma unroll 8
      for (int block = query_team_; block < owners_; block += teams) {
        const float4 share = __ldcg(
            reinterpret_cast<const float4*>(args_.queries + static_cast<int64_t>(block) * width_ + query_chunk_));
        sum.x += share.x, sum.y += share.y, sum.z += share.z, sum.w += share.w;
      }
      *reinterpret_cast<float4*>(work_ + query_team_ * width_ + query_chunk_) = sum;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < width_; j += kDecodeThreads) {
      float whole = 0.0f;
      for (int t = 0; t < teams; ++t) whole += work_[t * width_ + j];
      u_[2 * width_ + j] = whole;
    }
    __syncthreads();
  }

  const DecodeArgs& args_;
  const MemoryShape& shape_;
  T* query_;  // [width, own]: weights
  float* work_;
  float* phi_;  // [features]
  float* u_;    // [2 keys] of the block's head; from 2 width on: the query
  int width_, first_, count_, owners_, head_;
  int chunks_, team_, chunk_;     // teams of threads share the rows of A, a thread has four of the block's columns
  int query_team_, query_chunk_;  // teams share the blocks' shares of the query
  int left_[kNormaliser], right_[kNormaliser];  // factors of the thread's features
  float4 held_[kHeld];
  float z_[kNormaliser];
};

#endif

}  // namespace armt::cuda
