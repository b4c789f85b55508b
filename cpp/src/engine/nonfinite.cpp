#include "engine/nonfinite.h"

#include <vector>

#include "armt/error.h"

namespace armt {
namespace {

constexpr int64_t kFloat = sizeof(float);

Floats all_of(const Block& block) {
  return {.block = &block, .offset = 0, .count = block.bytes / kFloat};
}

Floats statistics_of(const ModelConfig& config, const LayerState& layer) {
  return {.block = layer.memory.block.get(),
          .offset = association_bytes(config) - kWriteStats * kFloat,
          .count = kWriteStats};
}

int64_t count_in(Backend& backend, const Floats& values) {
  return backend.count_nonfinite({&values, 1});
}

}  // namespace

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

void NonfiniteWatch::check(Backend& backend, const Floats& values, const char* what) {
  if (const int64_t count = count_in(backend, values); count > 0) report(count, what);
}

// What is no number in one layer's rows is none in the layers above, so the last layer's statistics speak for all.
void NonfiniteWatch::check_written(Backend& backend, const ModelConfig& config, std::span<const Written> streams) {
  std::vector<Floats> values;
  for (const Written& written : streams) {
    const StreamState& state = *written.state;
    if (state.layers.back().memory.written()) values.push_back(statistics_of(config, state.layers.back()));
    if (state.carried) values.push_back(all_of(*state.carried));
    if (state.last_hidden) values.push_back(all_of(*state.last_hidden));
  }
  if (values.empty() || backend.count_nonfinite(values) == 0) return;
  for (const Written& written : streams) explain(backend, config, written);
}

// Where in one stream they are.
void NonfiniteWatch::explain(Backend& backend, const ModelConfig& config, const Written& written) {
  const StreamState& state = *written.state;
  const auto where = [&](const std::string& part) {
    const int64_t last = state.closed_segments - 1;
    return (written.first < last ? "segments " + std::to_string(written.first) + " .. " : "segment ") +
           std::to_string(last) + ", " + part;
  };
  const auto in_statistics = [&](const LayerState& layer) {
    return layer.memory.written() ? count_in(backend, statistics_of(config, layer)) : 0;
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
  if (state.carried) report(count_in(backend, all_of(*state.carried)), where("after the last layer, memory tokens"));
  if (state.last_hidden) {
    report(count_in(backend, all_of(*state.last_hidden)), where("after the last layer, hidden row"));
  }
}

}  // namespace armt
