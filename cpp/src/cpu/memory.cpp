// Blocks of state and the buffers of a running call.
#include <algorithm>
#include <cstring>

#include "cpu/cpu_backend.h"

namespace armt::cpu {
namespace {

// All ones: a NaN in every element.
void poison(void* data, int64_t bytes) {
  std::memset(data, 0xff, static_cast<size_t>(bytes));
}

Buffer make_rows(Rows& rows, int64_t width, int64_t count, bool poisoned) {
  Buffer buffer(std::max<int64_t>(1, width * count) * static_cast<int64_t>(sizeof(float)));
  if (poisoned) poison(buffer.data(), buffer.bytes());
  rows = {.data = buffer.data(), .width = width, .origin = 0};
  return buffer;
}

struct ScratchRows {
  Scratch rows;
  Buffer hidden, qkv, context, ff;
};

struct CpuWorkspace : Workspace {
  Buffer residual_rows, last_rows, normed_rows;
  std::mutex mutex;
  std::vector<std::unique_ptr<ScratchRows>> idle;
};

std::unique_ptr<ScratchRows> make_scratch(const ModelConfig& config, int64_t rows, bool poisoned) {
  auto scratch = std::make_unique<ScratchRows>();
  scratch->hidden = make_rows(scratch->rows.hidden, config.decoder.d_model, rows, poisoned);
  scratch->qkv = make_rows(scratch->rows.qkv, config.qkv_width(), rows, poisoned);
  scratch->context = make_rows(scratch->rows.context, config.query_width(), rows, poisoned);
  scratch->ff = make_rows(scratch->rows.ff, config.decoder.d_ff, rows, poisoned);
  return scratch;
}

// Scratch taken from the workspace's idle ones, given back at the end of the scope.
class ScratchLease {
 public:
  ScratchLease(CpuWorkspace& workspace, const ModelConfig& config, bool poisoned) : workspace_(workspace) {
    {
      const std::lock_guard lock(workspace.mutex);
      if (!workspace.idle.empty()) {
        scratch_ = std::move(workspace.idle.back());
        workspace.idle.pop_back();
      }
    }
    if (!scratch_) scratch_ = make_scratch(config, workspace.slot_rows, poisoned);
  }
  ~ScratchLease() {
    const std::lock_guard lock(workspace_.mutex);
    workspace_.idle.push_back(std::move(scratch_));
  }
  ScratchLease(const ScratchLease&) = delete;
  ScratchLease& operator=(const ScratchLease&) = delete;

  Scratch from(int64_t origin) const {
    Scratch rows = scratch_->rows;
    for (Rows* each : {&rows.hidden, &rows.qkv, &rows.context, &rows.ff}) each->origin = origin;
    return rows;
  }

 private:
  CpuWorkspace& workspace_;
  std::unique_ptr<ScratchRows> scratch_;
};

}  // namespace

BlockRef CpuBackend::allocate(int64_t bytes) {
  auto block = std::make_shared<Block>();
  block->data = aligned_allocate(std::max<int64_t>(1, bytes));
  block->bytes = bytes;
  block->release = [this](Block& released) {
    aligned_release(released.data);
    count_block(-released.bytes);
  };
  count_block(bytes);
  if (poison_) poison(block->data, bytes);
  return block;
}

void CpuBackend::copy(Block& to, const Block& from, int64_t bytes) {
  std::memcpy(to.data, from.data, static_cast<size_t>(bytes));
}

void CpuBackend::upload(Block& to, int64_t offset, const void* from, int64_t bytes) {
  std::memcpy(static_cast<char*>(to.data) + offset, from, static_cast<size_t>(bytes));
}

void CpuBackend::download(const Block& from, int64_t offset, void* to, int64_t bytes) {
  std::memcpy(to, static_cast<const char*>(from.data) + offset, static_cast<size_t>(bytes));
}

int64_t CpuBackend::count_nonfinite(std::span<const Floats> values) {
  int64_t count = 0;
  for (const Floats& floats : values) {
    const char* data = static_cast<const char*>(floats.block->data) + floats.offset;
    count += armt::count_nonfinite({reinterpret_cast<const float*>(data), static_cast<size_t>(floats.count)});
  }
  return count;
}

std::unique_ptr<Workspace> CpuBackend::make_workspace(int64_t slots, int64_t slot_rows) {
  auto workspace = std::make_unique<CpuWorkspace>();
  const int64_t width = config_.decoder.d_model;
  workspace->slots = slots;
  workspace->slot_rows = slot_rows;
  workspace->residual_rows = make_rows(workspace->residual, width, slots * slot_rows, poison_);
  workspace->last_rows = make_rows(workspace->last, width, slot_rows, poison_);
  workspace->normed_rows = make_rows(workspace->normed, width, slot_rows, poison_);
  return workspace;
}

void CpuBackend::run(Workspace& workspace, Groups groups, const std::function<void(Groups, const Scratch&)>& body) {
  const ScratchLease lease(static_cast<CpuWorkspace&>(workspace), config_, poison_);
  for (const Group& group : groups) body(Groups(&group, 1), lease.from(group.row_begin));
}

void CpuBackend::work([[maybe_unused]] int64_t most, const std::function<void()>& body) {
  // As many shares as threads, even where that is more than `most`: with fewer, the others could take them all before
  // the caller comes, and wait for what only the caller may do.
  pool_.parallel_for(pool_.threads(), [&body](int64_t) { body(); });
}

}  // namespace armt::cpu
