#include "state.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>

#include "armt/error.h"
#include "arrays.h"
#include "checkpoint/state_file.h"
#include "module.h"

namespace armt::bindings {
namespace {

constexpr float kDenominatorFloor = 1e-5f;  // as in Backend::memory_read

std::span<uint8_t> bytes_of(const py::bytes& bytes) {
  return {reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(bytes.ptr())),
          static_cast<size_t>(PyBytes_GET_SIZE(bytes.ptr()))};
}

py::bytes new_bytes(int64_t size) {
  PyObject* bytes = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size));
  if (!bytes) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(bytes);
}

// Encodes straight into the object that Python gets.
py::bytes to_bytes(const PyState& state) {
  const py::gil_scoped_release release;
  return state.with_host([](const HostState& host) {
    const int64_t size = encoded_bytes(host);
    py::bytes bytes;
    {
      const py::gil_scoped_acquire acquire;
      bytes = new_bytes(size);
    }
    encode(host, bytes_of(bytes));
    return bytes;
  });
}

PyState from_bytes(const py::object& data) {
  if (!PyObject_CheckBuffer(data.ptr())) {
    throw StateError("state: found " + py::str(py::type::of(data).attr("__name__")).cast<std::string>() +
                     ", expected bytes that to_bytes() returned");
  }
  // A copy, unless nobody can change the bytes while they are read.
  const py::bytes bytes = py::isinstance<py::bytes>(data)
                              ? py::reinterpret_borrow<py::bytes>(data)
                              : py::reinterpret_steal<py::bytes>(PyBytes_FromObject(data.ptr()));
  if (!bytes) throw py::error_already_set();
  const std::span<const uint8_t> span = bytes_of(bytes);
  const py::gil_scoped_release release;
  return PyState(decode(span));
}

std::string encoded_path(const py::object& path) {
  // Bytes, so that any name that the system allows gets through.
  const auto encoded = py::module_::import("os").attr("fsencode")(path).cast<std::string>();
  if (encoded.find('\0') != std::string::npos) {
    throw InvalidArgument("path: it holds a zero byte, which no file name can");
  }
  return encoded;
}

void save(const PyState& state, const py::object& path) {
  const std::string target = encoded_path(path);
  const py::gil_scoped_release release;
  state.with_host([&](const HostState& host) {
    std::vector<uint8_t> bytes(static_cast<size_t>(encoded_bytes(host)));
    encode(host, bytes);
    save_file(target, bytes);
  });
}

PyState load(const py::object& path) {
  const std::string source = encoded_path(path);
  const py::gil_scoped_release release;
  return PyState(load_file(source));
}

// [heads, features, values] of A; all zero for RMT, which has none.
struct MemoryShape {
  int64_t heads = 0, features = 0, values = 0;
  explicit MemoryShape(const ModelConfig& config) {
    if (!config.has_association()) return;
    heads = config.memory.n_heads;
    features = config.features();
    values = config.value_dim();
  }
};

// A and z of one layer, zeros if it was never written.
LayerMemory filled_memory(const PyState& state, int64_t layer) {
  LayerMemory memory = state.memory(layer);
  if (memory.written) return memory;
  const MemoryShape shape(state.config());
  memory.a.assign(shape.heads * shape.features * shape.values, 0.0f);
  if (state.config().memory.use_denom) memory.z.assign(shape.heads * shape.features, 0.0f);
  return memory;
}

py::tuple memory(const PyState& state, int64_t layer) {
  LayerMemory values = [&] {
    const py::gil_scoped_release release;
    return filled_memory(state, layer);
  }();
  const MemoryShape shape(state.config());
  const bool has_z = state.config().has_association() && state.config().memory.use_denom;
  py::object z = py::none();
  if (has_z) z = to_array(std::move(values.z), {shape.heads, shape.features});
  return py::make_tuple(to_array(std::move(values.a), {shape.heads, shape.features, shape.values}), z);
}

py::object memory_tokens(const PyState& state) {
  std::vector<float> values = [&] {
    const py::gil_scoped_release release;
    return state.memory_tokens();
  }();
  if (values.empty()) return py::none();
  const ModelConfig& config = state.config();
  return to_array(std::move(values), {config.memory.memory_tokens, config.decoder.d_model});
}

py::object write_statistics(const PyState& state, int64_t layer) {
  const LayerMemory values = [&] {
    const py::gil_scoped_release release;
    return state.memory(layer);
  }();
  if (!values.written) return py::none();
  constexpr std::array<const char*, kWriteStats> kNames = {"mean_gamma", "min_gamma", "max_gamma", "mean_beta"};
  py::dict result;
  for (size_t i = 0; i < kNames.size(); ++i) result[kNames[i]] = values.statistics[i];
  return result;
}

// out [h, E] = (A^T phi) / (z . phi + 1e-5), the division only with use_denom.
std::vector<float> recall_into(const LayerMemory& memory, const MemoryShape& shape, const float* phi) {
  std::vector<float> out(shape.heads * shape.values);
  std::vector<double> sums(shape.values);
  for (int64_t head = 0; head < shape.heads; ++head) {
    std::fill(sums.begin(), sums.end(), 0.0);
    double denominator = 0;
    for (int64_t f = 0; f < shape.features; ++f) {
      const int64_t at = head * shape.features + f;
      const float* row = memory.a.data() + at * shape.values;
      for (int64_t e = 0; e < shape.values; ++e) sums[e] += double{phi[at]} * row[e];
      if (!memory.z.empty()) denominator += double{phi[at]} * memory.z[at];
    }
    const double scale = memory.z.empty() ? 1.0 : 1.0 / (denominator + kDenominatorFloor);
    for (int64_t e = 0; e < shape.values; ++e) {
      out[head * shape.values + e] = static_cast<float>(sums[e] * scale);
    }
  }
  return out;
}

py::array_t<float> recall(const PyState& state, int64_t layer,
                          const py::array_t<float, py::array::c_style | py::array::forcecast>& features) {
  const MemoryShape shape(state.config());
  if (shape.heads == 0) throw InvalidArgument("recall: RMT has no associative memory");
  if (features.ndim() != 2 || features.shape(0) != shape.heads || features.shape(1) != shape.features) {
    throw InvalidArgument("features: found shape " + py::str(features.attr("shape")).cast<std::string>() +
                          ", expected [heads, features] = (" + std::to_string(shape.heads) + ", " +
                          std::to_string(shape.features) + ")");
  }
  std::vector<float> values = [&] {
    const float* phi = features.data();
    const py::gil_scoped_release release;
    return recall_into(filled_memory(state, layer), shape, phi);
  }();
  return to_array(std::move(values), {shape.heads, shape.values});
}

py::array_t<int32_t> open_tokens(const PyState& state) {
  std::vector<int32_t> ids = state.with_members([](const auto& s) { return s.open_tokens; });
  const auto count = static_cast<py::ssize_t>(ids.size());
  return to_array(std::move(ids), {count});
}

py::dict facts(const PyState& state) {
  py::dict result;
  for (const Fact& fact : list_facts(state.facts())) result[py::str(fact.name)] = fact.value;
  return result;
}

std::string describe(const PyState& state) {
  return state.with_members([&](const auto& s) {
    return "<armt.State tokens=" + std::to_string(s.tokens) + " segments=" + std::to_string(s.closed_segments) +
           " bytes=" + std::to_string(state.bytes()) + ">";
  });
}

void bind_files(py::class_<PyState>& state) {
  state.def("to_bytes", &to_bytes, "The whole state in the documented state file format.")
      .def_static("from_bytes", &from_bytes, py::arg("data"),
                  "The reverse of to_bytes; StateError for anything that is not whole and unchanged.")
      .def("save", &save, py::arg("path"),
           "Writes a state file: the old file or the new one is there at any moment, never a torn one. Mode 0600; "
           "symbolic links and folders are refused.")
      .def_static("load", &load, py::arg("path"),
                  "Reads a state file; StateError for anything that is not whole and unchanged.");
}

void bind_inspection(py::class_<PyState>& state) {
  state
      .def("memory", &memory, py::arg("layer"),
           "(A, z): A [heads, features, values] and z [heads, features] float32, zeros before the first write. z is "
           "None in a model without a denominator; for RMT A is empty.")
      .def(
          "written", [](const PyState& s, int64_t layer) { return s.memory_written(layer); }, py::arg("layer"),
          "Whether the layer's memory was ever written.")
      .def("write_statistics", &write_statistics, py::arg("layer"),
           "mean_gamma, min_gamma, max_gamma and mean_beta of the last write, or None before the first.")
      .def("recall", &recall, py::arg("layer"), py::arg("features"),
           "[heads, values]: what the layer's memory holds for a key's features [heads, features]: A^T f / (z . f + "
           "1e-5), or A^T f in a model without a denominator.")
      .def_property_readonly("memory_tokens", &memory_tokens,
                             "RMT: [memory tokens, d_model] carried from the last closed segment; else None.");
}

}  // namespace

const Snapshot& PyState::snapshot() const {
  if (const auto* snapshot = std::get_if<Snapshot>(&value_)) return *snapshot;
  throw StateError(
      "rollback: the state was loaded from bytes or a file, expected a checkpoint of this session; to "
      "continue from it, make a session with engine.session(state=...)");
}

StreamState PyState::stream(Engine& engine) const {
  const auto* snapshot = std::get_if<Snapshot>(&value_);
  if (snapshot && snapshot->engine.get() == &engine) return snapshot->state;
  const py::gil_scoped_release release;
  return with_host([&](const HostState& host) { return to_stream(engine, host); });
}

const ModelConfig& PyState::config() const {
  if (const auto* host = std::get_if<HostState>(&value_)) return host->facts.config;
  return std::get<Snapshot>(value_).engine->config();
}

StateFacts PyState::facts() const {
  if (const auto* host = std::get_if<HostState>(&value_)) return host->facts;
  return facts_of(*std::get<Snapshot>(value_).engine);
}

void PyState::check_layer(int64_t layer) const {
  const int64_t layers = config().decoder.n_layers;
  if (layer >= 0 && layer < layers) return;
  throw InvalidArgument("layer: found " + std::to_string(layer) + ", expected 0 .. " + std::to_string(layers - 1));
}

bool PyState::memory_written(int64_t layer) const {
  check_layer(layer);
  if (const auto* host = std::get_if<HostState>(&value_)) return host->layers[layer].memory.written;
  return std::get<Snapshot>(value_).state.layers[layer].memory.written();
}

LayerMemory PyState::memory(int64_t layer) const {
  check_layer(layer);
  if (const auto* host = std::get_if<HostState>(&value_)) return host->layers[layer].memory;
  return layer_memory(std::get<Snapshot>(value_), layer);
}

std::vector<float> PyState::memory_tokens() const {
  if (const auto* host = std::get_if<HostState>(&value_)) return host->carried;
  return carried_memory(std::get<Snapshot>(value_));
}

int64_t PyState::bytes() const {
  if (const auto* host = std::get_if<HostState>(&value_)) return host_bytes(*host);
  const auto& snapshot = std::get<Snapshot>(value_);
  return state_bytes(snapshot.engine->backend(), snapshot.state);
}

void bind_state(py::module_& m) {
  py::class_<PyState> state(m, "State",
                            "All that passes from one call to the next, frozen. From a session it shares memory with "
                            "it until that moves on; loaded it lies in host memory.");
  bind_files(state);
  bind_inspection(state);
  const auto member = [&state](const char* name, auto pointer_of, const char* help) {
    state.def_property_readonly(name, [pointer_of](const PyState& s) { return s.with_members(pointer_of); }, help);
  };
  member("tokens", [](const auto& s) { return s.tokens; }, "Tokens read, fed and generated.");
  member("segments", [](const auto& s) { return s.closed_segments; }, "Segments written to memory.");
  member("version", [](const auto& s) { return s.version; }, "Counts the calls that changed the stream.");
  member("layers", [](const auto& s) { return static_cast<int64_t>(s.layers.size()); }, "Layers of the model.");
  state.def_property_readonly("open_tokens", &open_tokens, "[tokens] int32: ids of the open segment.")
      .def_property_readonly("nbytes", &PyState::bytes,
                             "Bytes that the state holds, on its device or in host memory, shared or not.")
      .def_property_readonly("facts", &facts,
                             "Settings and fingerprint of the model that the state belongs to, by name.")
      .def("__repr__", &describe);
}

}  // namespace armt::bindings
