// The one place that chooses a device.
#include "backend.h"

#include "armt/error.h"

namespace armt {
namespace {

bool is_cuda(const std::string& device) {
  if (device == "cuda") return true;
  const bool numbered = device.starts_with("cuda:") && device.size() > 5 && device.size() <= 8;
  return numbered && device.find_first_not_of("0123456789", 5) == std::string::npos;
}

}  // namespace

std::unique_ptr<Backend> make_backend(const ModelConfig& config, const BackendOptions& options) {
  if (options.device == "auto") {
    BackendOptions chosen = options;
    chosen.device = cuda_device_count() > 0 ? "cuda" : "cpu";
    return make_backend(config, chosen);
  }
  if (options.device == "cpu") return make_cpu_backend(config, options);
  if (is_cuda(options.device)) return make_cuda_backend(config, options);
  throw InvalidArgument("device: found '" + options.device + "', expected 'cpu', 'cuda', 'cuda:<number>' or 'auto'");
}

}  // namespace armt
