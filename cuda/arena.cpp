#include "arena.h"

#include <algorithm>
#include <string>

#include "armt/error.h"
#include "check.h"

namespace armt::cuda {
namespace {

int64_t rounded(int64_t bytes) {
  return (std::max<int64_t>(bytes, 1) + 255) / 256 * 256;
}

std::string mebibytes(int64_t bytes) {
  return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB";
}

}  // namespace

Arena::~Arena() {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device_);
  for (const auto& [data, bytes] : sizes_) cudaFree(data);
  cudaSetDevice(before);
  cudaGetLastError();
}

void* Arena::take(int64_t bytes) {
  const int64_t size = rounded(bytes);
  for (;;) {
    if (void* data = try_take(size)) return data;
    if (!make_room || !make_room(size)) no_room(size);
  }
}

// Null if there is no room.
void* Arena::try_take(int64_t size) {
  const std::lock_guard lock(mutex_);
  if (auto found = free_.find(size); found != free_.end() && !found->second.empty()) {
    void* data = found->second.back();
    found->second.pop_back();
    in_use_ += size;
    return data;
  }
  const DeviceScope scope(device_);
  void* data = nullptr;
  cudaError_t code = cudaErrorMemoryAllocation;
  const auto fits = [&] { return limit_ == 0 || held_ + size <= limit_; };
  if (fits()) code = cudaMalloc(&data, static_cast<size_t>(size));
  if (code == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    trim();
    if (fits()) code = cudaMalloc(&data, static_cast<size_t>(size));
  }
  if (code == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return nullptr;
  }
  check(code, "cudaMalloc");
  sizes_[data] = size;
  held_ += size;
  in_use_ += size;
  return data;
}

void Arena::no_room(int64_t size) const {
  const DeviceScope scope(device_);
  const std::lock_guard lock(mutex_);
  size_t left = 0, total = 0;
  check(cudaMemGetInfo(&left, &total), "cudaMemGetInfo");
  const std::string limit = limit_ > 0 ? ", its limit is " + mebibytes(limit_) : "";
  throw OutOfMemory("cuda:" + std::to_string(device_) + ": no room for " + mebibytes(size) + "; this engine holds " +
                    mebibytes(in_use_) + limit + ", " + mebibytes(static_cast<int64_t>(left)) + " of " +
                    mebibytes(static_cast<int64_t>(total)) +
                    " are free; close sessions, shorten the batch, or choose a smaller weight type");
}

void Arena::give(void* data) noexcept {
  const std::lock_guard lock(mutex_);
  const int64_t size = sizes_.find(data)->second;
  in_use_ -= size;
  try {
    free_[size].push_back(data);
  } catch (...) {  // no host memory for the list: the block comes back with the arena
  }
}

int64_t Arena::bytes_in_use() const {
  const std::lock_guard lock(mutex_);
  return in_use_;
}

void Arena::trim() {
  for (auto& [size, blocks] : free_) {
    for (void* data : blocks) {
      check(cudaFree(data), "cudaFree");
      sizes_.erase(data);
      held_ -= size;
    }
  }
  free_.clear();
}

}  // namespace armt::cuda
