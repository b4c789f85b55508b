#include "checkpoint/block_reader.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "armt/error.h"
#include "checkpoint/state_file.h"

namespace armt::state_blocks {
namespace {

constexpr const char* kDamaged = "; it is damaged: take another copy";

template <class T>
T number_at(const uint8_t* from) {
  return Cursor({from, sizeof(T)}, "").number<T>();
}

}  // namespace

// ---- Cursor

void Cursor::fail(const std::string& message) const {
  throw StateError(where_ + ": " + message);
}

std::span<const uint8_t> Cursor::take(size_t count) {
  if (count > bytes_.size()) fail("it ends too early");
  const std::span<const uint8_t> taken = bytes_.first(count);
  bytes_ = bytes_.subspan(count);
  return taken;
}

std::string Cursor::text() {
  const std::span<const uint8_t> raw = take(number<uint8_t>());
  return {raw.begin(), raw.end()};
}

void Cursor::finish() const {
  if (!bytes_.empty()) fail("found " + std::to_string(bytes_.size()) + " bytes behind its end");
}

// ---- BlockHead

std::string BlockHead::name() const {
  const std::string known = name_of(type);
  return "block " + (known.empty() ? "of type " + std::to_string(static_cast<uint32_t>(type)) : "'" + known + "'") +
         (has_layer() ? " of layer " + std::to_string(layer) : "");
}

uint64_t BlockHead::order() const {
  return (has_layer() ? uint64_t{layer} + 1 : 0) << 32 | static_cast<uint32_t>(type);
}

// ---- BlockReader

BlockReader::BlockReader(Take take, int64_t size, std::string where)
    : take_(std::move(take)), size_(size), where_(std::move(where)) {
  read_prefix();
}

void BlockReader::fail(const std::string& message) const {
  throw StateError(where_ + ": " + message);
}

int64_t BlockReader::payload_left() const {
  return std::max<int64_t>(0, left() - kSumBytes - kTrailerBytes);
}

void BlockReader::read_prefix() {
  if (size_ == 0) fail("it is empty, expected a state");
  uint8_t raw[kPrefixBytes] = {};
  const int64_t there = std::min(size_, kPrefixBytes);
  raw_bytes(raw, there, "the beginning");
  const auto known = static_cast<size_t>(std::min<int64_t>(there, std::ssize(kMagic)));
  if (std::memcmp(raw, kMagic.data(), known) != 0) {
    fail("it does not begin like a state; is it a file of another kind?");
  }
  if (size_ < kPrefixBytes + kTrailerBytes) {
    fail("found " + std::to_string(size_) + " bytes, which hold no state; it is cut short");
  }
  check_kind(raw);
  check_sum({raw, kPrefixBytes - kSumBytes}, number_at<uint32_t>(raw + kPrefixBytes - kSumBytes), "the beginning");
  const auto claimed = number_at<uint64_t>(raw + 16);
  if (claimed != static_cast<uint64_t>(size_)) {
    fail("found " + std::to_string(size_) + " bytes, expected " + std::to_string(claimed) +
         (claimed > static_cast<uint64_t>(size_) ? "; it is cut short" : "; something was added behind its end"));
  }
  blocks_left_ = number_at<uint32_t>(raw + 24);
}

void BlockReader::check_kind(const uint8_t* raw) const {
  constexpr uint32_t kSwappedMark = 0x04030201;
  const auto order = number_at<uint32_t>(raw + 8);
  if (order == kSwappedMark) {
    fail("it is in big-endian byte order, expected little-endian; was it converted by hand?");
  }
  if (order != kOrderMark) fail(std::string("its byte order mark is wrong") + kDamaged);
  const auto format = number_at<uint32_t>(raw + 12);
  if (format == kStateFormat) return;
  fail("written by format " + std::to_string(format) + "; this build reads " + std::to_string(kStateFormat) +
       (format > kStateFormat ? ": update armt" : ""));
}

void BlockReader::check_sum(std::span<const uint8_t> bytes, uint32_t expected, const std::string& what) const {
  Crc32c sum;
  sum.add(bytes);
  if (sum.value() != expected) fail("the sum of " + what + " is wrong" + kDamaged);
}

void BlockReader::raw_bytes(void* to, int64_t count, const std::string& what) {
  if (count > left()) fail("it ends inside " + what + "; it is cut short");
  take_(to, count);
  at_ += count;
  file_sum_.add({static_cast<const uint8_t*>(to), static_cast<size_t>(count)});
}

std::optional<BlockHead> BlockReader::next() {
  if (blocks_left_ == 0) return std::nullopt;
  --blocks_left_;
  uint8_t raw[kHeadBytes];
  raw_bytes(raw, kHeadBytes, "the head of a block");
  check_sum({raw, kHeadBytes - kSumBytes}, number_at<uint32_t>(raw + kHeadBytes - kSumBytes), "the head of a block");
  BlockHead head{.type = static_cast<Type>(number_at<uint32_t>(raw)), .layer = number_at<uint32_t>(raw + 4)};
  const auto bytes = number_at<uint64_t>(raw + 8);
  if (name_of(head.type).empty()) {
    fail(head.name() + " is unknown to this build, which reads format " + std::to_string(kStateFormat) +
         "; update armt");
  }
  if (bytes == 0 || bytes > static_cast<uint64_t>(payload_left())) {
    fail(head.name() + ": found " + std::to_string(bytes) + " bytes, expected 1 .. " + std::to_string(payload_left()) +
         ", which the file has left");
  }
  head.bytes = static_cast<int64_t>(bytes);
  if (last_order_ && head.order() <= *last_order_) {
    fail(head.name() + " stands there twice or out of order");
  }
  last_order_ = head.order();
  return head;
}

void BlockReader::require_bytes(const BlockHead& head, int64_t expected) const {
  if (head.bytes == expected) return;
  fail(head.name() + ": found " + std::to_string(head.bytes) + " bytes, expected " + std::to_string(expected) +
       " for the model and counters in it");
}

std::vector<uint8_t> BlockReader::small_payload(const BlockHead& head) {
  if (head.bytes > kMostFactBytes) {
    fail(head.name() + ": found " + std::to_string(head.bytes) + " bytes, expected at most " +
         std::to_string(kMostFactBytes));
  }
  std::vector<uint8_t> payload(static_cast<size_t>(head.bytes));
  Crc32c sum;
  payload_bytes(payload.data(), head, head.bytes, sum);
  finish_payload(head, sum);
  return payload;
}

// In pieces, so that the sums find the bytes in the processor's cache.
void BlockReader::payload_bytes(void* to, const BlockHead& head, int64_t count, Crc32c& sum) {
  constexpr int64_t kPiece = 128 * 1024;
  auto* at = static_cast<uint8_t*>(to);
  for (int64_t done = 0; done < count; done += kPiece) {
    const int64_t piece = std::min(kPiece, count - done);
    raw_bytes(at + done, piece, head.name());
    sum.add({at + done, static_cast<size_t>(piece)});
  }
}

void BlockReader::array(const BlockHead& head, void* to, int64_t count, Crc32c& sum) {
  payload_bytes(to, head, count * 4, sum);
  if constexpr (std::endian::native == std::endian::little) return;
  auto* at = static_cast<uint8_t*>(to);
  for (int64_t i = 0; i < count; ++i) std::reverse(at + 4 * i, at + 4 * i + 4);
}

void BlockReader::finish_payload(const BlockHead& head, const Crc32c& sum) {
  uint8_t raw[kSumBytes];
  raw_bytes(raw, kSumBytes, head.name());
  if (number_at<uint32_t>(raw) != sum.value()) {
    fail("the sum of " + head.name() + " is wrong" + kDamaged);
  }
}

void BlockReader::finish() {
  if (left() != kTrailerBytes) {
    fail("found " + std::to_string(left() - kTrailerBytes) + " bytes behind the last block" + kDamaged);
  }
  const uint64_t found = file_sum_.value();
  uint8_t raw[kTrailerBytes];
  raw_bytes(raw, kTrailerBytes, "the sum of the file");
  if (number_at<uint64_t>(raw) != found) {
    fail(std::string("the sum of the whole file is wrong") + kDamaged);
  }
}

}  // namespace armt::state_blocks
