// State files as lists of blocks, to change one thing and set every length and sum right again.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <vector>

#include "checkpoint/crc.h"
#include "checkpoint/state_blocks.h"

namespace fuzz {

struct RawBlock {
  uint32_t type = 0, layer = 0;
  std::vector<uint8_t> payload;
};

template <class T>
void put(std::vector<uint8_t>& out, T value) {
  const size_t at = out.size();
  out.resize(at + sizeof value);
  std::memcpy(out.data() + at, &value, sizeof value);
}

inline void put_sum(std::vector<uint8_t>& out, size_t begin) {
  armt::Crc32c sum;
  sum.add({out.data() + begin, out.size() - begin});
  put(out, sum.value());
}

inline std::vector<uint8_t> seal(const std::vector<RawBlock>& blocks) {
  using namespace armt::state_blocks;
  uint64_t size = kPrefixBytes + kTrailerBytes;
  for (const RawBlock& block : blocks) size += kHeadBytes + block.payload.size() + kSumBytes;
  std::vector<uint8_t> out(kMagic.begin(), kMagic.end());
  put(out, kOrderMark);
  put(out, uint32_t{1});
  put(out, size);
  put(out, static_cast<uint32_t>(blocks.size()));
  put_sum(out, 0);
  for (const RawBlock& block : blocks) {
    const size_t head = out.size();
    put(out, block.type);
    put(out, block.layer);
    put(out, static_cast<uint64_t>(block.payload.size()));
    put_sum(out, head);
    const size_t payload = out.size();
    out.insert(out.end(), block.payload.begin(), block.payload.end());
    put_sum(out, payload);
  }
  armt::Crc64 sum;
  sum.add(out);
  put(out, sum.value());
  return out;
}

// The blocks as far as they go; a length past the end takes what is there.
inline std::vector<RawBlock> open(std::span<const uint8_t> data) {
  using namespace armt::state_blocks;
  std::vector<RawBlock> blocks;
  size_t at = kPrefixBytes;
  while (at + kHeadBytes + kSumBytes + kTrailerBytes <= data.size()) {
    RawBlock block;
    uint64_t length = 0;
    std::memcpy(&block.type, data.data() + at, 4);
    std::memcpy(&block.layer, data.data() + at + 4, 4);
    std::memcpy(&length, data.data() + at + 8, 8);
    at += kHeadBytes;
    const size_t room = data.size() - at - kSumBytes - kTrailerBytes;
    const size_t taken = length < room ? static_cast<size_t>(length) : room;
    block.payload.assign(data.begin() + static_cast<ptrdiff_t>(at), data.begin() + static_cast<ptrdiff_t>(at + taken));
    at += taken + kSumBytes;
    blocks.push_back(std::move(block));
  }
  return blocks;
}

}  // namespace fuzz
