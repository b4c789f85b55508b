// Memory that other libraries read and write: logits that stay on the device, the stream that others wait for.
#include <algorithm>

#include "check.h"
#include "workspace.h"

namespace armt::cuda {

uintptr_t CudaBackend::stream_handle() const {
  return reinterpret_cast<uintptr_t>(main_.stream);
}

BlockRef CudaBackend::allocate_lent(int64_t bytes) {
  BlockRef block = allocate(bytes);
  block->release = [this, give = std::move(block->release)](Block& released) {
    {
      // Nobody says which of the borrower's streams still reads.
      const std::lock_guard lock(mutex_);
      int before = 0;
      cudaGetDevice(&before);
      cudaSetDevice(device_);
      cudaDeviceSynchronize();
      cudaSetDevice(before);
      cudaGetLastError();
    }
    give(released);
  };
  return block;
}

void CudaBackend::logits(const Rows& hidden, int64_t first, int64_t count, Block& out, int64_t offset) {
  const Entry entry(*this);
  head(hidden, first, count, static_cast<char*>(out.data) + offset);
}

}  // namespace armt::cuda
