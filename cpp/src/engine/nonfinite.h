// Values that are no finite numbers: found where an engine has them on the host anyway, counted, and an error unless
// the caller wants to see them.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <string>

#include "backend.h"
#include "engine/stream.h"

namespace armt {

enum class OnNonfinite : uint8_t { raise, ignore };

int64_t count_nonfinite(std::span<const float> values);

// Thread-safe. The check methods throw NonFinite, unless told to ignore.
class NonfiniteWatch {
 public:
  explicit NonfiniteWatch(OnNonfinite action) : action_(action) {}

  int64_t seen() const { return seen_.load(std::memory_order_relaxed); }
  // `what` heads the message: "logits of the last token".
  void check(std::span<const float> values, const char* what);
  // After a call that closed segments first .. state.closed_segments - 1: the statistics of the memories' last write,
  // RMT's memory and the last token's hidden row. A write can overflow in a value that its statistics do not show; what
  // it poisoned is in the next segment's.
  void check_written(Backend& backend, const ModelConfig& config, const StreamState& state, int64_t first);

 private:
  void report(int64_t count, const std::string& what);

  OnNonfinite action_;
  std::atomic<int64_t> seen_{0};
};

}  // namespace armt
