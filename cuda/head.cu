// The output head: logits.
#include <algorithm>
#include <cstring>

#include "check.h"
#include "gemv.h"
#include "workspace.h"

namespace armt::cuda {

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

}  // namespace armt::cuda
