// Blocks of state that no call uses: which of them have rested longest, and pinned host memory to put them into.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_set>
#include <vector>

#include "backend.h"

namespace armt::cuda {

struct StateBlock : Block {
  int64_t users = 1;   // running calls, its maker the first
  uint64_t rests = 0;  // since when, in calls of let_go()
};

// Thread-safe. A block's `data` and `spilled` change only while the backend's mutex is held too.
class Resting {
 public:
  Resting() = default;
  ~Resting();
  Resting(const Resting&) = delete;
  Resting& operator=(const Resting&) = delete;

  void add(StateBlock& block);
  void remove(StateBlock& block) noexcept;  // gives its host memory back
  void use(std::span<const BlockRef> blocks);
  void let_go(std::span<const BlockRef> blocks) noexcept;

  // While the result lives no block is removed, so that pointers to them hold.
  [[nodiscard]] std::unique_lock<std::mutex> keep_all() { return std::unique_lock(removing_); }
  // Blocks on the device that nobody uses, those that rest longest first, of `bytes` together if there are as many.
  // They count as used until let_go().
  std::vector<StateBlock*> oldest(int64_t bytes);
  void let_go(std::span<StateBlock* const> blocks) noexcept;
  // Pinned memory for a block's content; null if the host has no more.
  void* take_host(int64_t bytes);
  void give_host(void* data, int64_t bytes) noexcept;  // overwritten with zeros
  int64_t spilled_bytes() const { return spilled_bytes_.load(); }

 private:
  std::mutex removing_;  // taken before the other
  std::mutex mutex_;
  std::unordered_set<StateBlock*> blocks_;
  uint64_t clock_ = 0;
  std::map<int64_t, std::vector<void*>> host_;  // free, by size
  std::atomic<int64_t> spilled_bytes_{0};
};

}  // namespace armt::cuda
