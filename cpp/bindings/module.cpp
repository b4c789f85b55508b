#include "module.h"

#include <exception>
#include <new>
#include <utility>

#include "armt/error.h"
#include "backend.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "The compiled engine of armt.";
  py::register_exception<armt::InvalidArgument>(m, "InvalidArgument", PyExc_ValueError);
  py::register_exception<armt::CheckpointError>(m, "CheckpointError", PyExc_ValueError);
  py::register_exception<armt::StateError>(m, "StateError", PyExc_ValueError);
  py::register_exception<armt::DeviceError>(m, "DeviceError", PyExc_RuntimeError);
  py::register_exception<armt::NonFinite>(m, "NonFiniteError", PyExc_FloatingPointError);
  static const py::handle out_of_memory =
      py::register_exception<armt::OutOfMemory>(m, "OutOfMemory", PyExc_MemoryError).ptr();
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      std::rethrow_exception(std::move(error));
    } catch (const std::bad_alloc&) {
      PyErr_SetString(out_of_memory.ptr(), "host: no memory left; everything is as it was before the call");
    }
  });
  m.def("cuda_device_count", &armt::cuda_device_count,
        "CUDA devices that this build can use (0 without a driver, a GPU or the CUDA part).");
  armt::bindings::bind_safetensors(m);
  armt::bindings::bind_state(m);
  armt::bindings::bind_engine(m);
  armt::bindings::bind_dlpack(m);
  armt::bindings::bind_session(m);
  armt::bindings::bind_testing(m);
}
