// Reads and writes of the associative memory (docs/mathematics.md).
#include <algorithm>
#include <cmath>

#include "cpu/cpu_backend.h"

namespace armt::cpu {
namespace {

constexpr double kEpsilon = 1e-5;       // added to every denominator
constexpr double kNormFloor = 1e-12;    // least length that features are divided by
constexpr double kTaskWork = 60e3;      // multiply-adds below which a further task costs more than it saves
constexpr int64_t kSparsity = 4;        // about one feature in four is not zero
constexpr int64_t kTokenFloats = 4096;  // of the values of all memory tokens that an update holds in L1

// A [h, F, E], z [h, F], statistics: one association's block.
struct MemoryView {
  float* matrix = nullptr;
  float* normaliser = nullptr;  // null without a denominator
  float* stats = nullptr;
};

MemoryView view_of(const Block& block, const ModelConfig& config) {
  const int64_t rows = config.memory.n_heads * config.features();
  MemoryView view;
  view.matrix = static_cast<float*>(block.data);
  view.stats = view.matrix + rows * config.value_dim();
  if (config.memory.use_denom) {
    view.normaliser = view.stats;
    view.stats += rows;
  }
  return view;
}

// Sum of term(feature) in four interleaved chains of float64.
template <class Term>
double sum_over(const Feature* features, int64_t count, Term term) {
  double part[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int p = 0; p < 4; ++p) part[p] += term(features[i + p]);
  }
  for (int p = 0; i < count; ++i, ++p) part[p] += term(features[i]);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

double squared_length(const Feature* features, int64_t count) {
  return sum_over(features, count, [](Feature f) { return static_cast<double>(f.value) * f.value; });
}

double denominator(const Feature* features, int64_t count, const float* normaliser) {
  if (normaliser == nullptr) return 1.0;
  return kEpsilon + sum_over(features, count,
                             [normaliser](Feature f) { return static_cast<double>(f.value) * normaliser[f.index]; });
}

// phi of one head's share of a projected row, normalised where the dialect says so.
int64_t features_of(const CpuBackend& backend, const float* x, Feature* out) {
  const MemoryConfig& memory = backend.config().memory;
  const int64_t n = memory.d_mem / memory.n_heads;
  float* scratch = thread_scratch(Slot::other, features_scratch(n, memory.rolls));
  const int64_t count = backend.kernels().features(x, n, memory.rolls, out, scratch);
  if (memory.normalise_keys) {
    const double factor = 1.0 / std::max(std::sqrt(squared_length(out, count)), kNormFloor);
    for (int64_t i = 0; i < count; ++i) out[i].value = static_cast<float>(out[i].value * factor);
  }
  return count;
}

int64_t tasks_for(double work, int64_t most) {
  return std::clamp<int64_t>(static_cast<int64_t>(work / kTaskWork), 1, most);
}

// Carves arrays from one piece of scratch.
class Carver {
 public:
  template <class T>
  void take(T*& array, int64_t count) {
    if (base_ != nullptr) array = reinterpret_cast<T*>(base_ + floats_);
    floats_ += padded((count * static_cast<int64_t>(sizeof(T)) + 3) / 4);
  }
  int64_t floats() const { return floats_; }
  void start(float* base) {
    base_ = base;
    floats_ = 0;
  }

 private:
  float* base_ = nullptr;
  int64_t floats_ = 0;
};

// Buffers of a block of rows that read.
struct ReadBuffers {
  float* queries = nullptr;       // [rows, d]
  Feature* features = nullptr;    // [rows, F], one head at a time
  int64_t* counts = nullptr;      // [rows]
  float* denominators = nullptr;  // [rows]

  void take_from(Carver& carver, const ModelConfig& config, int64_t rows) {
    carver.take(queries, rows * config.memory.d_mem);
    carver.take(features, rows * config.features());
    carver.take(counts, rows);
    carver.take(denominators, rows);
  }
};

template <class Buffers, class... Sizes>
Buffers carve(Slot slot, const ModelConfig& config, Sizes... sizes) {
  Buffers buffers;
  Carver carver;
  buffers.take_from(carver, config, sizes...);
  carver.start(thread_scratch(slot, carver.floats()));
  buffers.take_from(carver, config, sizes...);
  return buffers;
}

// x += Read(x) for rows of one cell whose queries are at hand. A passes by in slices of columns
// that stay in cache while all rows read them.
void read_rows(const CpuBackend& backend, const Block& block, const ReadBuffers& buffers, const float* queries,
               int64_t rows, float* x, int64_t ld) {
  const ModelConfig& config = backend.config();
  const MemoryView memory = view_of(block, config);
  const int64_t heads = config.memory.n_heads, n = config.memory.d_mem / heads;
  const int64_t features = config.features(), values = config.value_dim();
  const int64_t slice = backend.kernels().memory_slice;
  for (int64_t head = 0; head < heads; ++head) {
    const float* normaliser = memory.normaliser == nullptr ? nullptr : memory.normaliser + head * features;
    const float* matrix = memory.matrix + head * features * values;
    for (int64_t r = 0; r < rows; ++r) {
      Feature* phi = buffers.features + r * features;
      buffers.counts[r] = features_of(backend, queries + r * config.memory.d_mem + head * n, phi);
      buffers.denominators[r] = static_cast<float>(denominator(phi, buffers.counts[r], normaliser));
    }
    for (int64_t e = 0; e < values; e += slice) {
      for (int64_t r = 0; r < rows; ++r) {
        backend.kernels().recall(buffers.features + r * features, buffers.counts[r], matrix + e, values,
                                 std::min(slice, values - e), buffers.denominators[r], 1.0f,
                                 x + r * ld + head * values + e);
      }
    }
  }
}

bool reads(const Cell& cell) {
  return cell.state->memory.written();
}

// Rows begin .. end-1 (absolute) of a group.
void read_block(CpuBackend& backend, const Group& group, const Rows& x, int64_t begin, int64_t end) {
  const auto overlaps = [=](const Cell& cell) {
    return reads(cell) && cell.row_begin < end && cell.row_begin + cell.row_count > begin;
  };
  if (std::none_of(group.cells.begin(), group.cells.end(), overlaps)) return;
  const ModelConfig& config = backend.config();
  const auto buffers = carve<ReadBuffers>(Slot::association, config, end - begin);
  const int64_t width = config.memory.d_mem;
  backend.project(backend.matrix(Matrix::mem_query, group.layer), {}, row_of(x, begin), x.width, end - begin,
                  buffers.queries, width);
  for (const Cell& cell : group.cells) {
    if (!overlaps(cell)) continue;
    const int64_t first = std::max(begin, cell.row_begin), last = std::min(end, cell.row_begin + cell.row_count);
    read_rows(backend, *cell.state->memory.block, buffers, buffers.queries + (first - begin) * width, last - first,
              row_of(x, first), x.width);
  }
}

// Everything that one cell's write computes on the way.
struct WriteBuffers {
  float* keys = nullptr;            // [m, d]
  float* values = nullptr;          // [m, padded(D)]: v, then beta (v - old)
  float* gates = nullptr;           // [m, gate rows]: beta
  Feature* features = nullptr;      // [h, m, F]: phi of each token
  int64_t* counts = nullptr;        // [h, m]
  float* denominators = nullptr;    // [h, m]
  float* gammas = nullptr;          // [h, m]
  Feature* tokens = nullptr;        // [h F, m]: the same by feature, index = token
  int64_t* token_counts = nullptr;  // [h F]

  void take_from(Carver& carver, const ModelConfig& config, int64_t rows) {
    const int64_t heads = config.memory.n_heads, features_of_all = heads * config.features();
    carver.take(keys, rows * config.memory.d_mem);
    carver.take(values, rows * padded(config.decoder.d_model));
    carver.take(gates, rows * config.gate_rows());
    carver.take(features, rows * features_of_all);
    carver.take(counts, rows * heads);
    carver.take(denominators, rows * heads);
    carver.take(gammas, rows * heads);
    carver.take(tokens, rows * features_of_all);
    carver.take(token_counts, features_of_all);
  }
};

// One cell's write: all memory tokens against the old memory.
class MemoryWrite {
 public:
  MemoryWrite(CpuBackend& backend, int64_t layer, const Cell& cell)
      : backend_(backend),
        config_(backend.config()),
        layer_(layer),
        rows_(cell.write_rows),
        heads_(config_.memory.n_heads),
        features_(config_.features()),
        values_(config_.value_dim()),
        ld_(padded(config_.decoder.d_model)),
        first_(!cell.state->memory.written()),
        buffers_(carve<WriteBuffers>(Slot::association, config_, rows_)),
        to_(view_of(*cell.next_memory, config_)) {
    if (!first_) from_ = view_of(*cell.state->memory.block, config_);
  }

  void run(const float* y, int64_t ld) {
    project(y, ld);
    find_features();
    subtract_stored();
    group_by_feature();
    update_matrix();
    if (to_.normaliser != nullptr) update_normaliser();
    write_stats();
  }

 private:
  void project(const float* y, int64_t ld) {
    const auto apply = [&](Matrix which, float* out, int64_t ld_out, const float* bias) {
      backend_.project(backend_.matrix(which, layer_), {.bias = bias}, y, ld, rows_, out, ld_out);
    };
    const int64_t gates = config_.gate_rows();
    apply(Matrix::mem_key, buffers_.keys, config_.memory.d_mem, nullptr);
    apply(Matrix::mem_value, buffers_.values, ld_, nullptr);
    apply(Matrix::mem_gate, buffers_.gates, gates, backend_.vector(Vector::mem_gate_bias, layer_));
    backend_.kernels().sigmoid(buffers_.gates, rows_ * gates);
  }

  // gamma = clip(1 - den / (||k||^2 + epsilon), 0, 1); exactly 1 at first, or without correction.
  // den >= 1e-5, so a zero key divides to infinity, never to NaN.
  float gamma_of(const Feature* key, int64_t count, double den) const {
    if (first_ || !config_.memory.correction || !config_.memory.use_denom) return 1.0f;
    const double epsilon = config_.memory.dialect == Dialect::paper ? kEpsilon : 0.0;
    const double gamma = 1.0 - den / (squared_length(key, count) + epsilon);
    return static_cast<float>(gamma > 1.0 ? 1.0 : gamma < 0.0 ? 0.0 : gamma);
  }

  void find_features() {
    const int64_t width = config_.memory.d_mem;
    const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kTaskWork) / (16 * features_));
    backend_.pool().parallel_ranges(heads_ * rows_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / rows_, token = i % rows_;
        Feature* key = buffers_.features + i * features_;
        const int64_t count = features_of(backend_, buffers_.keys + token * width + head * (width / heads_), key);
        const float* normaliser = from_.normaliser == nullptr ? nullptr : from_.normaliser + head * features_;
        const double den = denominator(key, count, normaliser);
        buffers_.counts[i] = count;
        buffers_.denominators[i] = static_cast<float>(den);
        buffers_.gammas[i] = gamma_of(key, count, den);
      }
    });
  }

  // values = beta (v - old), slice by slice of A's columns
  void subtract_stored() {
    const int64_t slice = backend_.kernels().memory_slice, slices = (values_ + slice - 1) / slice;
    const int64_t work = std::max<int64_t>(1, rows_ * features_ / kSparsity * slice);
    const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kTaskWork) / work);
    backend_.pool().parallel_ranges(heads_ * slices, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / slices, e = i % slices * slice;
        subtract_slice(head, e, std::min(slice, values_ - e));
      }
    });
  }

  void subtract_slice(int64_t head, int64_t e, int64_t columns) {
    for (int64_t token = 0; token < rows_; ++token) {
      const int64_t i = head * rows_ + token, column = head * values_ + e;
      float* value = buffers_.values + token * ld_ + column;
      if (!first_) {
        const float* matrix = from_.matrix + head * features_ * values_ + e;
        backend_.kernels().recall(buffers_.features + i * features_, buffers_.counts[i], matrix, values_, columns,
                                  buffers_.denominators[i], -1.0f, value);
      }
      const float* gate = buffers_.gates + token * config_.gate_rows();
      if (config_.memory.gating) {
        for (int64_t c = 0; c < columns; ++c) value[c] *= gate[column + c];
      } else {
        for (int64_t c = 0; c < columns; ++c) value[c] *= gate[head];
      }
    }
  }

  void group_by_feature() {
    std::fill_n(buffers_.token_counts, heads_ * features_, 0);
    for (int64_t i = 0; i < heads_ * rows_; ++i) {
      const int64_t head = i / rows_, token = i % rows_;
      const Feature* key = buffers_.features + i * features_;
      for (int64_t f = 0; f < buffers_.counts[i]; ++f) {
        const int64_t row = head * features_ + key[f].index;
        buffers_.tokens[row * rows_ + buffers_.token_counts[row]++] = {key[f].value, static_cast<int32_t>(token)};
      }
    }
  }

  // A' = A + sum_t k_t (x) values_t, each row of A once, in slices for which the tokens' values
  // stay in cache.
  void update_matrix() {
    const int64_t slice = std::max<int64_t>(kLaneFloats * 4, kTokenFloats / rows_ / kLaneFloats * kLaneFloats);
    const int64_t work = values_ * (2 + rows_ / kSparsity);
    const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kTaskWork) / work);
    backend_.pool().parallel_ranges(heads_ * features_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t e = 0; e < values_; e += slice) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t at = row * values_ + e;
          backend_.kernels().update(buffers_.tokens + row * rows_, buffers_.token_counts[row],
                                    buffers_.values + row / features_ * values_ + e, ld_, std::min(slice, values_ - e),
                                    first_ ? nullptr : from_.matrix + at, to_.matrix + at);
        }
      }
    });
  }

  void update_normaliser() {
    for (int64_t row = 0; row < heads_ * features_; ++row) {
      const float* gamma = buffers_.gammas + row / features_ * rows_;
      const Feature* tokens = buffers_.tokens + row * rows_;
      float sum = first_ ? 0.0f : from_.normaliser[row];
      for (int64_t i = 0; i < buffers_.token_counts[row]; ++i) sum += gamma[tokens[i].index] * tokens[i].value;
      to_.normaliser[row] = sum;
    }
  }

  void write_stats() {
    const int64_t gammas = heads_ * rows_, gates = rows_ * config_.gate_rows();
    double gamma_sum = 0.0, gate_sum = 0.0;
    for (int64_t i = 0; i < gammas; ++i) gamma_sum += buffers_.gammas[i];
    for (int64_t i = 0; i < gates; ++i) gate_sum += buffers_.gates[i];
    const auto [least, greatest] = std::minmax_element(buffers_.gammas, buffers_.gammas + gammas);
    to_.stats[0] = static_cast<float>(gamma_sum / static_cast<double>(gammas));
    to_.stats[1] = *least;
    to_.stats[2] = *greatest;
    to_.stats[3] = static_cast<float>(gate_sum / static_cast<double>(gates));
  }

  CpuBackend& backend_;
  const ModelConfig& config_;
  const int64_t layer_, rows_, heads_, features_, values_, ld_;
  const bool first_;
  const WriteBuffers buffers_;
  MemoryView from_;
  const MemoryView to_;
};

}  // namespace

void CpuBackend::memory_read(Groups groups, const Rows& x) {
  const auto row_work =
      static_cast<double>(config_.decoder.d_model * (config_.features() / kSparsity + config_.memory.d_mem));
  for (const Group& group : groups) {
    const int64_t rows = group.row_count;
    const int64_t least = (rows + kernels_.gemm_rows - 1) / kernels_.gemm_rows;
    const int64_t wanted = tasks_for(row_work * static_cast<double>(rows), pool_.threads() * 4);
    const int64_t tasks = std::min(rows, std::max(least, wanted));
    pool_.parallel_for(tasks, [&](int64_t i) {
      read_block(*this, group, x, group.row_begin + rows * i / tasks, group.row_begin + rows * (i + 1) / tasks);
    });
  }
}

void CpuBackend::memory_write(Groups groups, const Rows& x) {
  for (const Group& group : groups) {
    const auto write = [&](int64_t index) {
      const Cell& cell = group.cells[index];
      if (cell.write_rows == 0) return;
      const int64_t first = cell.row_begin + cell.row_count - cell.write_rows;
      MemoryWrite(*this, group.layer, cell).run(row_of(x, first), x.width);
    };
    // A cell for each thread where there are enough; otherwise the threads share each cell.
    const auto cells = std::ssize(group.cells);
    if (cells >= pool_.threads()) {
      pool_.parallel_for(cells, write);
    } else {
      for (int64_t i = 0; i < cells; ++i) write(i);
    }
  }
}

}  // namespace armt::cpu
