// A wave on its way through the layers: the steps that every order of cells is made of.
#pragma once

#include <cstdint>
#include <vector>

#include "backend.h"
#include "engine/plan.h"
#include "layers/block.h"
#include "schedule/schedule.h"

namespace armt {

struct Flight {
  Wave wave;
  int64_t layer = 0;      // the next one to run
  int64_t row_begin = 0;  // of the wave in Workspace::residual
  std::vector<Cell> cells;
  std::vector<BlockRef> next_memory;  // of each cell that writes
  Group group;

  // The last layer's share: rows that somebody needs, compacted.
  std::vector<int64_t> gathered;  // absolute rows
  std::vector<Row> output_rows;
  std::vector<Cell> output_cells;
  std::vector<int64_t> output_tokens;  // of each item
};

// The index-th wave of a call, in its slot of the workspace; nothing is computed yet.
Flight make_flight(const Workspace& workspace, Wave wave, int64_t index);

// Device memory that the flight's cells need in its next layer.
void prepare(Backend& backend, const ModelConfig& config, Flight& flight);

// After prepare, for the last layer only: the flight's rows in Workspace::last.
OutputRows prepare_outputs(Flight& flight);

// What the layer's cells leave behind in their streams.
void settle(const ModelConfig& config, Flight& flight);

// After the last layer: final norm of the rows in Workspace::last, hooks.
void land(Backend& backend, const ModelConfig& config, Workspace& workspace, Flight& flight,
          const ScheduleHooks& hooks);

// run_waves by several threads: each takes the oldest cell whose two predecessors are done, so that none waits for the
// end of a diagonal. Hooks run in the calling thread.
void run_pipeline(Backend& backend, const ModelConfig& config, Workspace& workspace, Planner& planner,
                  int64_t in_flight, const ScheduleHooks& hooks);

}  // namespace armt
