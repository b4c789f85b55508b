// In place of the CUDA backend in a build without it.
#include "armt/error.h"
#include "backend.h"

namespace armt {

int cuda_device_count() {
  return 0;
}

std::unique_ptr<Backend> make_cuda_backend(const ModelConfig&, const BackendOptions& options) {
  throw DeviceError("device: found '" + options.device +
                    "', but this build has no CUDA; use device='cpu', or install a build made with ARMT_CUDA=ON");
}

}  // namespace armt
