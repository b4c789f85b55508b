#include "cpu/buffer.h"

#include <new>
#include <string>

#include "armt/error.h"

namespace armt::cpu {
namespace {
constexpr std::align_val_t kAlignment{64};
}

void* aligned_allocate(int64_t bytes) {
  void* data = ::operator new(static_cast<size_t>(bytes), kAlignment, std::nothrow);
  if (data != nullptr) return data;
  throw OutOfMemory("cpu: no memory for " + std::to_string(bytes) +
                    " bytes; use a smaller model or batch, bfloat16 weights, or fewer streams");
}

void aligned_release(void* data) noexcept {
  ::operator delete(data, kAlignment);
}

float* thread_scratch(Slot slot, int64_t floats) {
  thread_local Buffer buffers[static_cast<size_t>(Slot::count)];
  Buffer& buffer = buffers[static_cast<size_t>(slot)];
  const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
  if (buffer.bytes() < bytes) {
    buffer = Buffer();  // the old one first: it need not exist beside the new one
    buffer = Buffer(bytes);
  }
  return buffer.floats();
}

}  // namespace armt::cpu
