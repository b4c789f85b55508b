// Tiles in shared memory: their copy by the bulk copy engine, and how matrix instructions name them (sm_90a).
#pragma once

#include "hopper.cuh"
#include "tensor_tiles.h"

namespace armt::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ inline void copy_tile(void* to, const CUtensorMap& map, int col, int row, uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(col), "r"(row)
      : "memory");
}

// Rows of 128 bytes, 128-byte swizzle, groups of eight rows 1024 bytes apart.
__device__ inline uint64_t tile_descriptor(const void* shared) {
  return static_cast<uint64_t>(shared_address(shared) >> 4 & 0x3fff) | uint64_t{1} << 16 | uint64_t{64} << 32 |
         uint64_t{1} << 62;
}

#endif

}  // namespace armt::cuda
