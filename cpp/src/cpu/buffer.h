// 64-byte aligned memory with one owner.
#pragma once

#include <cstdint>
#include <utility>

namespace armt::cpu {

// At least `bytes` bytes; throws OutOfMemory that names the size.
void* aligned_allocate(int64_t bytes);
void aligned_release(void* data) noexcept;

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) : data_(aligned_allocate(bytes)), bytes_(bytes) {}
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { aligned_release(data_); }

  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }
  int64_t bytes() const { return bytes_; }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Scratch of the calling thread, at least `floats` floats, contents undefined. It grows and stays
// until the thread ends; one user for each slot, and never across a nested call that uses the same
// slot.
enum class Slot : uint8_t { gemm, attention, association, rotary, other, count };
float* thread_scratch(Slot slot, int64_t floats);

}  // namespace armt::cpu
