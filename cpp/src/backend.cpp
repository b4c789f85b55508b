// The one place that chooses a device.
#include "backend.h"

#include <bit>

#include "armt/error.h"

namespace armt {
namespace {

bool is_cuda(const std::string& device) {
  if (device == "cuda") return true;
  const bool numbered = device.starts_with("cuda:") && device.size() > 5 && device.size() <= 8;
  return numbered && device.find_first_not_of("0123456789", 5) == std::string::npos;
}

}  // namespace

int64_t count_nonfinite(std::span<const float> values) {
  constexpr uint32_t kExponent = 0x7f800000;  // all ones in infinities and NaNs only
  int64_t count = 0;
  for (const float value : values) count += (std::bit_cast<uint32_t>(value) & kExponent) == kExponent;
  return count;
}

std::unique_ptr<Backend> make_backend(const ModelConfig& config, const BackendOptions& options) {
  if (options.memory_limit < 0) {
    throw InvalidArgument("memory_limit: found " + std::to_string(options.memory_limit) +
                          ", expected bytes, or 0 for all that there is");
  }
  if (options.device == "auto") {
    BackendOptions chosen = options;
    chosen.device = cuda_device_count() > 0 ? "cuda" : "cpu";
    return make_backend(config, chosen);
  }
  if (options.device == "cpu" && options.prefill_fp8) {
    throw DeviceError(
        "prefill_dtype: 'fp8' was asked for on the CPU, expected a GPU of compute capability 9.0; use "
        "prefill_dtype='same'");
  }
  if (options.device == "cpu" && options.memory_limit != 0) {
    throw InvalidArgument("memory_limit: found " + std::to_string(options.memory_limit) +
                          " on the CPU, expected 0: it limits the memory of a GPU");
  }
  if (options.device == "cpu") return make_cpu_backend(config, options);
  if (is_cuda(options.device)) return make_cuda_backend(config, options);
  throw InvalidArgument("device: found '" + options.device + "', expected 'cpu', 'cuda', 'cuda:<number>' or 'auto'");
}

}  // namespace armt
