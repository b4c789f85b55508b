// What a running call tells the device about its rows, cells and groups.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace armt::cuda {

// Row of a wave; uploaded once, when the wave enters the model, beside its row of the residual buffer.
struct DevRow {
  static constexpr uint32_t kSeesPadding = 1, kSeesPrevPadding = 2, kUniform = 4;
  int64_t position = 0;
  const float* vector = nullptr;  // RMT: the carried memory vector [D] that this row starts from
  int32_t source = 0;
  int32_t prev_begin = 0, cur_begin = 0, cur_end = 0;
  int32_t cell = 0;   // index among the group's cells
  int32_t angle = 0;  // row of the table of rotations
  uint32_t flags = 0;
  int32_t unused = 0;
};

struct DevCell {
  int64_t row = 0;      // first row in the residual (or compacted) buffers
  int64_t scratch = 0;  // first row in the scratch buffers
  const char* const* cur_pages = nullptr;
  const char* const* prev_pages = nullptr;
  const float* memory = nullptr;  // A, then z; null: never written
  float* next_memory = nullptr;   // null: no write
  const uint8_t* visible = nullptr;
  const uint8_t* prev_visible = nullptr;
  int32_t rows = 0, write_rows = 0;
  int32_t kv_begin = 0, cur_rows = 0, prev_rows = 0;
  int32_t layer = 0;
  int32_t stack = 0;   // place of the layer in stacked weights
  int32_t writer = 0;  // index among the cells of this call that write
};

struct DevGroup {
  int64_t row = 0, scratch = 0;
  int32_t rows = 0;
  int32_t stack = 0;
  int32_t cell_begin = 0, cells = 0;
};

// A run of groups as a kernel sees it. `rows` lies parallel to the residual (or compacted) buffer.
struct Batch {
  const DevGroup* groups = nullptr;
  const DevCell* cells = nullptr;  // of the first group on
  const DevRow* rows = nullptr;
  int32_t group_count = 0, cell_count = 0;
  int32_t cell_begin = 0;  // DevGroup::cell_begin of the first group
  int32_t max_group_rows = 0, max_cell_rows = 0, max_keys = 0;
};

// Activation rows as a kernel sees them: row r of group g is row (scratch ? g.scratch : g.row) + r.
struct View {
  void* data = nullptr;
  int64_t width = 0;
  bool scratch = false;
};

}  // namespace armt::cuda
