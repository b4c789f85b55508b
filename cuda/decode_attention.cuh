// The decoding kernel's attention: a block takes one query head and a share of the keys. Keys and values are asked for
// before the block waits for the row's own; kLanes lanes share a key.
#pragma once

#include "decode.cuh"

namespace armt::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <class T, int kLanes>
class DecodeAttention {
 public:
  static constexpr int kPack = Pack<T>::kCount, kTeams = 32 / kLanes;  // keys of a warp at once
  static constexpr int kRounds = 8;                                    // keys that a team holds
  static constexpr int kStep = kDecodeWarps * kTeams;                  // keys of the block at once

  __device__ DecodeAttention(const DecodeArgs& args, const DevRow& row, const float2* turns, float* work)
      : args_(args), attend_(args.attend), sight_(sight_of(row)), turns_(turns), work_(work) {
    head_ = blockIdx.x % attend_.q_heads;
    split_ = blockIdx.x / attend_.q_heads;
    const int group = attend_.q_heads / attend_.kv_heads;
    kv_head_ = head_ / group;
    stores_ = split_ == 0 && head_ % group == 0;
    d_ = threadIdx.x % kLanes * kPack;
    inside_ = d_ < attend_.head_dim;
  }
  __device__ bool takes_part() const { return split_ < args_.splits; }

  // Asks for the first keys and values.
  __device__ void begin(const DevCell& cell) {
    const bool uniform = (sight_.flags & DevRow::kUniform) != 0;
    prev_first_ = uniform ? 0 : min(sight_.prev_begin, cell.prev_rows);
    prev_count_ = cell.prev_rows - prev_first_;
    cur_first_ = uniform ? 0 : sight_.cur_begin;
    const int cur_end = uniform ? cell.cur_rows : min(sight_.cur_end, cell.cur_rows);
    const int count = prev_count_ + max(0, cur_end - cur_first_);
    const int share = (count + args_.splits - 1) / args_.splits;
    next_ = min(count, split_ * share);
    end_ = min(count, next_ + share);
    const int own = prev_count_ + cell.kv_begin - cur_first_;
    has_own_ = own >= next_ && own < end_ && sees(sight_, cell, false, cell.kv_begin);
    ask(cell);
    look(cell);
  }

  // After the row's queries, keys and values are there: this block's share of the sums.
  __device__ void run(const DevCell& cell) {
    const T* in = static_cast<const T*>(args_.qkv);
    const int dim = attend_.head_dim, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto weight = [&](const float* norm) {
      return norm != nullptr ? norm + static_cast<int64_t>(cell.stack) * dim : nullptr;
    };
    float q[kPack];
    rotate(in + head_ * dim, weight(attend_.q_norm), q);
    const bool uniform = (sight_.flags & DevRow::kUniform) != 0;  // all scores are equal
    const float scale = uniform ? 0.0f : attend_.scale / (attend_.by_layer ? static_cast<float>(cell.layer + 1) : 1.0f);
#pragma unroll
    for (int i = 0; i < kPack; ++i) q[i] *= scale;
    float most = -INFINITY, total = 0.0f, sum[kPack] = {};
    if (has_own_ || stores_) {
      const T* own = in + (attend_.q_heads + kv_head_) * dim;
      float k[kPack];
      rotate(own, weight(attend_.k_norm), k);
      Pack<T> key, value{};
      if (inside_) value = load_fresh(own + attend_.kv_heads * dim + d_);
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        key.v[i] = from_float<T>(k[i]);
        dot = fmaf(q[i], to_float(key.v[i]), dot);
      }
      dot = team_sum(dot);
      if (stores_ && threadIdx.x < kLanes && inside_) {
        T* to = const_cast<T*>(key_at(cell, false, cell.kv_begin));
        *reinterpret_cast<Pack<T>*>(to) = key;
        *reinterpret_cast<Pack<T>*>(to + values_behind()) = value;
      }
      if (has_own_ && threadIdx.x < kLanes) {
        most = dot;
        total = 1.0f;
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[i] = to_float(value.v[i]);
      }
    }
    while (true) {
      add(q, most, total, sum);
      next_ += kRounds * kStep;
      if (next_ >= end_) break;
      ask(cell);
      look(cell);
    }
    // Teams of the warp, then warps of the block.
    const float highest = across(most, [](float a, float b) { return fmaxf(a, b); });
    const float keep = most == -INFINITY ? 0.0f : __expf(most - highest);
    total = across(total * keep, [](float a, float b) { return a + b; });
    float* mine = work_ + warp * (dim + 2);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float whole = across(sum[i] * keep, [](float a, float b) { return a + b; });
      if (lane < kLanes && inside_) mine[2 + d_ + i] = whole;
    }
    if (lane == 0) {
      mine[0] = highest;
      mine[1] = total;
    }
    __syncthreads();
    join(dim);
  }

 private:
  template <class Op>
  static __device__ float across(float x, const Op& op) {
#pragma unroll
    for (int step = 16; step >= kLanes; step /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
  }
  static __device__ float team_sum(float x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }

  __device__ int64_t values_behind() const {
    return static_cast<int64_t>(attend_.kv_heads) * attend_.page_rows * attend_.kv_row;
  }
  __device__ const T* key_at(const DevCell& cell, bool previous, int row) const {
    return tile_keys<T>(attend_, cell, previous, row / 64, kv_head_) +
           kv_at(row % 64, d_, attend_.kv_row, attend_.page_rows);
  }
  // This team's key in a round.
  __device__ int index_of(int round) const { return next_ + round * kStep + static_cast<int>(threadIdx.x) / kLanes; }

  __device__ void ask(const DevCell& cell) {
    const int first = cur_first_ + next_ - prev_count_, page = first / attend_.page_rows;
    const int last = first + end_ - 1 - next_;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) keys_[round] = values_[round] = {};
    if (next_ >= end_) return;
    if (next_ >= prev_count_ && last < (page + 1) * attend_.page_rows) {
      // In one page: the rounds' rows lie evenly.
      const int row = first - page * attend_.page_rows + static_cast<int>(threadIdx.x) / kLanes;
      const T* from = reinterpret_cast<const T*>(cell.cur_pages[page]) +
                      static_cast<int64_t>(kv_head_) * attend_.page_rows * attend_.kv_row +
                      kv_at(row, d_, attend_.kv_row, attend_.page_rows);
      const int64_t step = kv_tile(kStep, attend_.kv_row);
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        if (index_of(round) >= end_ || !inside_) continue;
        keys_[round] = load_once<Pack<T>>(from + round * step);
        values_[round] = load_once<Pack<T>>(from + round * step + values_behind());
      }
      return;
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int index = index_of(round);
      if (index >= end_ || !inside_) continue;
      const T* from = key_at(cell, index < prev_count_, row_of_index(index));
      keys_[round] = load_once<Pack<T>>(from);
      values_[round] = load_once<Pack<T>>(from + values_behind());
    }
  }
  __device__ int row_of_index(int index) const {
    return index < prev_count_ ? prev_first_ + index : cur_first_ + index - prev_count_;
  }
  // Which of them count; the row's own key comes from elsewhere.
  __device__ void look(const DevCell& cell) {
    seen_ = 0;
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      const int index = index_of(round);
      if (index >= end_) break;
      const bool previous = index < prev_count_;
      const int row = row_of_index(index);
      if ((previous || row != cell.kv_begin) && sees(sight_, cell, previous, row)) seen_ |= 1u << round;
    }
  }

  // Eight neighbours of one head of the row, normed and rotated.
  __device__ void rotate(const T* head, const float* weight, float (&out)[kPack]) const {
    const int half = attend_.half;
    const bool turned = inside_ && d_ < 2 * half, lower = d_ < half;
    const int other = lower ? d_ + half : d_ - half;
    Pack<T> mine{}, partner{};
    if (inside_) mine = load_fresh(head + d_);
    if (turned) partner = load_fresh(head + other);
    float scale = 1.0f;
    if (weight != nullptr) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kPack; ++i) squares += to_float(mine.v[i]) * to_float(mine.v[i]);
      scale = rsqrtf(team_sum(squares) / static_cast<float>(attend_.head_dim) + attend_.eps);
    }
    const auto normed = [&](T x, int at) { return to_float(x) * (weight != nullptr ? scale * weight[at] : 1.0f); };
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      out[i] = inside_ ? normed(mine.v[i], d_ + i) : 0.0f;
      if (!turned) continue;
      const float2 turn = turns_[(lower ? d_ : other) + i];
      const float y = normed(partner.v[i], other + i) * turn.y;
      out[i] = out[i] * turn.x + (lower ? -y : y);
    }
  }

  // The keys that this team holds.
  __device__ void add(const float (&q)[kPack], float& most, float& total, float (&sum)[kPack]) const {
    float scores[kRounds], highest = most;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      float dot = 0.0f;
      float key[kPack];
      widen(keys_[round], key);
#pragma unroll
      for (int i = 0; i < kPack; ++i) dot = fmaf(q[i], key[i], dot);
      scores[round] = team_sum(dot);
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if ((seen_ >> round & 1) == 0) scores[round] = -INFINITY;
      highest = fmaxf(highest, scores[round]);
    }
    const float shift = highest == -INFINITY ? 0.0f : highest, keep = __expf(most - shift);
    most = highest;
    total *= keep;
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum[i] *= keep;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if ((seen_ >> round & 1) == 0) continue;  // what lies there may be no number
      const float weight = __expf(scores[round] - shift);
      total += weight;
      float value[kPack];
      widen(values_[round], value);
#pragma unroll
      for (int i = 0; i < kPack; ++i) sum[i] = fmaf(weight, value[i], sum[i]);
    }
  }

  __device__ void join(int dim) {
    for (int d = threadIdx.x; d < dim; d += kDecodeThreads) {
      float highest = -INFINITY;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) highest = fmaxf(highest, work_[w * (dim + 2)]);
      float total = 0.0f, sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float* share = work_ + w * (dim + 2);
        const float keep = share[0] == -INFINITY ? 0.0f : __expf(share[0] - highest);
        total += keep * share[1];
        sum += keep * share[2 + d];
      }
      args_.sums[static_cast<int64_t>(split_) * attend_.q_heads * dim + head_ * dim + d] = sum;
      if (d == 0) args_.totals[split_ * attend_.q_heads + head_] = make_float2(highest, total);
    }
  }

  const DecodeArgs& args_;
  const AttendArgs& attend_;
  const Sight sight_;
  const float2* turns_;
  float* work_;
  int head_, split_, kv_head_, d_;
  bool stores_, inside_;  // the block stores the row's key and value; the lane has a part of a key
  int prev_first_ = 0, prev_count_ = 0, cur_first_ = 0;
  int next_ = 0, end_ = 0;  // of this block's keys
  bool has_own_ = false;    // the row's own key is among them
  unsigned seen_ = 0;       // a bit a round
  Pack<T> keys_[kRounds], values_[kRounds];
};

// The row's attention from all shares, as the output product wants it. By all threads; a barrier must follow.
template <class T>
__device__ void join_shares(const DecodeArgs& args, T* x) {
  constexpr int kPack = Pack<T>::kCount, kMostSplits = 4;
  const int heads = args.attend.q_heads, dim = args.attend.head_dim, width = heads * dim;
  for (int i = threadIdx.x * kPack; i < width; i += kDecodeThreads * kPack) {
    float2 totals[kMostSplits];
    float4 low[kMostSplits], high[kMostSplits];
#pragma unroll
    for (int s = 0; s < kMostSplits; ++s) {
      totals[s] = make_float2(-INFINITY, 0.0f);
      low[s] = high[s] = {};
      if (s >= args.splits) continue;
      const auto* from = reinterpret_cast<const float4*>(args.sums + static_cast<int64_t>(s) * width + i);
      totals[s] = __ldcg(args.totals + s * heads + i / dim);
      low[s] = __ldcg(from);
      high[s] = __ldcg(from + 1);
    }
    float highest = -INFINITY, total = 0.0f, sum[kPack] = {};
#pragma unroll
    for (int s = 0; s < kMostSplits; ++s) highest = fmaxf(highest, totals[s].x);
#pragma unroll
    for (int s = 0; s < kMostSplits; ++s) {
      const float keep = totals[s].x == -INFINITY ? 0.0f : __expf(totals[s].x - highest);
      total += keep * totals[s].y;
      const float values[kPack] = {low[s].x, low[s].y, low[s].z, low[s].w, high[s].x, high[s].y, high[s].z, high[s].w};
#pragma unroll
      for (int k = 0; k < kPack; ++k) sum[k] += keep * values[k];
    }
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    Pack<T> out;
#pragma unroll
    for (int k = 0; k < kPack; ++k) out.v[k] = from_float<T>(sum[k] * inverse);
    *reinterpret_cast<Pack<T>*>(x + i) = out;
  }
}

#endif

}  // namespace armt::cuda
