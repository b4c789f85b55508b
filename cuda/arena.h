// All device memory of an engine. Released blocks go to free lists and are handed out again without a call to the
// driver. That is safe because all work of an engine is ordered by one stream (side streams join it before their memory
// is released).
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

namespace armt::cuda {

class Arena {
 public:
  // `limit`: the most bytes to hold; 0: what the GPU has.
  Arena(int device, int64_t limit) : device_(device), limit_(limit) {}
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // At least `bytes`, 256-byte aligned. OutOfMemory with sizes if the GPU has no more.
  void* take(int64_t bytes);
  void give(void* data) noexcept;
  int64_t bytes_in_use() const;
  // Called without locks when there is no more; gives memory back, or returns false if it cannot.
  std::function<bool(int64_t bytes)> make_room;

 private:
  void trim();
  void* try_take(int64_t size);
  [[noreturn]] void no_room(int64_t size) const;

  const int device_;
  const int64_t limit_;
  mutable std::mutex mutex_;
  std::map<void*, int64_t> sizes_;              // of every block from the driver
  std::map<int64_t, std::vector<void*>> free_;  // by exact rounded size
  int64_t in_use_ = 0, held_ = 0;
};

// Device memory with one owner.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(Arena& arena, int64_t bytes) : arena_(&arena), data_(arena.take(bytes)), bytes_(bytes) {}
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_ != nullptr) arena_->give(data_);
  }

  char* data() const { return static_cast<char*>(data_); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  void swap(DeviceBuffer& other) noexcept {
    std::swap(arena_, other.arena_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  Arena* arena_ = nullptr;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace armt::cuda
