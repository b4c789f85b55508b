#include "engine/nonfinite.h"

#include <array>
#include <bit>
#include <vector>

#include "armt/error.h"

namespace armt {
namespace {

constexpr int64_t kFloat = sizeof(float);

int64_t count_in(Backend& backend, const Block& block) {
  std::vector<float> values(static_cast<size_t>(block.bytes / kFloat));
  backend.download(block, 0, values.data(), std::ssize(values) * kFloat);
  return count_nonfinite(values);
}

}  // namespace

int64_t count_nonfinite(std::span<const float> values) {
  constexpr uint32_t kExponent = 0x7f800000;  // all ones in infinities and NaNs only
  int64_t count = 0;
  for (const float value : values) count += (std::bit_cast<uint32_t>(value) & kExponent) == kExponent;
  return count;
}

void NonfiniteWatch::report(int64_t count, const std::string& what) {
  if (count == 0) return;
  seen_.fetch_add(count, std::memory_order_relaxed);
  if (action_ == OnNonfinite::ignore) return;
  throw NonFinite(what + ": found " + std::to_string(count) +
                  " values that are not finite; the session is as it was before the call. Check the checkpoint and the "
                  "state, or pass on_nonfinite=\"ignore\" to see the values");
}

void NonfiniteWatch::check(std::span<const float> values, const char* what) {
  if (const int64_t count = count_nonfinite(values); count > 0) report(count, what);
}

// What is no number in one layer's rows is none in the layers above, so the last layer's statistics speak for all; the
// others are fetched only to name the layer.
void NonfiniteWatch::check_written(Backend& backend, const ModelConfig& config, const StreamState& state,
                                   int64_t first) {
  const auto where = [&](const std::string& part) {
    const int64_t last = state.closed_segments - 1;
    return (first < last ? "segments " + std::to_string(first) + " .. " : "segment ") + std::to_string(last) + ", " +
           part;
  };
  const auto in_statistics = [&](const LayerState& layer) {
    std::array<float, kWriteStats> statistics{};
    constexpr int64_t kBytes = kWriteStats * kFloat;
    if (layer.memory.written()) {
      backend.download(*layer.memory.block, association_bytes(config) - kBytes, statistics.data(), kBytes);
    }
    return count_nonfinite(statistics);
  };
  if (in_statistics(state.layers.back()) > 0) {
    int64_t count = 0, lowest = -1;
    for (size_t layer = 0; layer < state.layers.size(); ++layer) {
      const int64_t here = in_statistics(state.layers[layer]);
      if (here > 0 && lowest < 0) lowest = static_cast<int64_t>(layer);
      count += here;
    }
    report(count, where("layer " + std::to_string(lowest) + " and above, statistics of the memory's write"));
  }
  if (state.carried) report(count_in(backend, *state.carried), where("after the last layer, memory tokens"));
  if (state.last_hidden) report(count_in(backend, *state.last_hidden), where("after the last layer, hidden row"));
}

}  // namespace armt
