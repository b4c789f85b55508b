// NumPy arrays in and out: the only place that knows how they map to the engine's spans.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "armt/error.h"

namespace armt::bindings {

namespace py = pybind11;

// Token ids as int32. A contiguous int32 array is used in place, other integer types are converted; ids that do not fit
// 32 bits become -1, which no vocabulary holds, so that the engine's own check names them.
class TokenIds {
 public:
  explicit TokenIds(const py::array& array) {
    if (array.ndim() != 1) {
      throw InvalidArgument("token ids: found " + std::to_string(array.ndim()) + " dimensions, expected 1");
    }
    const char kind = array.dtype().kind();
    if (kind != 'i' && kind != 'u') {
      throw InvalidArgument("token ids: found dtype " + py::str(array.dtype()).cast<std::string>() +
                            ", expected an integer type");
    }
    if (py::isinstance<py::array_t<int32_t, py::array::c_style>>(array)) {
      array_ = array;
      span_ = {static_cast<const int32_t*>(array.data()), static_cast<size_t>(array.shape(0))};
      return;
    }
    const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
    const bool wraps = kind == 'u' && array.itemsize() == 8;
    owned_.resize(wide.shape(0));
    for (py::ssize_t i = 0; i < wide.shape(0); ++i) {
      const int64_t id = wide.data()[i];
      const bool fits = id >= 0 && id <= INT32_MAX && !(wraps && id < 0);
      owned_[i] = fits ? static_cast<int32_t>(id) : -1;
    }
    span_ = owned_;
  }
  std::span<const int32_t> span() const { return span_; }

 private:
  py::array array_;
  std::vector<int32_t> owned_;
  std::span<const int32_t> span_;
};

// A vector handed to NumPy without a copy.
template <class T>
py::array_t<T> to_array(std::vector<T>&& values, std::vector<py::ssize_t> shape) {
  auto owner = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owner->data();
  py::capsule free(owner.release(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(std::move(shape), data, free);
}

// An uninitialised array, filled later without the GIL.
inline py::array_t<float> new_array(std::vector<py::ssize_t> shape) {
  return py::array_t<float>(std::move(shape));
}

}  // namespace armt::bindings
