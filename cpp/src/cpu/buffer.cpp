#include "cpu/buffer.h"

#include <cstdint>
#include <cstdlib>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "armt/error.h"

namespace armt::cpu {
namespace {
constexpr uintptr_t kAlignment = 64;
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

// Weights are streamed: huge pages, where the system has them, save most of the address look-ups.
void ask_for_huge_pages([[maybe_unused]] uintptr_t begin, [[maybe_unused]] uintptr_t end) {
#if defined(__linux__)
  begin = (begin + kHugePage - 1) / kHugePage * kHugePage;
  end = end / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

// By hand: C libraries reuse a freed block of the same size for malloc, but often not for an aligned allocation, and
// the memory of a process that makes and drops many sessions would grow.
void* aligned_allocate(int64_t bytes) {
  void* whole = std::malloc(static_cast<size_t>(bytes) + kAlignment);
  if (whole == nullptr) {
    throw OutOfMemory("cpu: no memory for " + std::to_string(bytes) +
                      " bytes; use a smaller model or batch, bfloat16 weights, or fewer streams");
  }
  // malloc aligns for a pointer at least, so there is room for one in front of the next boundary.
  const uintptr_t boundary = (reinterpret_cast<uintptr_t>(whole) / kAlignment + 1) * kAlignment;
  void** data = reinterpret_cast<void**>(boundary);
  data[-1] = whole;
  ask_for_huge_pages(boundary, boundary + static_cast<uintptr_t>(bytes));
  return data;
}

void aligned_release(void* data) noexcept {
  if (data != nullptr) std::free(static_cast<void**>(data)[-1]);
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
