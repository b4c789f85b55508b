// The output head: logits, and the choice of the likeliest token on the device.
#include <algorithm>
#include <cstring>

#include "check.h"
#include "gemv.h"
#include "types.cuh"
#include "workspace.h"

namespace armt::cuda {
namespace {

constexpr int kThreads = 256, kShares = 64;

struct Best {
  float value;
  int32_t token;
};
// Of a share of a row: its best, and the sum of exp(logit - best).
struct Share {
  Best best;
  float sum;
};
struct RowShares {
  Share shares[kShares];
  int done;  // zero between calls
};

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

// Greatest logit of each row, the lowest id among equals, and minus the log of sum exp(logit - greatest). The last
// block of a row to finish joins the shares. grid: shares, rows
__global__ void __launch_bounds__(kThreads)
    greatest_kernel(const float* logits, int64_t vocab, RowShares* rows, Best* out) {
  __shared__ Best warps[kThreads / 32];
  __shared__ float partial[32];
  __shared__ bool last;
  const float* row = logits + blockIdx.y * vocab;
  RowShares& mine = rows[blockIdx.y];
  const int thread = threadIdx.x;
  const int64_t per_share = ceil_div(vocab, kShares), begin = blockIdx.x * per_share;
  const int64_t end = min(vocab, begin + per_share);
  Best best{-INFINITY, INT32_MAX};
#pragma unroll 8
  for (int64_t i = begin + thread; i < end; i += kThreads) best = better(best, {row[i], static_cast<int32_t>(i)});
  best = best_of_warp(best);
  if (thread % 32 == 0) warps[thread / 32] = best;
  __syncthreads();
  for (const Best& other : warps) best = better(best, other);
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t i = begin + thread; i < end; i += kThreads) sum += expf(row[i] - best.value);
  sum = block_sum(sum, partial);
  if (thread == 0) {
    mine.shares[blockIdx.x] = {best, sum};
    __threadfence();
    last = atomicAdd(&mine.done, 1) == kShares - 1;
  }
  __syncthreads();
  if (!last || thread >= 32) return;
  __threadfence();
  best = {-INFINITY, INT32_MAX};
  const volatile Share* all = mine.shares;
  for (int s = thread; s < kShares; s += 32) best = better(best, {all[s].best.value, all[s].best.token});
  best = best_of_warp(best);
  sum = 0.0f;
  for (int s = thread; s < kShares; s += 32) {
    if (all[s].sum > 0.0f) sum += all[s].sum * expf(all[s].best.value - best.value);
  }
  sum = warp_sum(sum);
  if (thread > 0) return;
  out[blockIdx.y] = {-logf(sum), best.token};
  mine.done = 0;
}

}  // namespace

void* CudaBackend::pinned(int64_t bytes) {
  if (pinned_bytes_ < bytes) {
    if (pinned_ != nullptr) check(cudaFreeHost(pinned_), "cudaFreeHost");
    pinned_ = nullptr;
    pinned_bytes_ = 0;
    check(cudaMallocHost(&pinned_, static_cast<size_t>(bytes)), "cudaMallocHost");
    pinned_bytes_ = bytes;
  }
  return pinned_;
}

int64_t CudaBackend::logits_rows(int64_t wanted) const {
  constexpr int64_t kBytes = int64_t{64} << 20;
  return std::max<int64_t>(1, std::min(wanted, kBytes / (config_.decoder.vocab_size * 4)));
}

void CudaBackend::head(const Rows& hidden, int64_t first, int64_t count, void* out) {
  const DeviceBuffer& own = matrices_[static_cast<size_t>(Matrix::head)];
  const char* weight = own.data() != nullptr ? own.data() : matrices_[static_cast<size_t>(Matrix::embedding)].data();
  const char* in = static_cast<const char*>(hidden.data) + first * hidden.width * element();
  const int64_t vocab = config_.decoder.vocab_size;
  if (dtype_ != DType::f32) {
    FewProduct few;
    few.weight = weight;
    few.in = in;
    few.out = out;
    few.rows = count;
    few.cols = few.ld_out = vocab;
    few.depth = few.ld_in = hidden.width;
    few.float_out = true;
    if (few_fits(few) && launch_few_product(dtype_, few, processors_, main_.stream)) return;
  }
  Product product;
  product.weight = weight;
  product.in = in;
  product.out = out;
  product.rows = count;
  product.cols = product.ld_out = vocab;
  product.depth = product.ld_in = hidden.width;
  product.type = dtype_;
  product.out_type = DType::f32;
  lt_->multiply(product, main_.space());
}

void CudaBackend::logits(const Rows& hidden, int64_t first, int64_t count, float* out) {
  const Entry entry(*this);
  const int64_t row = config_.decoder.vocab_size * 4, most = logits_rows(count);
  grow(arena_, logits_memory_, most * row);
  for (int64_t done = 0; done < count; done += most) {
    const int64_t rows = std::min(most, count - done);
    head(hidden, first + done, rows, logits_memory_.data());
    const auto bytes = static_cast<size_t>(rows * row);
    void* host = pinned(most * row);
    check(cudaMemcpyAsync(host, logits_memory_.data(), bytes, cudaMemcpyDeviceToHost, main_.stream), "cudaMemcpyAsync");
    check(cudaStreamSynchronize(main_.stream), "logits");
    std::memcpy(reinterpret_cast<char*>(out) + done * row, host, bytes);
  }
}

void CudaBackend::greatest(const Rows& hidden, int64_t first, int64_t count, int32_t* tokens, float* logprobs) {
  const Entry entry(*this);
  const int64_t row = config_.decoder.vocab_size * 4, most = logits_rows(count);
  grow(arena_, logits_memory_, most * row);
  const int64_t answer = static_cast<int64_t>(sizeof(Best));
  grow(arena_, chosen_, count * answer);
  const int64_t shares = most * static_cast<int64_t>(sizeof(RowShares));
  if (choice_shares_.bytes() < shares) {
    grow(arena_, choice_shares_, shares);
    check(cudaMemsetAsync(choice_shares_.data(), 0, static_cast<size_t>(choice_shares_.bytes()), main_.stream),
          "cudaMemsetAsync");
  }
  for (int64_t done = 0; done < count; done += most) {
    const int64_t rows = std::min(most, count - done);
    head(hidden, first + done, rows, logits_memory_.data());
    greatest_kernel<<<dim3(kShares, static_cast<unsigned>(rows)), kThreads, 0, main_.stream>>>(
        logits_memory_.as<float>(), config_.decoder.vocab_size, choice_shares_.as<RowShares>(),
        chosen_.as<Best>() + done);
    check_launch("choice of tokens");
  }
  auto* host = static_cast<Best*>(pinned(count * answer));
  check(
      cudaMemcpyAsync(host, chosen_.data(), static_cast<size_t>(count * answer), cudaMemcpyDeviceToHost, main_.stream),
      "cudaMemcpyAsync");
  check(cudaStreamSynchronize(main_.stream), "choice of tokens");
  for (int64_t i = 0; i < count; ++i) {
    tokens[i] = host[i].token;
    logprobs[i] = host[i].value;
  }
}

}  // namespace armt::cuda
