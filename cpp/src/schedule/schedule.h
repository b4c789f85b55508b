// The order of (segment, layer) cells. Cell (segment i, layer l) needs (i, l - 1) and (i - 1, l) only, so all cells
// with equal i + l are independent: the diagonal schedule runs them together, the sequential one goes segment by
// segment. Both give the same numbers (arXiv 2506.04761 describes the diagonals).
#pragma once

#include <cstdint>
#include <functional>

#include "backend.h"
#include "engine/plan.h"

namespace armt {

enum class Schedule : uint8_t { automatic, sequential, diagonal };

// Output rows of one finished item: rows first .. first+tokens-1 of `normed` (from its origin) belong to the job's
// tokens token_begin .. token_begin+tokens-1; for a closed segment memory rows follow.
struct FinishedItem {
  const Item& item;
  const Rows& normed;
  int64_t first = 0;
  int64_t token_begin = 0;
  int64_t tokens = 0;
};

struct ScheduleHooks {
  std::function<void(const FinishedItem&)> finished;
  // After each wave, with the tokens it held; may throw Interrupted.
  std::function<void(int64_t tokens)> progressed;
};

// Waves in flight at once: 1 for the sequential schedule, up to n_layers for the diagonal one. `automatic` takes the
// one that is faster for these sizes on this device.
int64_t waves_in_flight(const Backend& backend, const ModelConfig& config, const Planner& planner, Schedule schedule);

// Runs all of the planner's waves through the layers. The workspace has at least `in_flight` slots of at least
// planner.max_wave_rows() rows. On an exception the streams are left half-way: the caller restores them.
void run_waves(Backend& backend, const ModelConfig& config, Workspace& workspace, Planner& planner, int64_t in_flight,
               const ScheduleHooks& hooks);

}  // namespace armt
