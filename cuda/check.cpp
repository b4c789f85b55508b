#include "check.h"

#include <string>

#include "armt/error.h"

namespace armt::cuda {

void check(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // so that a passing fault is not reported twice
  throw DeviceError(std::string("CUDA: ") + call + " failed: " + cudaGetErrorString(code) + " (" +
                    cudaGetErrorName(code) + ")");
}

bool has_hopper_code(const void* kernel) {
  cudaFuncAttributes found{};
  const bool here = cudaFuncGetAttributes(&found, kernel) == cudaSuccess && found.binaryVersion == 90;
  cudaGetLastError();
  return here;
}

DeviceScope::DeviceScope(int device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  changed_ = true;
}

DeviceScope::~DeviceScope() {
  if (changed_) cudaSetDevice(before_);
}

}  // namespace armt::cuda
