// The output head: logits, and the choice of the likeliest token on the device.
#include <algorithm>
#include <cstring>

#include "check.h"
#include "types.cuh"
#include "workspace.h"

namespace armt::cuda {
namespace {

constexpr int kThreads = 1024;

struct Best {
  float value;
  int32_t token;
};

__device__ inline Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.token < a.token) ? b : a;
}

// One block a row: greatest logit, the lowest id among equals, and minus the log of sum exp(logit - greatest).
__global__ void __launch_bounds__(kThreads) greatest_kernel(const float* logits, int64_t vocab, Best* out) {
  __shared__ Best warps[32];
  __shared__ float partial[32];
  const float* row = logits + blockIdx.x * vocab;
  const int thread = threadIdx.x;
  Best best{-INFINITY, INT32_MAX};
  for (int64_t i = thread; i < vocab; i += kThreads) best = better(best, {row[i], static_cast<int32_t>(i)});
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    best =
        better(best, {__shfl_xor_sync(0xffffffffu, best.value, step), __shfl_xor_sync(0xffffffffu, best.token, step)});
  }
  if (thread % 32 == 0) warps[thread / 32] = best;
  __syncthreads();
  for (int w = 0; w < 32; ++w) best = better(best, warps[w]);
  float sum = 0.0f;
  for (int64_t i = thread; i < vocab; i += kThreads) sum += expf(row[i] - best.value);
  sum = block_sum(sum, partial);
  if (thread == 0) out[blockIdx.x] = {-logf(sum), best.token};
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

void CudaBackend::head(const Rows& hidden, int64_t first, int64_t count) {
  const DeviceBuffer& own = matrices_[static_cast<size_t>(Matrix::head)];
  Product product;
  product.weight = own.data() != nullptr ? own.data() : matrices_[static_cast<size_t>(Matrix::embedding)].data();
  product.in = static_cast<const char*>(hidden.data) + first * hidden.width * element();
  product.out = logits_memory_.data();
  product.rows = count;
  product.cols = product.ld_out = config_.decoder.vocab_size;
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
    head(hidden, first + done, rows);
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
  for (int64_t done = 0; done < count; done += most) {
    const int64_t rows = std::min(most, count - done);
    head(hidden, first + done, rows);
    greatest_kernel<<<static_cast<unsigned>(rows), kThreads, 0, main_.stream>>>(
        logits_memory_.as<float>(), config_.decoder.vocab_size, chosen_.as<Best>() + done);
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
