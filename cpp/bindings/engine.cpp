#include "engine/engine.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <algorithm>

#include "arrays.h"
#include "config.h"
#include "dlpack.h"
#include "module.h"

namespace armt::bindings {
namespace {

Schedule schedule_from(const std::string& name) {
  if (name == "auto") return Schedule::automatic;
  if (name == "sequential") return Schedule::sequential;
  if (name == "diagonal") return Schedule::diagonal;
  throw InvalidArgument("schedule: found '" + name + "', expected auto, sequential or diagonal");
}

OnNonfinite action_from(const std::string& name) {
  if (name == "raise") return OnNonfinite::raise;
  if (name == "ignore") return OnNonfinite::ignore;
  throw InvalidArgument("on_nonfinite: found '" + name + "', expected raise or ignore");
}

bool prefill_in_fp8(const std::string& name) {
  if (name == "same" || name == "fp8") return name == "fp8";
  throw InvalidArgument("prefill_dtype: found '" + name + "', expected same or fp8");
}

std::shared_ptr<Engine> make_engine(const py::dict& decoder, const py::dict& memory, const std::string& device,
                                    const std::string& dtype, int64_t threads, const std::string& schedule,
                                    const std::string& isa, const std::string& on_nonfinite,
                                    const std::string& prefill_dtype, int64_t memory_limit) {
  EngineOptions options;
  options.backend = {.device = device, .weight_dtype = dtype_from(dtype), .threads = threads, .isa = isa};
  options.backend.memory_limit = memory_limit;
  options.backend.prefill_fp8 = prefill_in_fp8(prefill_dtype);
  options.schedule = schedule_from(schedule);
  options.on_nonfinite = action_from(on_nonfinite);
  return std::make_shared<Engine>(config_from(decoder, memory), options);
}

void load_matrix(Engine& engine, const std::string& slot, int64_t layer, const py::array& array,
                 const std::string& dtype) {
  if (array.ndim() != 2)
    throw CheckpointError(slot + ": found " + std::to_string(array.ndim()) + " dimensions, expected 2");
  HostMatrix matrix;
  matrix.dtype = dtype_from(dtype);
  const int64_t bytes = size_of(matrix.dtype);
  if (array.itemsize() != bytes || array.strides(0) % bytes != 0 || array.strides(1) % bytes != 0) {
    throw CheckpointError(slot + ": the array's elements are not of type " + dtype);
  }
  matrix.data = array.data();
  matrix.rows = array.shape(0);
  matrix.cols = array.shape(1);
  matrix.row_stride = array.strides(0) / bytes;
  matrix.col_stride = array.strides(1) / bytes;
  const Matrix which = matrix_from(slot);
  py::gil_scoped_release release;
  engine.load(which, layer, matrix);
}

void load_vector(Engine& engine, const std::string& slot, int64_t layer,
                 const py::array_t<float, py::array::c_style | py::array::forcecast>& values) {
  engine.load(vector_from(slot), layer, {values.data(), static_cast<size_t>(values.size())});
}

using NamedValues = py::typing::Dict<py::str, py::object>;

NamedValues call_seconds(EngineStats& stats) {
  std::sort(stats.recent.begin(), stats.recent.end());
  const auto quantile = [&](double part) {
    if (stats.recent.empty()) return 0.0;
    return stats.recent[static_cast<size_t>(part * static_cast<double>(stats.recent.size() - 1))];
  };
  NamedValues result;
  result["last"] = stats.last;
  result["p50"] = quantile(0.5);
  result["p99"] = quantile(0.99);
  result["greatest"] = quantile(1.0);
  return result;
}

NamedValues stats(const Engine& engine) {
  EngineStats s = engine.stats();
  NamedValues result;
  result["tokens"] = s.tokens;
  result["segments"] = s.segments;
  result["calls"] = s.calls;
  result["seconds"] = s.seconds;
  result["nonfinite"] = s.nonfinite;
  result["call_seconds"] = call_seconds(s);
  result["state_bytes"] = engine.backend().block_bytes();
  result["spilled_bytes"] = engine.backend().spilled_bytes();
  result["weight_bytes"] = engine.backend().weight_bytes();
  return result;
}

}  // namespace

void bind_engine(py::module_& m) {
  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine", "One model's weights on one device.")
      .def(py::init(&make_engine), py::kw_only(), py::arg("decoder"), py::arg("memory"), py::arg("device") = "cpu",
           py::arg("dtype") = "float32", py::arg("threads") = 0, py::arg("schedule") = "auto", py::arg("isa") = "",
           py::arg("on_nonfinite") = "raise", py::arg("prefill_dtype") = "same", py::arg("memory_limit") = 0)
      .def("load_matrix", &load_matrix, py::arg("slot"), py::arg("layer"), py::arg("array"), py::arg("dtype"))
      .def("load_vector", &load_vector, py::arg("slot"), py::arg("layer"), py::arg("values"))
      .def("finish_loading", &Engine::finish_loading)
      .def("stats", &stats)
      .def("read_dlpack", &read_dlpack, py::arg("capsule"),
           "Integers in the memory of the engine's GPU as an array of NumPy; from __dlpack__(stream=engine.stream).")
      .def_property_readonly("stream", [](const Engine& e) { return e.backend().stream_handle(); })
      .def_property_readonly("device", [](const Engine& e) { return e.backend().device(); })
      .def_property_readonly("description", [](const Engine& e) { return e.backend().description(); })
      .def_property_readonly("dtype", [](const Engine& e) { return dtype_name(e.backend().weight_dtype()); })
      .def_property_readonly("prefill_dtype",
                             [](const Engine& e) { return e.options().backend.prefill_fp8 ? "fp8" : "same"; })
      .def_property_readonly("threads", [](const Engine& e) { return e.options().backend.threads; })
      .def_property_readonly("vocab_size", [](const Engine& e) { return e.config().decoder.vocab_size; })
      .def_property_readonly("segment_size", [](const Engine& e) { return e.config().memory.segment_size; })
      .def_property_readonly("association_bytes", [](const Engine& e) {
        return e.config().has_association() ? association_bytes(e.config()) * e.config().decoder.n_layers : 0;
      });
}

}  // namespace armt::bindings
