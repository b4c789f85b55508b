#include "schedule/flight.h"

#include <algorithm>

#include "engine/stream.h"

namespace armt {
namespace {

void choose_outputs(Flight& flight) {
  for (const Item& item : flight.wave.items) {
    int64_t tokens = 0;
    if (item.job->logits == LogitsWanted::all) {
      tokens = item.token_count;
    } else if (item.last_of_job && item.token_count > 0) {
      tokens = 1;
    }
    flight.output_tokens.push_back(tokens);
    const int64_t needed = tokens + item.memory_rows;
    for (int64_t i = item.row_count - needed; i < item.row_count; ++i) {
      flight.gathered.push_back(flight.row_begin + item.row_begin + i);
      flight.output_rows.push_back(flight.wave.rows[item.row_begin + i]);
    }
  }
}

}  // namespace

Flight make_flight(const Workspace& workspace, Wave wave, int64_t index) {
  Flight flight;
  flight.wave = std::move(wave);
  flight.row_begin = (index % workspace.slots) * workspace.slot_rows;
  choose_outputs(flight);
  for (const Item& item : flight.wave.items) {
    Cell cell;
    cell.row_begin = flight.row_begin + item.row_begin;
    cell.row_count = item.row_count;
    cell.write_rows = item.memory_rows;
    cell.kv_begin = item.kv_begin;
    cell.carried = item.carried.get();
    if (!item.visible.empty()) cell.visible = item.visible.data();
    if (!item.prev_visible.empty()) cell.prev_visible = item.prev_visible.data();
    flight.cells.push_back(cell);
  }
  flight.next_memory.resize(flight.cells.size());
  flight.group.row_begin = flight.row_begin;
  flight.group.row_count = std::ssize(flight.wave.rows);
  flight.group.rows = flight.wave.rows.data();
  flight.group.cells = flight.cells;
  return flight;
}

void prepare(Backend& backend, const ModelConfig& config, Flight& flight) {
  flight.group.layer = flight.layer;
  for (size_t i = 0; i < flight.cells.size(); ++i) {
    Cell& cell = flight.cells[i];
    const Item& item = flight.wave.items[i];
    LayerState& state = item.job->state->layers[flight.layer];
    cell.state = &state;
    reserve_rows(backend, state.current, cell.row_count);
    state.current.rows += cell.row_count;
    if (cell.write_rows > 0 && config.has_association()) {
      flight.next_memory[i] = writable_memory(backend, config, state.memory);
      cell.next_memory = flight.next_memory[i].get();
    }
  }
}

OutputRows prepare_outputs(Flight& flight) {
  int64_t row = 0;
  flight.output_cells = flight.cells;
  for (size_t i = 0; i < flight.cells.size(); ++i) {
    Cell& cell = flight.output_cells[i];
    cell.row_begin = row;
    cell.row_count = flight.output_tokens[i] + cell.write_rows;
    row += cell.row_count;
  }
  OutputRows outputs;
  outputs.group = flight.group;
  outputs.group.row_begin = 0;
  outputs.group.row_count = row;
  outputs.group.rows = flight.output_rows.data();
  outputs.group.cells = flight.output_cells;
  outputs.gathered = flight.gathered;
  return outputs;
}

void settle(const ModelConfig& config, Flight& flight) {
  for (size_t i = 0; i < flight.cells.size(); ++i) {
    Cell& cell = flight.cells[i];
    const Item& item = flight.wave.items[i];
    if (flight.next_memory[i]) cell.state->memory.block = std::move(flight.next_memory[i]);
    if (item.memory_rows == 0) continue;
    LayerState& state = *cell.state;
    if (config.memory.sliding_window && item.job->windowed) {
      std::swap(state.previous, state.current);
      state.previous.rows = item.segment_rows;
    }
    clear_rows(state.current);
  }
}

void land(Backend& backend, const ModelConfig& config, Workspace& workspace, Flight& flight,
          const ScheduleHooks& hooks) {
  const bool used =
      config.recurrent_tokens() || std::ranges::any_of(flight.output_tokens, [](int64_t tokens) { return tokens > 0; });
  if (used) backend.final_norm(workspace.last, workspace.normed, std::ssize(flight.gathered));
  int64_t first = 0, tokens_in_wave = 0;
  for (size_t i = 0; i < flight.wave.items.size(); ++i) {
    const Item& item = flight.wave.items[i];
    const int64_t tokens = flight.output_tokens[i];
    hooks.finished({.item = item,
                    .normed = workspace.normed,
                    .first = first,
                    .token_begin = item.token_begin + item.token_count - tokens,
                    .tokens = tokens});
    first += tokens + item.memory_rows;
    tokens_in_wave += item.token_count;
  }
  hooks.progressed(tokens_in_wave);
}

}  // namespace armt
