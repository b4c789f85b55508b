// What the writer and the reader of state files agree on.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace armt::state_blocks {

inline constexpr std::array<uint8_t, 8> kMagic = {0x89, 'A', 'R', 'M', 'T', 'S', 0x0d, 0x0a};
inline constexpr uint32_t kOrderMark = 0x01020304;
inline constexpr int64_t kPrefixBytes = 32;
inline constexpr int64_t kHeadBytes = 20;    // of a block, its sum included
inline constexpr int64_t kSumBytes = 4;      // behind a block's payload
inline constexpr int64_t kTrailerBytes = 8;  // of the file
inline constexpr uint32_t kNoLayer = 0xffffffff;
inline constexpr int64_t kMostFactBytes = 65536;

enum class Type : uint32_t {
  facts = 1,            // u32 count, then each: u8 length, name, u8 kind, value
  counters = 2,         // i64 tokens, closed_segments, position_base, window_tokens; u64 version, seed, drawn
  open_tokens = 3,      // i32 each
  previous_tokens = 4,  // i32 each
  carried = 5,          // f32 [m, D]
  last_hidden = 6,      // f32 [D]
  memory = 16,          // f32 A [h, F, E], z [h, F], statistics [4]
  current = 17,         // f32 k [rows, Hkv, c], v likewise
  previous = 18,        // likewise
};
inline constexpr int64_t kCounterBytes = 7 * 8;

enum class FactKind : uint8_t {
  boolean = 0,  // u8
  integer = 1,  // i64
  real = 2,     // f64
  text = 3,     // u8 length, bytes
};

inline std::string name_of(Type type) {
  switch (type) {
    case Type::facts:
      return "facts";
    case Type::counters:
      return "counters";
    case Type::open_tokens:
      return "open tokens";
    case Type::previous_tokens:
      return "previous tokens";
    case Type::carried:
      return "memory tokens";
    case Type::last_hidden:
      return "last hidden row";
    case Type::memory:
      return "memory";
    case Type::current:
      return "current rows";
    case Type::previous:
      return "previous rows";
  }
  return "";  // unknown
}

}  // namespace armt::state_blocks
