// Operations on single rows: embedding, norms, copies.
#include <cstring>

#include "cpu/cpu_backend.h"
#include "slots.h"

namespace armt::cpu {
namespace {

constexpr int64_t kRowGrain = 16;  // rows below which a second thread is not worth waking

void copy_rows(float* to, const float* from, int64_t floats) {
  std::memcpy(to, from, static_cast<size_t>(floats) * sizeof(float));
}

// The cell that holds the group's row `index`; cells lie one after another.
const Cell& cell_of(const Group& group, int64_t index) {
  size_t i = 0;
  while (group.row_begin + index >= group.cells[i].row_begin + group.cells[i].row_count) ++i;
  return group.cells[i];
}

}  // namespace

void CpuBackend::embed_row(const Group& group, int64_t index, float* out) const {
  const Row& row = group.rows[index];
  const int64_t width = config_.decoder.d_model;
  if (row.source >= 0) {
    unpack_row(matrix(Matrix::embedding, 0), row.source, out);
  } else if (row.source == Row::kSink) {
    copy_rows(out, sink_.floats(), width);
  } else {
    const Block* carried = cell_of(group, index).carried;
    const float* vectors = carried != nullptr ? static_cast<const float*>(carried->data) : memory_.floats();
    copy_rows(out, vectors + (Row::kFirstMemory - row.source) * width, width);
  }
  if (config_.decoder.learned_positions > 0) kernels_.add(positions_.floats() + row.position * width, out, width);
}

void CpuBackend::embed(const Group& group, const Rows& out) {
  pool_.parallel_ranges(group.row_count, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) embed_row(group, i, row_of(out, group.row_begin + i));
  });
}

void CpuBackend::norm_rows(Vector which, int64_t layer, const float* in, float* out, int64_t rows) {
  const auto kernel = config_.decoder.norm == NormKind::layer ? kernels_.layer_norm : kernels_.rms_norm;
  const float* weight = vector(which, layer);
  const float* bias = vector(norm_bias(which), layer);
  const int64_t width = config_.decoder.d_model;
  const auto eps = static_cast<float>(config_.decoder.norm_eps);
  pool_.parallel_ranges(rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) kernel(in + r * width, out + r * width, width, weight, bias, eps);
  });
}

void CpuBackend::norm(Vector which, Groups groups, const Rows& in, const Rows& out) {
  for (const Group& group : groups) {
    norm_rows(which, group.layer, row_of(in, group.row_begin), row_of(out, group.row_begin), group.row_count);
  }
}

void CpuBackend::final_norm(const Rows& in, const Rows& out, int64_t count) {
  norm_rows(Vector::final_norm, 0, static_cast<const float*>(in.data), static_cast<float*>(out.data), count);
}

void CpuBackend::gather(const Rows& from, std::span<const int64_t> rows, const Rows& to) {
  for (int64_t i = 0; i < std::ssize(rows); ++i)
    copy_rows(row_of(to, to.origin + i), row_of(from, rows[i]), from.width);
}

void CpuBackend::save_rows(const Rows& from, int64_t first, int64_t count, Block& to) {
  copy_rows(static_cast<float*>(to.data), row_of(from, from.origin + first), count * from.width);
}

void CpuBackend::load_rows(const Block& from, int64_t count, const Rows& to, int64_t first) {
  copy_rows(row_of(to, to.origin + first), static_cast<const float*>(from.data), count * to.width);
}

}  // namespace armt::cpu
