// Makes the n-th allocation or file operation of this program fail. Linked with --wrap, so that the engine itself knows
// nothing of it.
#pragma once

#include <cstdint>

namespace faults {

enum class What : uint8_t {
  allocation,   // one operator new or malloc
  allocations,  // it and all that follow
  file,         // one open, read, write, flush, rename, map ...: EIO
  full,         // likewise: ENOSPC
  stuttering,   // every read and write moves one byte, every third is interrupted: no failure
};

void arm(What what, int64_t number);
// Whether the fault was met since arm().
bool disarm();

}  // namespace faults
