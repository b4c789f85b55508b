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

// A stream that a call has closed segments of: first .. state->closed_segments - 1.
struct Written {
  const StreamState* state = nullptr;
  int64_t first = 0;
};

// Thread-safe. The check methods throw NonFinite, unless told to ignore.
class NonfiniteWatch {
 public:
  explicit NonfiniteWatch(OnNonfinite action) : action_(action) {}

  int64_t seen() const { return seen_.load(std::memory_order_relaxed); }
  // `what` heads the message: "logits of the last token".
  void check(std::span<const float> values, const char* what);
  // Likewise of values on the device.
  void check(Backend& backend, const Floats& values, const char* what);
  // After a call: the statistics of the memories' last write, RMT's memory and the last token's hidden row, of all
  // streams in one look at the device. A write can overflow in a value that its statistics do not show; what it
  // poisoned is in the next segment's.
  void check_written(Backend& backend, const ModelConfig& config, std::span<const Written> streams);

 private:
  void explain(Backend& backend, const ModelConfig& config, const Written& written);
  void report(int64_t count, const std::string& what);

  OnNonfinite action_;
  std::atomic<int64_t> seen_{0};
};

}  // namespace armt
