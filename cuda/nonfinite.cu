// The search for values that are no finite numbers: one kernel and one download for any number of ranges.
#include <algorithm>

#include "check.h"
#include "types.cuh"
#include "workspace.h"

namespace armt::cuda {
namespace {

constexpr int kThreads = 256;

struct Range {
  const float* data = nullptr;
  int64_t count = 0;
};

__global__ void __launch_bounds__(kThreads) nonfinite_kernel(const Range* ranges, unsigned long long* found) {
  const Range range = ranges[blockIdx.y];
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  unsigned long long mine = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < range.count; i += stride) {
    mine += (__float_as_uint(range.data[i]) & 0x7f800000u) == 0x7f800000u;
  }
  if (mine > 0) atomicAdd(found, mine);
}

}  // namespace

int64_t CudaBackend::count_nonfinite(std::span<const Floats> values) {
  const Entry entry(*this);
  constexpr int64_t kMostRanges = 32768, kCountBytes = sizeof(unsigned long long);  // as many as a grid has rows
  constexpr int64_t kMostBlocks = 256, kBlockValues = 4096;
  int64_t found = 0;
  for (size_t first = 0; first < values.size(); first += kMostRanges) {
    const auto part = values.subspan(first, std::min<size_t>(kMostRanges, values.size() - first));
    const int64_t bytes = kCountBytes + std::ssize(part) * static_cast<int64_t>(sizeof(Range));
    grow(arena_, ranges_, bytes);
    char* host = staging_.reserve(bytes);
    *reinterpret_cast<unsigned long long*>(host) = 0;
    auto* ranges = reinterpret_cast<Range*>(host + kCountBytes);
    int64_t most = 1;
    for (const Floats& floats : part) {
      const char* data = static_cast<const char*>(floats.block->data) + floats.offset;
      *ranges++ = {.data = reinterpret_cast<const float*>(data), .count = floats.count};
      most = std::max(most, floats.count);
    }
    staging_.upload(ranges_.data(), bytes, main_.stream);
    const dim3 grid(static_cast<unsigned>(std::min(kMostBlocks, ceil_div(most, kBlockValues))),
                    static_cast<unsigned>(part.size()));
    nonfinite_kernel<<<grid, kThreads, 0, main_.stream>>>(reinterpret_cast<const Range*>(ranges_.data() + kCountBytes),
                                                          ranges_.as<unsigned long long>());
    check_launch("search for values that are not finite");
    void* answer = pinned(kCountBytes);
    check(cudaMemcpyAsync(answer, ranges_.data(), kCountBytes, cudaMemcpyDeviceToHost, main_.stream),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(main_.stream), "running the model");
    found += static_cast<int64_t>(*static_cast<unsigned long long*>(answer));
  }
  unchecked_rows_ = 0;  // the stream was waited for
  return found;
}

}  // namespace armt::cuda
