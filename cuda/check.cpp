#include "check.h"

#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "armt/error.h"

namespace armt::cuda {

void check(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // so that a passing fault is not reported twice
  throw DeviceError(std::string("CUDA: ") + call + " failed: " + cudaGetErrorString(code) + " (" +
                    cudaGetErrorName(code) + ")");
}

bool has_hopper_code(const void* kernel) {
#ifdef ARMT_HOPPER
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> known;  // GPUs of a process may differ
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  const auto [entry, is_new] = known.try_emplace({kernel, device}, false);
  if (is_new) {
    cudaFuncAttributes found{};
    entry->second = cudaFuncGetAttributes(&found, kernel) == cudaSuccess && found.binaryVersion == 90;
    cudaGetLastError();
  }
  return entry->second;
#else
  static_cast<void>(kernel);
  return false;
#endif
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
