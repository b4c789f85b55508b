// Pinned host buffers for small asynchronous uploads.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

namespace armt::cuda {

// A ring of pinned buffers: each is filled by the host, copied by a stream, and filled again once that copy is done.
class Staging {
 public:
  Staging() = default;
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // At least `bytes` of pinned memory for the next upload().
  char* reserve(int64_t bytes);
  // Copies the first `bytes` of the reserved memory to the device, in the order of `stream`.
  void upload(void* to, int64_t bytes, cudaStream_t stream);

 private:
  struct Slot {
    char* data = nullptr;
    int64_t bytes = 0;
    cudaEvent_t done = nullptr;
  };
  static constexpr size_t kSlots = 64;
  std::array<Slot, kSlots> slots_;
  size_t next_ = 0;
};

}  // namespace armt::cuda
