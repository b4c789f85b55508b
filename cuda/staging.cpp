#include "staging.h"

#include <algorithm>

#include "check.h"

namespace armt::cuda {

Staging::~Staging() {
  for (Slot& slot : slots_) {
    if (slot.done != nullptr) cudaEventDestroy(slot.done);
    if (slot.data != nullptr) cudaFreeHost(slot.data);
  }
  cudaGetLastError();
}

char* Staging::reserve(int64_t bytes) {
  Slot& slot = slots_[next_];
  if (slot.done == nullptr) {
    check(cudaEventCreateWithFlags(&slot.done, cudaEventDisableTiming), "cudaEventCreate");
  }
  check(cudaEventSynchronize(slot.done), "cudaEventSynchronize");
  if (slot.bytes < bytes) {
    if (slot.data != nullptr) check(cudaFreeHost(slot.data), "cudaFreeHost");
    slot.data = nullptr;
    slot.bytes = 0;
    const int64_t size = std::max<int64_t>(4096, bytes + bytes / 2);
    void* data = nullptr;
    check(cudaMallocHost(&data, static_cast<size_t>(size)), "cudaMallocHost");
    slot.data = static_cast<char*>(data);
    slot.bytes = size;
  }
  return slot.data;
}

void Staging::upload(void* to, int64_t bytes, cudaStream_t stream) {
  Slot& slot = slots_[next_];
  check(cudaMemcpyAsync(to, slot.data, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
  check(cudaEventRecord(slot.done, stream), "cudaEventRecord");
  next_ = (next_ + 1) % kSlots;
}

}  // namespace armt::cuda
