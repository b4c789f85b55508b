#include "schedule/schedule.h"

#include <algorithm>
#include <deque>
#include <vector>

#include "layers/block.h"
#include "schedule/flight.h"

namespace armt {
namespace {

// Whether the backend would rather see the whole way of this wave at once.
bool goes_at_once(const Backend& backend, const Flight& flight) {
  if (flight.group.row_count > backend.replayed_rows()) return false;
  return std::ranges::none_of(flight.cells, [](const Cell& cell) { return cell.write_rows > 0; });
}

// All layers of a wave that writes nothing; all its rows run in the last layer too.
void fly_at_once(Backend& backend, const ModelConfig& config, Workspace& workspace, Flight& flight) {
  std::vector<std::vector<Cell>> cells;
  std::vector<Group> layers;
  for (; flight.layer < config.decoder.n_layers; ++flight.layer) {
    prepare(backend, config, flight);
    cells.push_back(flight.cells);
    layers.push_back(flight.group);
    layers.back().cells = cells.back();
  }
  backend.run_wave(workspace, layers, [&](Groups layer, const Scratch& scratch) {
    run_blocks(backend, config, workspace, scratch, layer);
  });
  if (!flight.gathered.empty()) backend.gather(workspace.residual, flight.gathered, workspace.last);
}

// Values of a segment's rows below which a device is not full with one layer's.
constexpr int64_t kDeviceCell = 6 * 1024 * 1024;
// Values below which threads that share the operations of a cell wait for each other too often; whole cells side by
// side do not. Large cells keep all threads busy, and so does their head, which would wait for the caller in a
// pipeline.
constexpr int64_t kSmallCell = 64 * 1024;

}  // namespace

int64_t waves_in_flight(const Backend& backend, const ModelConfig& config, const Planner& planner, Schedule schedule) {
  const int64_t layers = config.decoder.n_layers, workers = backend.workers();
  // RMT's segments wait for each other: each begins with what the one before carried out of its last layer.
  if (config.recurrent_tokens() || planner.waves() == 1 || schedule == Schedule::sequential) return 1;
  if (schedule == Schedule::diagonal) return layers;
  const int64_t cell = planner.max_wave_rows() * config.decoder.d_model;
  if (workers == 0) return cell < kDeviceCell ? layers : 1;
  return workers > 1 && cell < kSmallCell ? layers : 1;
}

void run_waves(Backend& backend, const ModelConfig& config, Workspace& workspace, Planner& planner, int64_t in_flight,
               const ScheduleHooks& hooks) {
  if (in_flight > 1 && backend.workers() > 1) {
    run_pipeline(backend, config, workspace, planner, in_flight, hooks);
    return;
  }
  const int64_t last_layer = config.decoder.n_layers - 1;
  std::deque<Flight> flights;
  std::vector<Group> groups;
  int64_t started = 0;
  while (!planner.done() || !flights.empty()) {
    if (!planner.done() && std::ssize(flights) < in_flight) {
      flights.push_back(make_flight(workspace, planner.next(), started++));
      backend.embed(flights.back().group, workspace.residual);
      if (flights.size() == 1 && goes_at_once(backend, flights.back())) {
        fly_at_once(backend, config, workspace, flights.back());
        land(backend, config, workspace, flights.back(), hooks);
        flights.pop_back();
        continue;
      }
    }
    groups.clear();
    OutputRows outputs;
    for (auto flight = flights.rbegin(); flight != flights.rend(); ++flight) {
      prepare(backend, config, *flight);
      if (flight->layer == last_layer) outputs = prepare_outputs(*flight);
      groups.push_back(flight->group);
    }
    backend.run(workspace, groups, [&](Groups some, const Scratch& scratch) {
      const bool has_last = some.back().layer == last_layer;
      run_blocks(backend, config, workspace, scratch, some.first(some.size() - has_last));
      if (has_last) run_last_block(backend, config, workspace, scratch, some.back(), outputs);
    });
    for (Flight& flight : flights) {
      settle(config, flight);
      ++flight.layer;
    }
    if (flights.front().layer > last_layer) {
      land(backend, config, workspace, flights.front(), hooks);
      flights.pop_front();
    }
  }
}

}  // namespace armt
