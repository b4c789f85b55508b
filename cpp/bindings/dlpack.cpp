#include "dlpack.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <charconv>
#include <string>
#include <utility>

#include "armt/error.h"
#include "module.h"

namespace armt::bindings {

namespace py = pybind11;

namespace {

// The layout that DLPack 0.8 fixes; `strides` null: row-major.
struct DlDevice {
  int32_t type;
  int32_t number;
};
struct DlType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlType type;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DlManaged {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManaged*);
};

constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint8_t kInt = 0, kUint = 1, kFloat = 2, kBool = 6;
constexpr const char *kFresh = "dltensor", *kUsed = "used_dltensor";

// An array that somebody else reads; lives until its deleter is called.
struct Lent {
  DlManaged managed{};
  DeviceArray array;
  std::vector<int64_t> shape;
  explicit Lent(const DeviceArray& lent) : array(lent), shape(lent.shape()) {}
};

// Freeing waits for the device, and other threads may want the interpreter meanwhile.
template <class Body>
void without_gil(const Body& body) {
  if (Py_IsInitialized() == 0 || PyGILState_Check() == 0) {
    body();
    return;
  }
  const py::gil_scoped_release release;
  body();
}

void unused(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, kFresh) == 0) return;
  auto* managed = static_cast<DlManaged*>(PyCapsule_GetPointer(capsule, kFresh));
  managed->deleter(managed);
}

py::capsule to_dlpack(const DeviceArray& array, const py::object& /*stream: the array is complete*/,
                      const py::object& /*max_version: the oldest serves all*/, const py::object& device,
                      const py::object& copy) {
  const auto [type, number] = dlpack_device(array.engine());
  if (!device.is_none() && device.cast<std::pair<int32_t, int32_t>>() != std::pair(type, number)) {
    throw py::buffer_error("logits: they lie on " + array.engine().backend().device() +
                           "; convert them there, then move them");
  }
  if (!copy.is_none() && copy.cast<bool>()) throw py::buffer_error("logits: no copy is made here; copy them there");
  auto lent = std::make_unique<Lent>(array);
  lent->managed.tensor = {.data = array.block().data,
                          .device = {type, number},
                          .ndim = static_cast<int32_t>(lent->shape.size()),
                          .type = {kFloat, 32, 1},
                          .shape = lent->shape.data(),
                          .strides = nullptr,
                          .byte_offset = 0};
  lent->managed.context = lent.get();
  lent->managed.deleter = [](DlManaged* managed) { without_gil([&] { delete static_cast<Lent*>(managed->context); }); };
  PyObject* capsule = PyCapsule_New(&lent->managed, kFresh, unused);
  if (capsule == nullptr) throw py::error_already_set();
  lent.release();
  return py::reinterpret_steal<py::capsule>(capsule);
}

py::array_t<float> to_host(const DeviceArray& array, const py::object& dtype, const py::object& copy) {
  if (!copy.is_none() && !copy.cast<bool>()) {
    throw py::value_error("logits: they lie on " + array.engine().backend().device() + "; NumPy needs a copy");
  }
  py::array_t<float> out(std::vector<py::ssize_t>(array.shape().begin(), array.shape().end()));
  {
    float* const data = out.mutable_data();
    const py::ssize_t bytes = out.nbytes();
    const py::gil_scoped_release release;
    array.engine().backend().download(array.block(), 0, data, bytes);
  }
  return dtype.is_none() ? out : py::array_t<float>(out.attr("astype")(dtype));
}

// Gives the tensor back to its owner.
class Borrowed {
 public:
  explicit Borrowed(const py::capsule& capsule) {
    if (PyCapsule_IsValid(capsule.ptr(), kFresh) == 0) {
      throw InvalidArgument("token ids: __dlpack__ returned no fresh tensor");
    }
    managed_ = static_cast<DlManaged*>(PyCapsule_GetPointer(capsule.ptr(), kFresh));
    PyCapsule_SetName(capsule.ptr(), kUsed);
  }
  ~Borrowed() {
    if (managed_->deleter != nullptr) managed_->deleter(managed_);
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  const DlTensor& tensor() const { return managed_->tensor; }

 private:
  DlManaged* managed_;
};

}  // namespace

DeviceArray::DeviceArray(std::shared_ptr<Engine> engine, std::vector<int64_t> shape)
    : engine_(std::move(engine)), shape_(std::move(shape)) {
  int64_t bytes = sizeof(float);
  for (const int64_t size : shape_) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) throw OutOfMemory("logits: more than fit into memory");
  }
  block_ = engine_->backend().allocate_lent(bytes);
}

DeviceArray::~DeviceArray() {
  if (block_.use_count() == 1) without_gil([this] { block_.reset(); });
}

std::pair<int32_t, int32_t> dlpack_device(const Engine& engine) {
  const std::string name = engine.backend().device();  // "cpu", "cuda:0"
  const size_t colon = name.find(':');
  if (colon == std::string::npos) return {kCpu, 0};
  int32_t number = 0;
  std::from_chars(name.data() + colon + 1, name.data() + name.size(), number);
  return {kCuda, number};
}

py::array read_dlpack(const Engine& engine, const py::capsule& capsule) {
  const Borrowed borrowed(capsule);
  const DlTensor& tensor = borrowed.tensor();
  const uint8_t code = tensor.type.code;
  if ((code != kInt && code != kUint && code != kBool) || tensor.type.lanes != 1) {
    throw InvalidArgument("token ids: found a tensor of another type, expected an integer type");
  }
  if (std::pair(tensor.device.type, tensor.device.number) != dlpack_device(engine)) {
    throw InvalidArgument("token ids: found a tensor on another device than the engine's, " +
                          engine.backend().device());
  }
  const int64_t element = tensor.type.bits / 8;
  std::vector<py::ssize_t> shape, strides;
  int64_t elements = 1, row_major = 1;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    const int64_t size = tensor.shape[i], stride = tensor.strides != nullptr ? tensor.strides[i] : row_major;
    if (stride < 0) throw InvalidArgument("token ids: found a tensor that runs backwards; make a copy of it");
    shape.insert(shape.begin(), size);
    strides.insert(strides.begin(), stride * element);
    elements += size > 0 ? (size - 1) * stride : 0;
    row_major *= size;
  }
  std::string kind = "bool";
  if (code != kBool) kind = (code == kInt ? "int" : "uint") + std::to_string(tensor.type.bits);
  if (row_major == 0) return py::array(py::dtype(kind), shape);
  // All from the first element to the last, then the same view of it.
  const int64_t bytes = elements * element;
  auto values = std::make_unique<std::vector<char>>(static_cast<size_t>(bytes));
  char* const data = values->data();
  {
    const py::gil_scoped_release release;
    Block from;
    from.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    from.bytes = bytes;
    engine.backend().download(from, 0, data, bytes);
  }
  const py::capsule owner(values.release(), [](void* p) { delete static_cast<std::vector<char>*>(p); });
  return py::array(py::dtype(kind), shape, strides, data, owner);
}

void bind_dlpack(py::module_& m) {
  py::class_<DeviceArray>(m, "DeviceArray", "Float32 values in the memory of an engine's device.")
      .def_property_readonly("shape", [](const DeviceArray& a) { return py::tuple(py::cast(a.shape())); })
      .def_property_readonly("device", [](const DeviceArray& a) { return a.engine().backend().device(); })
      .def("__dlpack__", &to_dlpack, py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
           py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__", [](const DeviceArray& a) { return dlpack_device(a.engine()); })
      .def("__array__", &to_host, py::arg("dtype") = py::none(), py::arg("copy") = py::none());
}

}  // namespace armt::bindings
