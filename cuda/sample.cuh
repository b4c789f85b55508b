// What the kernels of sample.cu are made of: weights, sums of bins, and the search among them.
#pragma once

#include "backend.h"
#include "types.cuh"

namespace armt::cuda::sampling {

constexpr int kThreads = 256, kWarps = kThreads / 32, kShares = 64;
constexpr int kBinBits = 11, kBins = 1 << kBinBits;

using Whole = unsigned long long;

struct Best {
  float value;
  int32_t token;
};
// Of a share of a row: its best, and the sum of exp(logit - best).
struct Share {
  Best best;
  float sum;
};

struct Sum {
  Whole weight;
  unsigned count;
};
// A running sum that is looked for.
struct Goal {
  Whole least;
  bool of_counts;
  __device__ bool reached(const Sum& sum) const { return (of_counts ? sum.count : sum.weight) >= least; }
};
struct Crossing {
  Sum before;
  int bin;
};

// What is asked next. top_k's last, top_p's last and the drawn candidate are looked for in the order of likelihood.
enum class Stage : int { none, bins, top_k, top_p, draw, draw_by_id };

struct RowState {
  Share shares[kShares];
  Whole sums[kShares];
  int done;  // shares of the kernel that runs; zero between kernels
  Stage stage;
  float greatest, log_sum;
  Whole last;   // top_k's last in the order of likelihood
  Whole above;  // the sum of what reaches min_p
  Goal goal;
  Crossing place;
  unsigned listed;
};
struct RowBins {
  Whole weight[kBins];
  unsigned count[kBins];
};

struct Answer {
  double logprob;
  int64_t token;  // no padding: all of it is copied
};

struct Task {
  const float* logits;  // [rows, vocab]
  const Draw* draws;    // null: all greedy
  RowState* rows;
  RowBins* bins;
  Whole* lists;  // [rows, vocab]
  Answer* answers;
  int64_t vocab;
  double unit;   // the weight of the likeliest
  double reach;  // exponents below weigh nothing
  double bins_per_unit;
};

// Shared memory of a block.
struct Work {
  unsigned low[kBins], high[kBins], count[kBins];  // weights as two words, whose atomics are native
  Sum warps[kWarps];
  Whole least[kWarps], most[kWarps];
  Crossing found;
  bool last;
};

__device__ inline Sum operator+(const Sum& a, const Sum& b) {
  return {a.weight + b.weight, a.count + b.count};
}

__device__ inline float number(float logit) {
  return isnan(logit) ? -INFINITY : logit;
}

__device__ inline Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.token < a.token) ? b : a;
}

__device__ inline Best best_of_warp(Best best) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    best =
        better(best, {__shfl_xor_sync(0xffffffffu, best.value, step), __shfl_xor_sync(0xffffffffu, best.token, step)});
  }
  return best;
}

// 1 for the greatest even if it is infinite.
__device__ inline float share_of(float logit, float greatest) {
  return logit == greatest ? 1.0f : expf(logit - greatest);
}

// True in all threads of the block of a row that ends last; it sees what the others wrote.
__device__ inline bool ends_last(RowState& row, Work& work) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    work.last = atomicAdd(&row.done, 1) == kShares - 1;
    if (work.last) row.done = 0;
  }
  __syncthreads();
  __threadfence();
  return work.last;
}

// Where this block's share of a row begins and ends.
struct Range {
  int64_t begin, end;
};
__device__ inline Range share_range(int64_t vocab, int share) {
  const int64_t each = ceil_div(vocab, kShares), begin = min(vocab, share * each);
  return {begin, min(vocab, begin + each)};
}
// Calls body(logit, token) for a range, spread over the block; each thread asks for several logits at once.
template <class Body>
__device__ inline void for_logits(const float* logits, const Range& range, const Body& body) {
  constexpr int kBatch = 8;
  for (int64_t first = range.begin + threadIdx.x; first < range.end; first += kBatch * kThreads) {
    float batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j * kThreads < range.end) batch[j] = number(logits[first + j * kThreads]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j * kThreads < range.end) body(batch[j], static_cast<unsigned>(first + j * kThreads));
    }
  }
}

// The same in every kernel: products and sums that a compiler could join are told apart.
struct Weigher {
  float greatest;
  double inverse, unit, reach;
  float per_bin;

  __device__ Weigher(const Task& task, const Draw& draw, float top)
      : greatest(top), inverse(1.0 / draw.temperature), unit(task.unit), reach(task.reach) {
    per_bin = static_cast<float>(fmin(inverse * task.bins_per_unit, 1e38));
  }
  __device__ double weight(float logit) const {
    if (logit == greatest) return 1.0;
    const double x = __dmul_rn(static_cast<double>(logit) - static_cast<double>(greatest), inverse);
    return x < reach ? 0.0 : exp(x);
  }
  __device__ Whole whole(double weight) const { return __double2ull_rn(__dmul_rn(weight, unit)); }
  // Never less for a lesser logit; what it is for those that weigh nothing does not matter.
  __device__ int bin(float logit) const {
    return logit == greatest ? 0 : static_cast<int>(fminf((greatest - logit) * per_bin, kBins - 1.0f));
  }
};

// Ascending in the order of likelihood; of equals the lower id comes first.
__device__ inline Whole rank(float logit, unsigned token) {
  const unsigned bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);
  const unsigned ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Whole>(~ascending) << 32 | token;
}
__device__ inline float logit_of(Whole rank) {
  const unsigned ascending = ~static_cast<unsigned>(rank >> 32);
  return __uint_as_float(ascending & 0x80000000u ? ascending & 0x7fffffffu : ~ascending);
}

__device__ inline void clear(Work& work) {
  for (int b = threadIdx.x; b < kBins; b += kThreads) work.low[b] = work.high[b] = work.count[b] = 0;
}

__device__ inline void add(Work& work, int bin, Whole weight) {
  if (weight == 0) return;
  const auto low = static_cast<unsigned>(weight);
  const unsigned before = atomicAdd(&work.low[bin], low);
  const unsigned high = static_cast<unsigned>(weight >> 32) + (before + low < before ? 1u : 0u);
  if (high > 0) atomicAdd(&work.high[bin], high);
  atomicAdd(&work.count[bin], 1u);
}

__device__ inline Sum bin_sum(const Work& work, int bin) {
  return {static_cast<Whole>(work.high[bin]) << 32 | work.low[bin], work.count[bin]};
}

// The sum of the threads before this one, and of all.
struct Scanned {
  Sum before, total;
};
__device__ inline Scanned scan(const Sum& own, Work& work) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Sum upto = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Sum other{__shfl_up_sync(0xffffffffu, upto.weight, step), __shfl_up_sync(0xffffffffu, upto.count, step)};
    if (lane >= step) upto = upto + other;
  }
  __syncthreads();  // an earlier scan may still be read
  if (lane == 31) work.warps[warp] = upto;
  __syncthreads();
  Scanned result{{upto.weight - own.weight, upto.count - own.count}, {0, 0}};
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) result.before = result.before + work.warps[w];
    result.total = result.total + work.warps[w];
  }
  return result;
}

// The bin in which a running sum that begins with `before` reaches the goal.
__device__ inline Crossing cross(Work& work, Sum before, const Goal& goal) {
  constexpr int kEach = kBins / kThreads;
  const int first = static_cast<int>(threadIdx.x) * kEach;
  Sum own{0, 0};
  for (int b = 0; b < kEach; ++b) own = own + bin_sum(work, first + b);
  before = before + scan(own, work).before;
  if (!goal.reached(before) && goal.reached(before + own)) {
    int bin = first;
    for (Sum next = before + bin_sum(work, bin); !goal.reached(next); next = before + bin_sum(work, bin)) {
      before = next;
      ++bin;
    }
    work.found = {before, bin};
  }
  __syncthreads();
  return work.found;
}

// The least and the greatest of the block's numbers, in every thread.
__device__ inline void join_ends(Whole& least, Whole& most, Work& work) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    least = min(least, __shfl_xor_sync(0xffffffffu, least, step));
    most = max(most, __shfl_xor_sync(0xffffffffu, most, step));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    work.least[threadIdx.x / 32] = least;
    work.most[threadIdx.x / 32] = most;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    least = min(least, work.least[w]);
    most = max(most, work.most[w]);
  }
}

struct Found {
  Sum before;
  Whole rank;
};
// By one block: which of `count` candidates brings a running sum that begins with `before` to the goal, in the order of
// their ranks, which differ. of.rank(j), of.whole(j)
template <class Candidates>
__device__ Found find(const Candidates& of, int64_t count, Sum before, const Goal& goal, Work& work) {
  Whole low = 0, high = ~Whole{0};
  while (true) {
    Whole least = ~Whole{0}, most = 0;
    for (int64_t j = threadIdx.x; j < count; j += kThreads) {
      const Whole rank = of.rank(j);
      if (rank < low || rank > high) continue;
      least = min(least, rank);
      most = max(most, rank);
    }
    join_ends(least, most, work);
    if (least >= most) return {before, least};
    const int differing = 64 - __clzll(static_cast<long long>(least ^ most)), shift = max(0, differing - kBinBits);
    clear(work);
    __syncthreads();
    for (int64_t j = threadIdx.x; j < count; j += kThreads) {
      const Whole rank = of.rank(j);
      if (rank < low || rank > high) continue;
      add(work, static_cast<int>(rank >> shift & (kBins - 1)), of.whole(j));
    }
    __syncthreads();
    const Crossing place = cross(work, before, goal);
    before = place.before;
    low = (least >> shift >> kBinBits << kBinBits | static_cast<Whole>(place.bin)) << shift;
    high = low | ((Whole{1} << shift) - 1);
  }
}

struct Listed {
  const Whole* ranks;
  const Weigher& weigher;
  __device__ Whole rank(int64_t j) const { return __ldcg(ranks + j); }
  __device__ Whole whole(int64_t j) const { return weigher.whole(weigher.weight(logit_of(rank(j)))); }
};

// What may be drawn, in the order of ids.
struct Neighbours {
  const float* logits;
  int64_t first;
  const Weigher& weigher;
  double min_p;
  Whole last;
  __device__ Whole rank(int64_t j) const { return static_cast<Whole>(first + j); }
  __device__ Whole whole(int64_t j) const { return whole(number(logits[first + j]), static_cast<unsigned>(first + j)); }
  __device__ Whole whole(float logit, unsigned token) const {
    const double weight = weigher.weight(logit);
    return weight < min_p || sampling::rank(logit, token) > last ? 0 : weigher.whole(weight);
  }
};

// The weights that make up at least this part of the total.
__device__ inline Goal reaching(double part, Whole total) {
  const double least = ceil(part * static_cast<double>(total));
  return {max(Whole{1}, min(total, static_cast<Whole>(least))), false};
}
// Where a uniform number falls.
__device__ inline Goal drawn(double u, Whole total) {
  const double below = floor(u * static_cast<double>(total));
  return {min(total, static_cast<Whole>(below) + 1), false};
}

}  // namespace armt::cuda::sampling
