// Single operations of the CPU backend on NumPy arrays, for tests.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "arrays.h"
#include "config.h"
#include "cpu/cpu_backend.h"
#include "engine/engine.h"
#include "engine/stream.h"
#include "module.h"

namespace armt::bindings {
namespace {

using FloatArray = py::array_t<float, py::array::c_style>;
using Flags = py::array_t<uint8_t, py::array::c_style>;
using Numbers = py::array_t<int64_t, py::array::c_style>;
using Counts = std::vector<int64_t>;
using Memory = std::pair<FloatArray, std::optional<FloatArray>>;  // A [h, F, E], z [h, F]

std::vector<py::ssize_t> shape_of(const py::array& array) {
  return {array.shape(), array.shape() + array.ndim()};
}

void check(bool holds, const char* what) {
  if (!holds) throw InvalidArgument(std::string("testing: ") + what);
}

FloatArray copy_of(const FloatArray& array) {
  FloatArray copy(shape_of(array));
  std::copy_n(array.data(), array.size(), copy.mutable_data());
  return copy;
}

Rows rows_of(FloatArray& array) {
  check(array.ndim() == 2, "rows: expected two dimensions");
  return {.data = array.mutable_data(), .width = array.shape(1), .origin = 0};
}

// Keys and values of one stream at one layer.
struct Cache {
  LayerState state;

  // The open segment's first `keep` rows become the previous segment's.
  void roll(int64_t keep) {
    check(keep >= 0 && keep <= state.current.rows, "roll: expected 0 .. rows");
    state.previous = std::move(state.current);
    state.previous.rows = keep;
    state.current = {};
  }
};

// One group whose cells have `counts` rows.
struct Call {
  std::vector<Cell> cells;
  std::vector<Row> rows;
  Group group;

  Call(const Counts& counts, int64_t layer) {
    int64_t row = 0;
    for (const int64_t count : counts) {
      Cell cell;
      cell.row_begin = row;
      cell.row_count = count;
      cells.push_back(cell);
      row += count;
    }
    rows.resize(row);
    group.layer = layer;
    group.row_count = row;
  }

  Groups groups() {
    group.rows = rows.data();
    group.cells = cells;
    return {&group, 1};
  }
};

class Operations {
 public:
  Operations(const py::dict& decoder, const py::dict& memory, int64_t threads, const std::string& isa,
             const std::string& weight_dtype)
      : config_(config_from(decoder, memory)),
        backend_(config_, {.weight_dtype = dtype_from(weight_dtype), .threads = threads, .isa = isa}) {
    backend_.set_poison(true);
  }

  void load(const std::string& name, int64_t layer, const FloatArray& values) {
    if (values.ndim() == 1) {
      backend_.load(vector_from(name), layer, {values.data(), static_cast<size_t>(values.size())});
      return;
    }
    check(values.ndim() == 2, "weights: expected one or two dimensions");
    HostMatrix matrix;
    matrix.data = values.data();
    matrix.rows = values.shape(0);
    matrix.cols = values.shape(1);
    matrix.row_stride = matrix.cols;
    backend_.load(matrix_from(name), layer, matrix);
  }

  FloatArray memory_read(const FloatArray& x, const std::vector<std::optional<Memory>>& memories, const Counts& counts,
                         int64_t layer) {
    Call call(counts, layer);
    std::vector<LayerState> states = states_of(call, memories);
    FloatArray out = copy_of(x);
    check_rows(out, call);
    backend_.memory_read(call.groups(), rows_of(out));
    return out;
  }

  // For each cell: A, z, statistics.
  py::list memory_write(const FloatArray& y, const std::vector<std::optional<Memory>>& memories, const Counts& counts,
                        const Counts& write_rows, bool in_place, int64_t layer) {
    Call call(counts, layer);
    check(write_rows.size() == counts.size(), "write_rows: expected one for each cell");
    std::vector<LayerState> states = states_of(call, memories);
    std::vector<BlockRef> written;
    for (size_t i = 0; i < states.size(); ++i) {
      const bool reuse = in_place && states[i].memory.written();
      written.push_back(reuse ? states[i].memory.block : backend_.allocate(association_bytes(config_)));
      call.cells[i].write_rows = write_rows[i];
      call.cells[i].next_memory = written[i].get();
    }
    FloatArray rows = copy_of(y);
    check_rows(rows, call);
    backend_.memory_write(call.groups(), rows_of(rows));
    py::list out;
    for (const BlockRef& block : written) out.append(download_memory(*block));
    return out;
  }

  // phi of each row, dense: [R, n] -> [R, 2 rolls n]
  FloatArray feature_map(const FloatArray& x, int64_t rolls) {
    check(x.ndim() == 2 && rolls >= 1, "feature_map: expected [R, n] and rolls of at least 1");
    const int64_t n = x.shape(1), features = 2 * rolls * n;
    FloatArray out({x.shape(0), static_cast<py::ssize_t>(features)});
    std::fill_n(out.mutable_data(), out.size(), 0.0f);
    std::vector<cpu::Feature> found(features);
    std::vector<float> scratch(cpu::features_scratch(n, rolls));
    for (int64_t r = 0; r < x.shape(0); ++r) {
      const int64_t count = backend_.kernels().features(x.data(r), n, rolls, found.data(), scratch.data());
      for (int64_t i = 0; i < count; ++i) out.mutable_data(r)[found[i].index] = found[i].value;
    }
    return out;
  }

  FloatArray rotate_queries(const FloatArray& qkv, const Numbers& positions, int64_t layer) {
    Call call({qkv.shape(0)}, layer);
    set_positions(call, positions);
    FloatArray out = copy_of(qkv);
    check_rows(out, call);
    backend_.rotate_queries(call.groups(), rows_of(out));
    return out;
  }

  void store_kv(const std::vector<Cache*>& caches, const Counts& counts, const FloatArray& qkv,
                const Numbers& positions, int64_t layer) {
    Call call(counts, layer);
    set_positions(call, positions);
    set_caches(call, caches);
    for (Cell& cell : call.cells) {
      KvCache& cache = cell.state->current;
      cell.kv_begin = cache.rows;
      reserve_rows(backend_, cache, cell.row_count);
      cache.rows += cell.row_count;
    }
    FloatArray rows = copy_of(qkv);
    check_rows(rows, call);
    backend_.store_kv(call.groups(), rows_of(rows));
  }

  // sights [R, 6]: prev_begin, cur_begin, cur_end, sees_padding, sees_prev_padding, uniform
  FloatArray attend(const std::vector<Cache*>& caches, const Counts& counts, const FloatArray& qkv,
                    const Numbers& sights, const std::vector<std::optional<Flags>>& visible,
                    const std::vector<std::optional<Flags>>& prev_visible, int64_t layer) {
    Call call(counts, layer);
    set_caches(call, caches);
    check(visible.size() == caches.size() && prev_visible.size() == caches.size(), "visible: one for each cell");
    for (size_t i = 0; i < caches.size(); ++i) {
      const LayerState& state = caches[i]->state;
      call.cells[i].visible = flags_of(visible[i], state.current.rows);
      call.cells[i].prev_visible = flags_of(prev_visible[i], state.previous.rows);
    }
    check(sights.ndim() == 2 && sights.shape(0) == std::ssize(call.rows) && sights.shape(1) == 6, "sights: [R, 6]");
    for (int64_t r = 0; r < std::ssize(call.rows); ++r) {
      const int64_t* sight = sights.data(r);
      Row& row = call.rows[r];
      row.prev_begin = static_cast<int32_t>(sight[0]);
      row.cur_begin = static_cast<int32_t>(sight[1]);
      row.cur_end = static_cast<int32_t>(sight[2]);
      row.sees_padding = sight[3] != 0;
      row.sees_prev_padding = sight[4] != 0;
      row.uniform = sight[5] != 0;
    }
    FloatArray rows = copy_of(qkv);
    check_rows(rows, call);
    FloatArray context({rows.shape(0), static_cast<py::ssize_t>(config_.query_width())});
    backend_.attend(call.groups(), rows_of(rows), rows_of(context));
    return context;
  }

  py::tuple export_kv(const Cache& cache, bool previous) {
    const KvCache& source = previous ? cache.state.previous : cache.state.current;
    const std::vector<py::ssize_t> shape{source.rows, config_.decoder.n_kv_heads, config_.decoder.head_dim};
    FloatArray k(shape), v(shape);
    backend_.export_kv(source, k.mutable_data(), v.mutable_data());
    return py::make_tuple(k, v);
  }

  void import_kv(Cache& cache, const FloatArray& k, const FloatArray& v) {
    const std::vector<py::ssize_t> shape{k.shape(0), config_.decoder.n_kv_heads, config_.decoder.head_dim};
    check(shape_of(k) == shape && shape_of(v) == shape, "keys and values: expected [rows, Hkv, c]");
    cache.state.current = {};
    reserve_rows(backend_, cache.state.current, k.shape(0));
    cache.state.current.rows = k.shape(0);
    backend_.import_kv(cache.state.current, k.data(), v.data());
  }

  std::string isa() const { return backend_.kernels().name; }

 private:
  static const uint8_t* flags_of(const std::optional<Flags>& flags, int64_t rows) {
    if (!flags) return nullptr;
    check(flags->size() == rows, "visible: expected one flag for each row of the cache");
    return flags->data();
  }

  static void check_rows(const FloatArray& rows, const Call& call) {
    check(rows.ndim() == 2 && rows.shape(0) == std::ssize(call.rows), "rows: expected as many as the counts say");
  }

  static void set_positions(Call& call, const Numbers& positions) {
    check(positions.size() == std::ssize(call.rows), "positions: expected one for each row");
    for (int64_t r = 0; r < positions.size(); ++r) call.rows[r].position = positions.data()[r];
  }

  static void set_caches(Call& call, const std::vector<Cache*>& caches) {
    check(caches.size() == call.cells.size(), "caches: expected one for each cell");
    for (size_t i = 0; i < caches.size(); ++i) call.cells[i].state = &caches[i]->state;
  }

  std::vector<LayerState> states_of(Call& call, const std::vector<std::optional<Memory>>& memories) {
    check(memories.size() == call.cells.size(), "memories: expected one for each cell");
    std::vector<LayerState> states(memories.size());
    for (size_t i = 0; i < memories.size(); ++i) {
      if (memories[i]) states[i].memory.block = upload_memory(*memories[i]);
      call.cells[i].state = &states[i];
    }
    return states;
  }

  int64_t matrix_floats() const { return config_.memory.n_heads * config_.features() * config_.value_dim(); }
  int64_t normaliser_floats() const {
    return config_.memory.use_denom ? config_.memory.n_heads * config_.features() : 0;
  }

  BlockRef upload_memory(const Memory& memory) {
    check(memory.first.size() == matrix_floats(), "A: expected [h, F, E]");
    check((memory.second ? memory.second->size() : 0) == normaliser_floats(), "z: expected [h, F], or None");
    BlockRef block = backend_.allocate(association_bytes(config_));
    const auto bytes = matrix_floats() * static_cast<int64_t>(sizeof(float));
    backend_.upload(*block, 0, memory.first.data(), bytes);
    if (memory.second) backend_.upload(*block, bytes, memory.second->data(), memory.second->nbytes());
    return block;
  }

  py::tuple download_memory(const Block& block) {
    const auto heads = config_.memory.n_heads, features = config_.features();
    FloatArray matrix({heads, features, config_.value_dim()}), normaliser({heads, features});
    FloatArray stats({static_cast<py::ssize_t>(kWriteStats)});
    backend_.download(block, 0, matrix.mutable_data(), matrix.nbytes());
    if (config_.memory.use_denom) {
      backend_.download(block, matrix.nbytes(), normaliser.mutable_data(), normaliser.nbytes());
    }
    const auto behind = (matrix_floats() + normaliser_floats()) * static_cast<int64_t>(sizeof(float));
    backend_.download(block, behind, stats.mutable_data(), stats.nbytes());
    return py::make_tuple(matrix, config_.memory.use_denom ? py::object(normaliser) : py::none(), stats);
  }

  ModelConfig config_;
  cpu::CpuBackend backend_;
};

void set_poison(Engine& engine, bool on) {
  auto* backend = dynamic_cast<cpu::CpuBackend*>(&engine.backend());
  check(backend != nullptr, "set_poison: the engine does not run on the CPU");
  backend->set_poison(on);
}

}  // namespace

void bind_testing(py::module_& m) {
  py::module_ testing = m.def_submodule("testing", "Single operations of the CPU backend, for tests.");
  testing.def("available_isas", &cpu::available_isas);
  py::class_<Cache>(testing, "Cache", "Keys and values of one stream at one layer.")
      .def(py::init<>())
      .def_property_readonly("rows", [](const Cache& cache) { return cache.state.current.rows; })
      .def_property_readonly("previous_rows", [](const Cache& cache) { return cache.state.previous.rows; })
      .def("roll", &Cache::roll, py::arg("keep"));
  py::class_<Operations>(testing, "Operations", "A CPU backend whose allocations are filled with NaN.")
      .def(py::init<const py::dict&, const py::dict&, int64_t, const std::string&, const std::string&>(),
           py::arg("decoder"), py::arg("memory"), py::kw_only(), py::arg("threads") = 1, py::arg("isa") = "",
           py::arg("weight_dtype") = "float32")
      .def_property_readonly("isa", &Operations::isa)
      .def("load", &Operations::load, py::arg("name"), py::arg("layer"), py::arg("values"))
      .def("memory_read", &Operations::memory_read, py::arg("x"), py::arg("memories"), py::arg("counts"),
           py::arg("layer") = 0)
      .def("memory_write", &Operations::memory_write, py::arg("y"), py::arg("memories"), py::arg("counts"),
           py::arg("write_rows"), py::arg("in_place") = false, py::arg("layer") = 0)
      .def("feature_map", &Operations::feature_map, py::arg("x"), py::arg("rolls"))
      .def("rotate_queries", &Operations::rotate_queries, py::arg("qkv"), py::arg("positions"), py::arg("layer") = 0)
      .def("store_kv", &Operations::store_kv, py::arg("caches"), py::arg("counts"), py::arg("qkv"),
           py::arg("positions"), py::arg("layer") = 0)
      .def("attend", &Operations::attend, py::arg("caches"), py::arg("counts"), py::arg("qkv"), py::arg("sights"),
           py::arg("visible"), py::arg("prev_visible"), py::arg("layer") = 0)
      .def("export_kv", &Operations::export_kv, py::arg("cache"), py::arg("previous") = false)
      .def("import_kv", &Operations::import_kv, py::arg("cache"), py::arg("k"), py::arg("v"));
  testing.def(
      "set_poison", &set_poison, py::arg("engine"), py::arg("on"),
      "Fills new blocks and workspaces of a CPU engine with NaN, so that a value that was never written shows.");
}

}  // namespace armt::bindings
