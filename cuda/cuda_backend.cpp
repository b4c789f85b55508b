#include "cuda_backend.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "armt/error.h"
#include "check.h"
#include "gated.h"
#include "kernels.h"
#include "slots.h"
#include "weights.h"
#include "workspace.h"

namespace armt::cuda {
namespace {

constexpr int64_t kProductMemory = int64_t{64} << 20;

bool dense_rows(const HostMatrix& matrix) {
  return matrix.col_stride == 1 && matrix.row_stride == matrix.cols;
}

// Float32 on the device whatever the weights' type.
bool kept_in_float(Vector which) {
  return which != Vector::qkv_bias && which != Vector::attn_out_bias && which != Vector::mlp_up_bias &&
         which != Vector::mlp_down_bias;
}

}  // namespace

CudaBackend::CudaBackend(const ModelConfig& config, const BackendOptions& options, int device)
    : config_(config), dtype_(options.weight_dtype), device_(device), arena_(device, options.memory_limit) {
  arena_.make_room = [this](int64_t bytes) { return make_room(bytes); };
  const DeviceScope scope(device_);
  cudaDeviceProp found{};
  check(cudaGetDeviceProperties(&found, device_), "cudaGetDeviceProperties");
  const std::string name = std::string(found.name) + " (compute capability " + std::to_string(found.major) + "." +
                           std::to_string(found.minor) + ")";
  if (found.major < 8) throw DeviceError("device: found " + name + ", expected compute capability 8.0 or newer");
  if (!runs_here()) {
    throw DeviceError("device: this build has no code for " + name + "; rebuild with CMAKE_CUDA_ARCHITECTURES=" +
                      std::to_string(found.major) + std::to_string(found.minor) + (found.major == 9 ? "a" : ""));
  }
  if (config.decoder.head_dim > 256) {
    throw InvalidArgument("head_dim: found " + std::to_string(config.decoder.head_dim) +
                          ", expected at most 256 on a GPU; use device='cpu'");
  }
  description_ = name + ", " + std::to_string(found.multiProcessorCount) + " multiprocessors, " +
                 std::to_string(found.totalGlobalMem >> 30) + " GiB";
  processors_ = found.multiProcessorCount;
  fuses_gate_ = dtype_ == DType::bf16 && std::getenv("ARMT_NO_FUSED_GATE") == nullptr && can_fuse_gate();
  choose_prefill(options, name);
  lt_ = std::make_unique<Lt>();
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  check(cudaStreamCreateWithPriority(&main_.stream, cudaStreamNonBlocking, least), "cudaStreamCreate");
  check(cudaStreamCreateWithPriority(&side_.stream, cudaStreamNonBlocking, greatest), "cudaStreamCreate");
  main_.product_memory = DeviceBuffer(arena_, kProductMemory);
  side_.product_memory = DeviceBuffer(arena_, kProductMemory);
  check(cudaEventCreateWithFlags(&forked_, cudaEventDisableTiming), "cudaEventCreate");
  check(cudaEventCreateWithFlags(&joined_, cudaEventDisableTiming), "cudaEventCreate");
  check(cudaEventCreateWithFlags(&entered_, cudaEventDisableTiming), "cudaEventCreate");
  if (const std::vector<float> found_frequencies = rotary_frequencies(config.decoder); !found_frequencies.empty()) {
    frequencies_ = DeviceBuffer(arena_, std::ssize(found_frequencies) * 4);
    check(
        cudaMemcpy(frequencies_.data(), found_frequencies.data(), found_frequencies.size() * 4, cudaMemcpyHostToDevice),
        "cudaMemcpy");
  }
}

CudaBackend::~CudaBackend() {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device_);
  cudaDeviceSynchronize();
  forget_replays();
  if (pinned_ != nullptr) cudaFreeHost(pinned_);
  for (cudaEvent_t event : {forked_, joined_, entered_}) {
    if (event != nullptr) cudaEventDestroy(event);
  }
  for (cudaStream_t stream : {main_.stream, side_.stream}) {
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
  cudaSetDevice(before);
  cudaGetLastError();
}

int64_t CudaBackend::matrix_rows(Matrix which) const {
  return expected_shape(which, config_).rows;
}
int64_t CudaBackend::vector_size(Vector which) const {
  return expected_size(which, config_);
}

int64_t CudaBackend::write_width() const {
  return (config_.memory.d_mem + config_.decoder.d_model + config_.gate_rows() + 7) / 8 * 8;
}

void CudaBackend::load(Matrix which, int64_t layer, const HostMatrix& matrix) {
  const Entry entry(*this);
  const int64_t layers = config_.decoder.n_layers;
  check_slot(which, layer, matrix, config_);
  const Shape expected = expected_shape(which, config_);
  // Key, value and gate of a write stand in one matrix.
  const bool joined = which == Matrix::mem_key || which == Matrix::mem_value || which == Matrix::mem_gate;
  DeviceBuffer& buffer = joined ? write_weights_ : matrices_[static_cast<size_t>(which)];
  const int64_t rows = joined ? write_width() : expected.rows;
  int64_t first_row = belongs_to_model(which) ? 0 : stack_of(layer) * rows;
  if (which == Matrix::mem_value || which == Matrix::mem_gate) first_row += config_.memory.d_mem;
  if (which == Matrix::mem_gate) first_row += config_.decoder.d_model;
  if (buffer.data() == nullptr) {
    const int64_t bytes = (belongs_to_model(which) ? 1 : layers) * rows * expected.cols * element();
    buffer = DeviceBuffer(arena_, bytes);
    check(cudaMemset(buffer.data(), 0, static_cast<size_t>(bytes)), "cudaMemset");
  }
  char* to = buffer.data() + first_row * expected.cols * element();
  if (matrix.dtype == dtype_ && dense_rows(matrix)) {
    check(
        cudaMemcpy(to, matrix.data, static_cast<size_t>(matrix.rows * matrix.cols * element()), cudaMemcpyHostToDevice),
        "cudaMemcpy");
    return;
  }
  constexpr int64_t kChunkElements = int64_t{1} << 24;
  const int64_t chunk = std::max<int64_t>(1, kChunkElements / matrix.cols);
  for (int64_t row = 0; row < matrix.rows; row += chunk) {
    const std::vector<char> part = converted_rows(matrix, row, std::min(chunk, matrix.rows - row), dtype_);
    check(cudaMemcpy(to + row * matrix.cols * element(), part.data(), part.size(), cudaMemcpyHostToDevice),
          "cudaMemcpy");
  }
}

void CudaBackend::load(Vector which, int64_t layer, std::span<const float> values) {
  const Entry entry(*this);
  const int64_t layers = config_.decoder.n_layers;
  check_slot(which, layer, values, config_);
  const std::vector<char> part = converted(values, kept_in_float(which) ? DType::f32 : dtype_);
  const auto bytes = std::ssize(part);
  DeviceBuffer& buffer = vectors_[static_cast<size_t>(which)];
  if (buffer.data() == nullptr) {
    const int64_t all = (belongs_to_model(which) ? 1 : layers) * bytes;
    buffer = DeviceBuffer(arena_, all);
    check(cudaMemset(buffer.data(), 0, static_cast<size_t>(all)), "cudaMemset");
  }
  char* to = buffer.data() + (belongs_to_model(which) ? 0 : stack_of(layer)) * bytes;
  check(cudaMemcpy(to, part.data(), part.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
}

void CudaBackend::finish_loading() {
  const Entry entry(*this);
  quantise_weights();
  check(cudaDeviceSynchronize(), "loading weights");
}

int64_t CudaBackend::weight_bytes() const {
  int64_t bytes = write_weights_.bytes();
  for (const DeviceBuffer& matrix : matrices_) bytes += matrix.bytes();
  for (const DeviceBuffer& vector : vectors_) bytes += vector.bytes();
  for (const QuantisedMatrix& matrix : quantised_) bytes += matrix.values.bytes() + matrix.scales.bytes();
  return bytes;
}

}  // namespace armt::cuda

namespace armt {
namespace {

// Number of devices; `reason` says why there is none.
int count_devices(std::string& reason) {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code == cudaSuccess && count > 0) return count;
  reason = code == cudaSuccess ? "no GPU" : cudaGetErrorString(code);
  cudaGetLastError();
  return 0;
}

}  // namespace

int cuda_device_count() {
  std::string reason;
  return count_devices(reason);
}

std::unique_ptr<Backend> make_cuda_backend(const ModelConfig& config, const BackendOptions& options) {
  std::string reason;
  const int count = count_devices(reason);
  if (count == 0) {
    throw DeviceError("device: found '" + options.device + "', but no GPU can be used: " + reason +
                      "; install or update the NVIDIA driver, or use device='cpu'");
  }
  int index = 0;
  if (const size_t colon = options.device.find(':'); colon != std::string::npos) {
    std::from_chars(options.device.data() + colon + 1, options.device.data() + options.device.size(), index);
  }
  if (index >= count) {
    throw DeviceError("device: found '" + options.device + "', expected a number below " + std::to_string(count) +
                      ", the count of GPUs here");
  }
  return std::make_unique<cuda::CudaBackend>(config, options, index);
}

}  // namespace armt
