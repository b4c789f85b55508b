// Blocks of state: on the device, or in pinned host memory while nobody uses them and the device is full.
#include <algorithm>
#include <cstring>
#include <utility>

#include "check.h"
#include "workspace.h"

namespace armt::cuda {
namespace {

constexpr int64_t kLeastRoom = int64_t{32} << 20;  // made at a time

}  // namespace

BlockRef CudaBackend::allocate(int64_t bytes) {
  auto block = std::make_shared<StateBlock>();
  block->bytes = bytes;
  resting_.add(*block);
  count_block(bytes);
  block->release = [this](Block& released) {
    resting_.remove(static_cast<StateBlock&>(released));
    if (released.data != nullptr) arena_.give(released.data);
    count_block(-released.bytes);
  };
  block->data = arena_.take(bytes);
  return block;
}

void CudaBackend::use(std::span<const BlockRef> blocks) {
  if (blocks.empty()) return;
  const Entry entry(*this);
  resting_.use(blocks);
  try {
    for (const BlockRef& block : blocks) {
      if (block->data != nullptr) continue;
      void* data = arena_.take(block->bytes);
      check(cudaMemcpyAsync(data, block->spilled, static_cast<size_t>(block->bytes), cudaMemcpyHostToDevice,
                            main_.stream),
            "cudaMemcpyAsync");
      check(cudaStreamSynchronize(main_.stream), "bringing a state back");
      resting_.give_host(block->spilled, block->bytes);
      block->spilled = nullptr;
      block->data = data;
    }
  } catch (...) {
    resting_.let_go(blocks);
    throw;
  }
}

void CudaBackend::let_go(std::span<const BlockRef> blocks) noexcept {
  if (!blocks.empty()) resting_.let_go(blocks);
}

// Moves blocks to host memory; false if there is none that rests.
bool CudaBackend::make_room(int64_t bytes) {
  const Entry entry(*this);
  const auto stay = resting_.keep_all();
  const std::vector<StateBlock*> blocks = resting_.oldest(std::max(bytes, kLeastRoom));
  std::vector<void*> places;
  for (const StateBlock* block : blocks) {
    void* place = resting_.take_host(block->bytes);
    if (place == nullptr) break;
    places.push_back(place);
    const auto size = static_cast<size_t>(block->bytes);
    cudaMemcpyAsync(place, block->data, size, cudaMemcpyDeviceToHost, main_.stream);
    cudaMemsetAsync(block->data, 0, size, main_.stream);  // nobody's content stays in free memory
  }
  const cudaError_t code = cudaStreamSynchronize(main_.stream);
  for (size_t i = 0; i < places.size(); ++i) {
    if (code != cudaSuccess) {
      resting_.give_host(places[i], blocks[i]->bytes);
      continue;
    }
    arena_.give(std::exchange(blocks[i]->data, nullptr));
    blocks[i]->spilled = places[i];
  }
  resting_.let_go(blocks);
  check(code, "moving states to host memory");
  return !places.empty();
}

void CudaBackend::copy(Block& to, const Block& from, int64_t bytes) {
  const Entry entry(*this);
  check(cudaMemcpyAsync(to.data, from.data, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, main_.stream),
        "cudaMemcpyAsync");
}

void CudaBackend::upload(Block& to, int64_t offset, const void* from, int64_t bytes) {
  const Entry entry(*this);
  if (to.spilled != nullptr) {
    std::memcpy(static_cast<char*>(to.spilled) + offset, from, static_cast<size_t>(bytes));
    return;
  }
  check(cudaMemcpyAsync(static_cast<char*>(to.data) + offset, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                        main_.stream),
        "cudaMemcpyAsync");
  check(cudaStreamSynchronize(main_.stream), "upload");
}

void CudaBackend::download(const Block& from, int64_t offset, void* to, int64_t bytes) {
  const Entry entry(*this);
  if (from.spilled != nullptr) {
    std::memcpy(to, static_cast<const char*>(from.spilled) + offset, static_cast<size_t>(bytes));
    return;
  }
  check(cudaMemcpyAsync(to, static_cast<const char*>(from.data) + offset, static_cast<size_t>(bytes),
                        cudaMemcpyDeviceToHost, main_.stream),
        "cudaMemcpyAsync");
  check(cudaStreamSynchronize(main_.stream), "download");
}

}  // namespace armt::cuda
