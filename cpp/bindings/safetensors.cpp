#include "checkpoint/safetensors.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>

#include "module.h"

namespace armt::bindings {

namespace py = pybind11;

namespace {

// NumPy has no bfloat16: its bits travel as uint16.
py::dtype numpy_type(StoredType type) {
  return py::dtype(type == StoredType::bf16 ? "uint16" : name_of(type));
}

py::tuple shape_tuple(const StoredTensor& tensor) {
  py::tuple shape(tensor.shape.size());
  for (size_t i = 0; i < tensor.shape.size(); ++i) shape[i] = py::int_(tensor.shape[i]);
  return shape;
}

// A read-only view that keeps the mapping alive; a copy only where the file's layout leaves
// elements unaligned.
py::array tensor_array(const std::shared_ptr<SafetensorsFile>& file, const std::string& name) {
  const StoredTensor& tensor = file->at(name);
  const std::span<const std::byte> bytes = file->bytes(tensor);
  const py::dtype dtype = numpy_type(tensor.type);
  py::array array;
  if (reinterpret_cast<uintptr_t>(bytes.data()) % static_cast<uintptr_t>(size_of(tensor.type)) == 0) {
    array = py::array(dtype, tensor.shape, bytes.data(), py::cast(file));
  } else {
    array = py::array(dtype, tensor.shape);
    std::memcpy(array.mutable_data(), bytes.data(), bytes.size());
  }
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

}  // namespace

void bind_safetensors(py::module_& m) {
  py::class_<SafetensorsFile, std::shared_ptr<SafetensorsFile>>(
      m, "SafetensorsFile", "A memory-mapped safetensors file, checked when it is opened.")
      .def(py::init([](const py::object& path) {
             // Bytes, so that any name that the system allows gets through.
             const auto encoded = py::module_::import("os").attr("fsencode")(path).cast<std::string>();
             if (encoded.find('\0') != std::string::npos) throw py::value_error("path: embedded null byte");
             const py::gil_scoped_release release;
             return std::make_shared<SafetensorsFile>(encoded);
           }),
           py::arg("path"), "Raises CheckpointError that lists every fault of the header.")
      .def(
          "names",
          [](const SafetensorsFile& file) {
            py::list names(file.tensors().size());
            for (size_t i = 0; i < file.tensors().size(); ++i) names[i] = py::str(file.tensors()[i].name);
            return names;
          },
          "Names of all tensors, in the order of the header.")
      .def_property_readonly("metadata", &SafetensorsFile::metadata, "The header's free text fields.")
      .def(
          "info",
          [](const SafetensorsFile& file, const std::string& name) {
            const StoredTensor& tensor = file.at(name);
            return py::make_tuple(name_of(tensor.type), shape_tuple(tensor));
          },
          py::arg("name"), "(dtype, shape) with dtype such as \"float32\" or \"bfloat16\".")
      .def("tensor", &tensor_array, py::arg("name"),
           "The tensor as a read-only array over the mapped file; bfloat16 as uint16.");
}

}  // namespace armt::bindings
