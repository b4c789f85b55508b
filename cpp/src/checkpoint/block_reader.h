// A state file as a sequence of checked blocks, from a file or a buffer.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/crc.h"
#include "checkpoint/state_blocks.h"

namespace armt::state_blocks {

// Little-endian numbers of a small payload; StateError headed by `where` past its end.
class Cursor {
 public:
  Cursor(std::span<const uint8_t> bytes, std::string where) : bytes_(bytes), where_(std::move(where)) {}

  template <class T>
  T number() {
    const std::span<const uint8_t> raw = take(sizeof(T));
    T value = 0;
    for (size_t i = 0; i < sizeof(T); ++i) value |= static_cast<T>(static_cast<T>(raw[i]) << (8 * i));
    return value;
  }
  int64_t signed_number() { return static_cast<int64_t>(number<uint64_t>()); }
  std::string text();  // u8 length, bytes
  void finish() const;
  [[noreturn]] void fail(const std::string& message) const;

 private:
  std::span<const uint8_t> take(size_t count);

  std::span<const uint8_t> bytes_;
  std::string where_;
};

struct BlockHead {
  Type type = Type::facts;
  uint32_t layer = kNoLayer;
  int64_t bytes = 0;  // of the payload

  bool has_layer() const { return layer != kNoLayer; }
  std::string name() const;  // "block 'memory' of layer 3"
  uint64_t order() const;    // ascends through a file
};

// Takes the next `bytes` bytes; asked for no more than there are.
using Take = std::function<void(void* to, int64_t bytes)>;

// Every method throws StateError, headed by `where`. No array is allocated here: the caller does so
// after require_bytes().
class BlockReader {
 public:
  BlockReader(Take take, int64_t size, std::string where);

  const std::string& where() const { return where_; }
  [[noreturn]] void fail(const std::string& message) const;

  // The head of the next block, or nothing behind the last one. Its payload lies within the file.
  std::optional<BlockHead> next();
  void require_bytes(const BlockHead& head, int64_t expected) const;

  // The payload, up to kMostFactBytes.
  std::vector<uint8_t> small_payload(const BlockHead& head);
  // The payload as spans of 32-bit elements, one after the other; their sizes add up to it.
  template <class... T>
  void arrays(const BlockHead& head, std::span<T>... values) {
    Crc32c sum;
    (array(head, values.data(), std::ssize(values), sum), ...);
    finish_payload(head, sum);
  }
  // Behind the last block.
  void finish();

 private:
  int64_t left() const { return size_ - at_; }
  int64_t payload_left() const;
  void read_prefix();
  void check_kind(const uint8_t* raw) const;
  void check_sum(std::span<const uint8_t> bytes, uint32_t expected, const std::string& what) const;
  void raw_bytes(void* to, int64_t count, const std::string& what);
  void payload_bytes(void* to, const BlockHead& head, int64_t count, Crc32c& sum);
  void array(const BlockHead& head, void* to, int64_t count, Crc32c& sum);
  void finish_payload(const BlockHead& head, const Crc32c& sum);

  const Take take_;
  const int64_t size_;
  const std::string where_;
  int64_t at_ = 0;
  uint32_t blocks_left_ = 0;
  std::optional<uint64_t> last_order_;
  Crc64 file_sum_;
};

}  // namespace armt::state_blocks
