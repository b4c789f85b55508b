// The buffers of a running call, and run() itself.
#include <algorithm>
#include <cstring>

#include "armt/error.h"
#include "check.h"
#include "workspace.h"

namespace armt::cuda {
namespace {

DeviceBuffer make_rows(Arena& arena, Rows& rows, int64_t width, int64_t count, int64_t element) {
  DeviceBuffer buffer(arena, std::max<int64_t>(1, width * count) * element);
  rows = {.data = buffer.data(), .width = width, .origin = 0};
  return buffer;
}

// Slots of the ring of residual rows. More than are in flight, so that the waves in flight seldom lie across its end:
// then a product over all of them is one batch.
int64_t ring_slots(int64_t in_flight, int64_t slot_bytes) {
  constexpr int64_t kLimit = int64_t{512} << 20;
  if (in_flight == 1) return 1;
  const int64_t most = std::max<int64_t>(in_flight, kLimit / std::max<int64_t>(1, slot_bytes));
  return std::min(in_flight * 16, most);
}

}  // namespace

CudaWorkspace::~CudaWorkspace() {
  const std::lock_guard lock(backend.mutex_);
  if (entering) cudaStreamSynchronize(backend.side_.stream);
  backend.workspaces_.erase(residual.data);
}

std::unique_ptr<Workspace> CudaBackend::make_workspace(int64_t slots, int64_t slot_rows) {
  const Entry entry(*this);
  auto made = std::make_unique<CudaWorkspace>(*this);
  CudaWorkspace& ws = *made;
  const DecoderConfig& decoder = config_.decoder;
  const int64_t width = decoder.d_model;
  ws.chains = slots;
  ws.slot_rows = std::max<int64_t>(1, slot_rows);
  ws.slots = ring_slots(slots, ws.slot_rows * width * element());
  const int64_t ring = ws.slots * ws.slot_rows;
  ws.residual_rows = make_rows(arena_, ws.residual, width, ring, element());
  ws.last_rows = make_rows(arena_, ws.last, width, ws.slot_rows, element());
  ws.normed_rows = make_rows(arena_, ws.normed, width, ws.slot_rows, element());
  ws.row_meta = DeviceBuffer(arena_, ring * static_cast<int64_t>(sizeof(DevRow)));
  ws.last_meta = DeviceBuffer(arena_, ws.slot_rows * static_cast<int64_t>(sizeof(DevRow)));
  ws.angles = DeviceBuffer(arena_, std::max<int64_t>(1, ring * decoder.rotary_dims) * 4);
  ws.gathered = DeviceBuffer(arena_, ws.slot_rows * 8);
  const auto fill = [&](CudaScratch& scratch, int64_t rows) {
    scratch.hidden = make_rows(arena_, scratch.rows.hidden, width, rows, element());
    scratch.qkv = make_rows(arena_, scratch.rows.qkv, config_.qkv_width(), rows, element());
    scratch.context = make_rows(arena_, scratch.rows.context, config_.query_width(), rows, element());
    scratch.ff = make_rows(arena_, scratch.rows.ff, decoder.d_ff, rows, element());
    if (decoder.gated_mlp) scratch.gated = DeviceBuffer(arena_, rows * 2 * decoder.d_ff * element());
  };
  fill(ws.main, slots * ws.slot_rows);
  if (slots > 1) fill(ws.side, ws.slot_rows);
  workspaces_[ws.residual.data] = &ws;
  return made;
}

CudaWorkspace& CudaBackend::workspace_of(const Rows& residual) const {
  return *workspaces_.at(residual.data);
}

bool CudaBackend::is_scratch(const Rows& rows) const {
  if (active_.scratch == nullptr) return false;
  const Scratch& scratch = active_.scratch->rows;
  return rows.data == scratch.hidden.data || rows.data == scratch.qkv.data || rows.data == scratch.context.data ||
         rows.data == scratch.ff.data;
}

namespace {

// Lays out one upload: reserves room first, hands out offsets into it.
class Layout {
 public:
  template <class T>
  int64_t add(int64_t count) {
    const int64_t offset = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return offset;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

int64_t pages_of(const Cell& cell) {
  return std::ssize(cell.state->current.pages) + std::ssize(cell.state->previous.pages);
}

bool writes(const Cell& cell) {
  return cell.write_rows > 0 && cell.next_memory != nullptr;
}

int64_t mask_bytes(const Cell& cell) {
  return (cell.visible != nullptr ? cell.state->current.rows : 0) +
         (cell.prev_visible != nullptr ? cell.state->previous.rows : 0);
}

// Where the parts of a table lie.
struct TableLayout {
  int64_t groups = 0, cells = 0, pages = 0, masks = 0, bytes = 0;

  explicit TableLayout(Groups of) {
    int64_t cell_count = 0, page_count = 0, mask_count = 0;
    for (const Group& group : of) {
      cell_count += std::ssize(group.cells);
      for (const Cell& cell : group.cells) {
        page_count += pages_of(cell);
        mask_count += mask_bytes(cell);
      }
    }
    Layout layout;
    groups = layout.add<DevGroup>(std::ssize(of));
    cells = layout.add<DevCell>(cell_count);
    pages = layout.add<void*>(page_count);
    masks = layout.add<uint8_t>(mask_count);
    bytes = layout.bytes();
  }
};

int64_t table_bytes(Groups groups) {
  return TableLayout(groups).bytes;
}

}  // namespace

cudaStream_t CudaBackend::entry_stream() {
  check(cudaStreamWaitEvent(side_.stream, forked_), "cudaStreamWaitEvent");
  return side_.stream;
}

void CudaBackend::finish_entry(CudaWorkspace& workspace) {
  if (!workspace.entering) return;
  check(cudaEventRecord(entered_, side_.stream), "cudaEventRecord");
  check(cudaStreamWaitEvent(main_.stream, entered_), "cudaStreamWaitEvent");
  workspace.entering = false;
}

void CudaBackend::build_table(Table& table, Groups groups, std::span<const int64_t> scratch_rows, const DevRow* rows,
                              cudaStream_t stream) {
  table.groups = groups;
  table.host.clear();
  table.writers.clear();
  table.cell_rows.clear();
  table.cell_keys.clear();
  for (const Group& group : groups) {
    Writers writers;
    for (const Cell& cell : group.cells) writers.count += writes(cell);
    table.writers.push_back(writers);
  }
  // The order of stacked weights: so that the products of a write are one batch.
  for (size_t g = groups.size() - 1; g-- > 0;) {
    table.writers[g].first = table.writers[g + 1].first + table.writers[g + 1].count;
  }
  const TableLayout layout(groups);
  const int64_t groups_at = layout.groups, cells_at = layout.cells;
  int64_t page_at = layout.pages, mask_at = layout.masks;
  grow(arena_, table.memory, layout.bytes);
  char* host = staging_.reserve(layout.bytes);
  char* device = table.memory.data();

  const auto add_pages = [&](const KvCache& cache) {
    const auto* found = reinterpret_cast<const char* const*>(device + page_at);
    for (const auto& page : cache.pages) {
      std::memcpy(host + page_at, &page->block->data, sizeof(void*));
      page_at += static_cast<int64_t>(sizeof(void*));
    }
    return found;
  };
  const auto add_mask = [&](const uint8_t* mask, int64_t count) -> const uint8_t* {
    if (mask == nullptr) return nullptr;
    std::memcpy(host + mask_at, mask, static_cast<size_t>(count));
    mask_at += count;
    return reinterpret_cast<const uint8_t*>(device + mask_at - count);
  };

  int32_t cell_count = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    const Group& group = groups[g];
    DevGroup out;
    out.row = group.row_begin;
    out.scratch = scratch_rows[g];
    out.rows = static_cast<int32_t>(group.row_count);
    out.stack = static_cast<int32_t>(stack_of(group.layer));
    out.cell_begin = cell_count;
    out.cells = static_cast<int32_t>(group.cells.size());
    auto writer = static_cast<int32_t>(table.writers[g].first);
    for (const Cell& cell : group.cells) {
      DevCell dev;
      dev.row = cell.row_begin;
      dev.scratch = out.scratch + cell.row_begin - group.row_begin;
      dev.cur_pages = add_pages(cell.state->current);
      dev.prev_pages = add_pages(cell.state->previous);
      if (cell.state->memory.written()) dev.memory = static_cast<const float*>(cell.state->memory.block->data);
      if (writes(cell)) {
        dev.next_memory = static_cast<float*>(cell.next_memory->data);
        dev.writer = writer++;
      }
      dev.visible = add_mask(cell.visible, cell.state->current.rows);
      dev.prev_visible = add_mask(cell.prev_visible, cell.state->previous.rows);
      dev.rows = static_cast<int32_t>(cell.row_count);
      dev.write_rows = static_cast<int32_t>(cell.write_rows);
      dev.kv_begin = static_cast<int32_t>(cell.kv_begin);
      dev.cur_rows = static_cast<int32_t>(cell.state->current.rows);
      dev.prev_rows = static_cast<int32_t>(cell.state->previous.rows);
      dev.layer = static_cast<int32_t>(group.layer);
      dev.stack = out.stack;
      std::memcpy(host + cells_at + cell_count * sizeof(DevCell), &dev, sizeof(dev));
      table.cell_rows.push_back(dev.rows);
      table.cell_keys.push_back(dev.cur_rows + dev.prev_rows);
      ++cell_count;
    }
    std::memcpy(host + groups_at + g * sizeof(DevGroup), &out, sizeof(out));
    table.host.push_back(out);
  }
  staging_.upload(device, layout.bytes, stream);
  table.batch.groups = reinterpret_cast<const DevGroup*>(device + groups_at);
  table.batch.cells = reinterpret_cast<const DevCell*>(device + cells_at);
  table.batch.rows = rows;
  table.batch.group_count = static_cast<int32_t>(groups.size());
  table.batch.cell_count = cell_count;
}

CudaBackend::Part CudaBackend::part_of(Groups groups) {
  Table* table = active_.whole;
  const bool inside = table != nullptr && groups.data() >= table->groups.data() &&
                      groups.data() + groups.size() <= table->groups.data() + table->groups.size();
  if (!inside) {
    // The last layer's compacted rows: known only inside the call.
    table = &last_table_;
    if (table->groups.data() != groups.data() || table->groups.size() != groups.size()) {
      std::vector<int64_t> scratch_rows;
      for (const Group& group : groups) scratch_rows.push_back(group.row_begin);
      build_table(*table, groups, scratch_rows, active_.workspace->last_meta.as<DevRow>(), stream());
    }
  }
  const auto first = static_cast<size_t>(groups.data() - table->groups.data());
  Part part;
  part.groups = std::span(table->host).subspan(first, groups.size());
  part.writers = std::span(table->writers).subspan(first, groups.size());
  part.batch = table->batch;
  Batch& batch = part.batch;
  batch.groups += first;
  batch.group_count = static_cast<int32_t>(groups.size());
  batch.cell_begin = part.groups.front().cell_begin;
  batch.cells += batch.cell_begin;
  batch.cell_count = part.groups.back().cell_begin + part.groups.back().cells - batch.cell_begin;
  for (const DevGroup& group : part.groups) batch.max_group_rows = std::max(batch.max_group_rows, group.rows);
  for (int32_t i = 0; i < batch.cell_count; ++i) {
    batch.max_cell_rows = std::max(batch.max_cell_rows, table->cell_rows[batch.cell_begin + i]);
    batch.max_keys = std::max(batch.max_keys, table->cell_keys[batch.cell_begin + i]);
  }
  return part;
}

void CudaBackend::run(Workspace& workspace, Groups groups, const std::function<void(Groups, const Scratch&)>& body) {
  const Entry entry(*this);
  auto& ws = static_cast<CudaWorkspace&>(workspace);
  struct Reset {
    CudaBackend& backend;
    bool joined = true;
    ~Reset() {
      // After a fault: memory that the side stream uses must not be handed out before it is done.
      if (!joined) cudaStreamSynchronize(backend.side_.stream);
      backend.active_ = {};
      backend.last_table_.groups = {};
    }
  } reset{*this};

  // The last layer's cell runs other operations than the rest; beside them on a stream of its own it costs no time.
  const bool apart = groups.size() > 1 && groups.back().layer == config_.decoder.n_layers - 1;
  const Groups together = groups.first(groups.size() - (apart ? 1 : 0));
  const int64_t ring = ws.slots * ws.slot_rows, oldest = together.back().row_begin;
  std::vector<int64_t> scratch_rows;
  for (const Group& group : together) scratch_rows.push_back((group.row_begin - oldest + ring) % ring);
  if (apart) scratch_rows.push_back(0);
  // The table before the last is no longer read when the side's stream may write it.
  Table& table = step_tables_[next_table_];
  next_table_ ^= 1;
  const bool beside = ws.chains > 1 && table.memory.bytes() >= table_bytes(groups);
  ws.entering = ws.entering || beside;
  build_table(table, groups, scratch_rows, ws.row_meta.as<DevRow>(), beside ? entry_stream() : main_.stream);
  finish_entry(ws);
  ws.busy.clear();
  for (const Group& group : groups) ws.busy.push_back(group.row_begin);

  active_ = {.workspace = &ws, .scratch = &ws.main, .lane = &main_, .whole = &table};
  check(cudaEventRecord(forked_, main_.stream), "cudaEventRecord");
  if (apart) {
    reset.joined = false;
    check(cudaStreamWaitEvent(side_.stream, forked_), "cudaStreamWaitEvent");
    active_.lane = &side_;
    active_.scratch = &ws.side;
    body(groups.last(1), ws.side.rows);
    check(cudaEventRecord(joined_, side_.stream), "cudaEventRecord");
    active_.lane = &main_;
    active_.scratch = &ws.main;
  }
  body(together, ws.main.rows);
  if (apart) check(cudaStreamWaitEvent(main_.stream, joined_), "cudaStreamWaitEvent");
  reset.joined = true;
}

}  // namespace armt::cuda
