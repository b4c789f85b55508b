// The choice of tokens on the device: the likeliest, or a draw by the rules of engine/sampler.cpp.
//
// Weights exp((logit - greatest) / temperature) are whole numbers, so that sums do not depend on an order. Every
// question is one: at which candidate does a running sum of counts (top_k) or weights (top_p, the draw) reach a goal?
// Bins of neighbouring candidates narrow the place down. Across a row they are made once, for all questions; those of
// the bin in question are then listed, and the block that ends last settles it among them.
#include <algorithm>
#include <bit>
#include <cmath>

#include "check.h"
#include "sample.cuh"
#include "workspace.h"

namespace armt::cuda {
namespace {

using namespace sampling;

constexpr int64_t kMostDraws = 64;  // rows at once, so that lists stay small

// By the last block: the question of the next kernel, and the bin that holds its answer.
__device__ inline void ask(RowState& row, const RowBins& bins, Stage stage, const Goal& goal, Work& work) {
  for (int b = threadIdx.x; b < kBins; b += kThreads) {
    const Whole weight = __ldcg(&bins.weight[b]);
    work.low[b] = static_cast<unsigned>(weight);
    work.high[b] = static_cast<unsigned>(weight >> 32);
    work.count[b] = __ldcg(&bins.count[b]);
  }
  __syncthreads();
  const Crossing place = cross(work, {0, 0}, goal);
  if (threadIdx.x > 0) return;
  row.stage = stage;
  row.goal = goal;
  row.place = place;
  row.listed = 0;
}

// The same once it is known what top_k leaves.
__device__ inline void ask_after_top_k(RowState& row, const RowBins& bins, const Draw& draw, Whole total, Work& work) {
  if (draw.top_p < 1.0) {
    ask(row, bins, Stage::top_p, reaching(draw.top_p, total), work);
  } else if (threadIdx.x == 0) {
    row.stage = Stage::draw_by_id;
  }
}

__device__ inline void answer(const Task& task, RowState& row, int64_t r, unsigned token) {
  const double logit = task.logits[r * task.vocab + token];
  task.answers[r] = {logit - static_cast<double>(row.greatest) - row.log_sum, static_cast<int64_t>(token)};
  row.stage = Stage::none;
}

// Greatest logit of each row, the lowest id among equals, and the log of sum exp(logit - greatest). Greedy rows are
// answered, the others begin. grid: shares, rows
__global__ void __launch_bounds__(kThreads) greatest_kernel(Task task) {
  __shared__ Best warps[kWarps];
  __shared__ float partial[32];
  __shared__ bool last;
  const int64_t r = blockIdx.y;
  const float* logits = task.logits + r * task.vocab;
  RowState& row = task.rows[r];
  const int thread = threadIdx.x;
  const Range range = share_range(task.vocab, blockIdx.x);
  const bool draws = task.draws != nullptr && task.draws[r].temperature > 0.0;
  const bool binned = draws && (task.draws[r].top_k > 0 || task.draws[r].top_p < 1.0);
  if (binned && thread < kBins / kShares) {
    task.bins[r].weight[blockIdx.x * (kBins / kShares) + thread] = 0;
    task.bins[r].count[blockIdx.x * (kBins / kShares) + thread] = 0;
  }
  Best best{-INFINITY, INT32_MAX};
#pragma unroll 8
  for (int64_t i = range.begin + thread; i < range.end; i += kThreads) {
    best = better(best, {number(logits[i]), static_cast<int32_t>(i)});
  }
  best = best_of_warp(best);
  if (thread % 32 == 0) warps[thread / 32] = best;
  __syncthreads();
  for (const Best& other : warps) best = better(best, other);
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t i = range.begin + thread; i < range.end; i += kThreads) sum += share_of(logits[i], best.value);
  sum = block_sum(sum, partial);
  if (thread == 0) {
    row.shares[blockIdx.x] = {best, sum};
    __threadfence();
    last = atomicAdd(&row.done, 1) == kShares - 1;
  }
  __syncthreads();
  if (!last || thread >= 32) return;
  __threadfence();
  best = {-INFINITY, INT32_MAX};
  const volatile Share* all = row.shares;
  for (int s = thread; s < kShares; s += 32) best = better(best, {all[s].best.value, all[s].best.token});
  best = best_of_warp(best);
  sum = 0.0f;
  for (int s = thread; s < kShares; s += 32) sum += all[s].sum * share_of(all[s].best.value, best.value);
  sum = warp_sum(sum);
  if (thread > 0) return;
  row.done = 0;
  row.greatest = best.value;
  row.log_sum = logf(sum);
  row.last = ~Whole{0};
  row.stage = binned ? Stage::bins : Stage::draw_by_id;
  if (!draws) answer(task, row, r, static_cast<unsigned>(best.token));
}

// Counts and weights of all candidates in bins of equal width, the likeliest first. grid: shares, rows
__global__ void __launch_bounds__(kThreads) bins_kernel(Task task) {
  __shared__ Work work;
  const int64_t r = blockIdx.y;
  RowState& row = task.rows[r];
  if (row.stage != Stage::bins) return;
  const float* logits = task.logits + r * task.vocab;
  const Draw& draw = task.draws[r];
  RowBins& bins = task.bins[r];
  const Weigher weigher(task, draw, row.greatest);
  const Range range = share_range(task.vocab, blockIdx.x);
  clear(work);
  __syncthreads();
  Sum above{0, 0};
  for_logits(logits, range, [&](float logit, unsigned) {
    const double weight = weigher.weight(logit);
    const Whole whole = weigher.whole(weight);
    add(work, weigher.bin(logit), whole);
    if (weight >= draw.min_p) above.weight += whole;
  });
  above = scan(above, work).total;
  for (int b = threadIdx.x; b < kBins; b += kThreads) {
    const Sum sum = bin_sum(work, b);
    if (sum.count == 0) continue;
    atomicAdd(&bins.weight[b], sum.weight);
    atomicAdd(&bins.count[b], sum.count);
  }
  if (threadIdx.x == 0) row.sums[blockIdx.x] = above.weight;
  if (!ends_last(row, work)) return;

  above = {threadIdx.x < kShares ? __ldcg(&row.sums[threadIdx.x]) : 0, 0};
  above = scan(above, work).total;
  if (threadIdx.x == 0) row.above = above.weight;
  Sum total{0, 0};
  for (int b = threadIdx.x; b < kBins; b += kThreads) {
    total = total + Sum{__ldcg(&bins.weight[b]), __ldcg(&bins.count[b])};
  }
  total = scan(total, work).total;
  // Of what weighs nothing, top_k need not tell which it leaves; and if all are -inf the host's rule leaves them all.
  const bool cuts = draw.top_k > 0 && draw.top_k < total.count && row.greatest > -INFINITY;
  if (cuts) {
    ask(row, bins, Stage::top_k, {static_cast<Whole>(draw.top_k), true}, work);
  } else {
    ask_after_top_k(row, bins, draw, total.weight, work);
  }
}

// One question in the order of likelihood: lists the bin in question and looks there. grid: shares, rows
__global__ void __launch_bounds__(kThreads) likelihood_kernel(Task task) {
  __shared__ Work work;
  const int64_t r = blockIdx.y;
  RowState& row = task.rows[r];
  const Stage stage = row.stage;
  if (stage != Stage::top_k && stage != Stage::top_p && stage != Stage::draw) return;
  const float* logits = task.logits + r * task.vocab;
  const Draw& draw = task.draws[r];
  const Weigher weigher(task, draw, row.greatest);
  const Crossing place = row.place;
  Whole* list = task.lists + r * task.vocab;
  const Range range = share_range(task.vocab, blockIdx.x);
  for_logits(logits, range, [&](float logit, unsigned token) {
    if (weigher.bin(logit) != place.bin || weigher.whole(weigher.weight(logit)) == 0) return;
    list[atomicAdd(&row.listed, 1u)] = rank(logit, token);
  });
  if (!ends_last(row, work)) return;

  const Listed candidates{list, weigher};
  const Found found = find(candidates, __ldcg(&row.listed), place.before, row.goal, work);
  const Whole sum = found.before.weight + weigher.whole(weigher.weight(logit_of(found.rank)));
  if (stage == Stage::top_k) {
    if (threadIdx.x == 0) row.last = found.rank;
    ask_after_top_k(row, task.bins[r], draw, sum, work);
  } else if (stage == Stage::top_p) {
    ask(row, task.bins[r], Stage::draw, drawn(draw.u, min(sum, row.above)), work);
  } else if (threadIdx.x == 0) {
    answer(task, row, r, static_cast<unsigned>(found.rank));
  }
}

// A draw in the order of ids. grid: shares, rows
__global__ void __launch_bounds__(kThreads) draw_kernel(Task task) {
  __shared__ Work work;
  const int64_t r = blockIdx.y;
  RowState& row = task.rows[r];
  if (row.stage != Stage::draw_by_id) return;
  const Draw& draw = task.draws[r];
  const Weigher weigher(task, draw, row.greatest);
  Neighbours candidates{task.logits + r * task.vocab, 0, weigher, draw.min_p, row.last};
  Range range = share_range(task.vocab, blockIdx.x);
  Sum own{0, 0};
  for_logits(candidates.logits, range,
             [&](float logit, unsigned token) { own.weight += candidates.whole(logit, token); });
  own = scan(own, work).total;
  if (threadIdx.x == 0) row.sums[blockIdx.x] = own.weight;
  if (!ends_last(row, work)) return;

  own = {threadIdx.x < kShares ? __ldcg(&row.sums[threadIdx.x]) : 0, 0};
  clear(work);
  __syncthreads();
  if (threadIdx.x < kShares) add(work, threadIdx.x, own.weight);
  const Goal goal = drawn(draw.u, scan(own, work).total.weight);
  const Crossing place = cross(work, {0, 0}, goal);
  range = share_range(task.vocab, place.bin);
  candidates.first = range.begin;
  const Found found = find(candidates, range.end - range.begin, place.before, goal, work);
  if (threadIdx.x == 0) answer(task, row, r, static_cast<unsigned>(found.rank));
}

// Which kernels a batch needs.
struct Needs {
  bool draws = false, bins = false, by_id = false;
  int questions = 0;  // in the order of likelihood, of the row with the most
};

Needs needs_of(std::span<const Draw> draws) {
  Needs needs;
  for (const Draw& draw : draws) {
    if (draw.temperature == 0.0) continue;
    const bool top_k = draw.top_k > 0, top_p = draw.top_p < 1.0;
    needs.draws = true;
    needs.bins |= top_k || top_p;
    needs.by_id |= !top_p;
    needs.questions = std::max(needs.questions, (top_k ? 1 : 0) + (top_p ? 2 : 0));
  }
  return needs;
}

void launch(const Task& task, const Needs& needs, int64_t rows, cudaStream_t stream) {
  const dim3 grid(kShares, static_cast<unsigned>(rows));
  greatest_kernel<<<grid, kThreads, 0, stream>>>(task);
  if (needs.bins) bins_kernel<<<grid, kThreads, 0, stream>>>(task);
  for (int q = 0; q < needs.questions; ++q) likelihood_kernel<<<grid, kThreads, 0, stream>>>(task);
  if (needs.by_id) draw_kernel<<<grid, kThreads, 0, stream>>>(task);
  check_launch("choice of tokens");
}

// Weights as large as the sum of a whole row's lets them be, and no larger than a double's fraction.
Task task_of(int64_t vocab) {
  const int bits = std::min(52, 64 - static_cast<int>(std::bit_width(static_cast<uint64_t>(vocab))));
  Task task{};
  task.vocab = vocab;
  task.unit = std::ldexp(1.0, bits);
  task.reach = -(bits + 1) * std::log(2.0);
  task.bins_per_unit = -kBins / task.reach;
  return task;
}

}  // namespace

void CudaBackend::choose(const Rows& hidden, int64_t first, std::span<const Draw> draws, Choice* choices) {
  const Entry entry(*this);
  const Needs needs = needs_of(draws);
  Task task = task_of(config_.decoder.vocab_size);
  const int64_t count = std::ssize(draws), most = logits_rows(count);
  const int64_t together = needs.draws ? std::min(most, kMostDraws) : most;
  grow(arena_, logits_memory_, most * task.vocab * 4);
  const int64_t answers = count * static_cast<int64_t>(sizeof(Answer));
  grow(arena_, chosen_, answers);
  task.answers = chosen_.as<Answer>();
  // Room in few sizes: what is outgrown stays with the arena.
  const auto room = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(together)));
  grow_zeroed(arena_, choice_rows_, room * static_cast<int64_t>(sizeof(RowState)), main_.stream);
  task.rows = choice_rows_.as<RowState>();
  if (needs.draws) {
    const auto bytes = static_cast<int64_t>(draws.size_bytes());
    grow(arena_, draws_, bytes);
    std::copy(draws.begin(), draws.end(), reinterpret_cast<Draw*>(staging_.reserve(bytes)));
    staging_.upload(draws_.data(), bytes, main_.stream);
    task.draws = draws_.as<Draw>();
  }
  if (needs.bins) {
    grow(arena_, choice_bins_, room * static_cast<int64_t>(sizeof(RowBins)));
    grow(arena_, choice_lists_, room * task.vocab * static_cast<int64_t>(sizeof(Whole)));
    task.bins = choice_bins_.as<RowBins>();
    task.lists = choice_lists_.as<Whole>();
  }
  for (int64_t done = 0; done < count; done += most) {
    const int64_t rows = std::min(most, count - done);
    head(hidden, first + done, rows, logits_memory_.data());
    task.logits = logits_memory_.as<float>();
    for (int64_t row = 0; row < rows; row += together) {
      const int64_t some = std::min(together, rows - row);
      launch(task, needs, some, main_.stream);
      task.logits += some * task.vocab;
      task.answers += some;
      if (needs.draws) task.draws += some;
    }
  }
  auto* host = static_cast<Answer*>(pinned(answers));
  check(cudaMemcpyAsync(host, chosen_.data(), static_cast<size_t>(answers), cudaMemcpyDeviceToHost, main_.stream),
        "cudaMemcpyAsync");
  check(cudaStreamSynchronize(main_.stream), "choice of tokens");
  for (int64_t i = 0; i < count; ++i) choices[i] = {static_cast<int32_t>(host[i].token), host[i].logprob};
}

}  // namespace armt::cuda
