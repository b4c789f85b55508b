// CUDA return codes become exceptions; every call and every launch goes through here.
#pragma once

#include <cuda_runtime_api.h>

namespace armt::cuda {

// DeviceError that names the call and the driver's reason.
void check(cudaError_t code, const char* call);

// The same for the kernel launched just before.
inline void check_launch(const char* kernel) {
  check(cudaGetLastError(), kernel);
}

// Whether this build has `kernel` in code for the current GPU's own Hopper instructions (90a; ARMT_HOPPER).
bool has_hopper_code(const void* kernel);

// Makes `device` the thread's current one and puts the old one back at the end of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace armt::cuda
