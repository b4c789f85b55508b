// Kernels that start before the one before them is done (programmatic dependent launch, Hopper and newer).
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <utility>

#include "check.h"

namespace armt::cuda {

// By every kernel launched so, before it reads what the kernel before wrote, and before it ends.
__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ARMT_NO_OVERLAP: each kernel waits for the one before it to end (for tools that take kernels one at a time).
inline bool overlaps() {
  static const bool allowed = std::getenv("ARMT_NO_OVERLAP") == nullptr;
  return allowed;
}

template <class... Parameters, class... Args>
void launch_overlapped(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                       const Args&... args) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps() ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(args)...), "overlapped launch");
}

}  // namespace armt::cuda
