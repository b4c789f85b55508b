#include "resting.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>

namespace armt::cuda {

Resting::~Resting() {
  for (const auto& [bytes, free] : host_) {
    for (void* data : free) cudaFreeHost(data);
  }
  cudaGetLastError();
}

void Resting::add(StateBlock& block) {
  const std::lock_guard lock(mutex_);
  blocks_.insert(&block);
}

void Resting::remove(StateBlock& block) noexcept {
  {
    const std::scoped_lock lock(removing_, mutex_);
    blocks_.erase(&block);
  }
  if (block.spilled != nullptr) give_host(block.spilled, block.bytes);
}

void Resting::use(std::span<const BlockRef> blocks) {
  const std::lock_guard lock(mutex_);
  for (const BlockRef& block : blocks) ++static_cast<StateBlock&>(*block).users;
}

void Resting::let_go(std::span<const BlockRef> blocks) noexcept {
  const std::lock_guard lock(mutex_);
  ++clock_;
  for (const BlockRef& ref : blocks) {
    auto& block = static_cast<StateBlock&>(*ref);
    --block.users;
    block.rests = clock_;
  }
}

std::vector<StateBlock*> Resting::oldest(int64_t bytes) {
  const std::lock_guard lock(mutex_);
  std::vector<StateBlock*> found;
  for (StateBlock* block : blocks_) {
    if (block->users == 0 && block->data != nullptr) found.push_back(block);
  }
  std::ranges::sort(found, {}, &StateBlock::rests);
  size_t count = 0;
  for (int64_t sum = 0; count < found.size() && sum < bytes; ++count) sum += found[count]->bytes;
  found.resize(count);
  for (StateBlock* block : found) ++block->users;
  return found;
}

void Resting::let_go(std::span<StateBlock* const> blocks) noexcept {
  const std::lock_guard lock(mutex_);
  for (StateBlock* block : blocks) --block->users;
}

void* Resting::take_host(int64_t bytes) {
  {
    const std::lock_guard lock(mutex_);
    auto& free = host_[bytes];
    if (!free.empty()) {
      void* data = free.back();
      free.pop_back();
      spilled_bytes_ += bytes;
      return data;
    }
  }
  void* data = nullptr;
  if (cudaMallocHost(&data, static_cast<size_t>(bytes)) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  spilled_bytes_ += bytes;
  return data;
}

void Resting::give_host(void* data, int64_t bytes) noexcept {
  std::memset(data, 0, static_cast<size_t>(bytes));
  spilled_bytes_ -= bytes;
  const std::lock_guard lock(mutex_);
  try {
    host_[bytes].push_back(data);
  } catch (...) {  // no memory for the list
    cudaFreeHost(data);
  }
}

}  // namespace armt::cuda
