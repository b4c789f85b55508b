// Cyclic redundancy checks: any single flipped bit, and any burst of flips no longer than the sum,
// changes them, whatever the length of the data.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace armt {

// Reflected, all bits set at the start and inverted at the end. `kPolynomial` is reflected too.
template <class Word, Word kPolynomial>
class Crc {
 public:
  void add(std::span<const uint8_t> bytes) {
    Word sum = sum_;
    size_t i = 0;
    for (; i + kStride <= bytes.size(); i += kStride) {
      Word next = 0;
      for (size_t k = 0; k < kStride; ++k) {
        const uint8_t carried = k < sizeof(Word) ? static_cast<uint8_t>(sum >> (8 * k)) : 0;
        next ^= kTables[kStride - 1 - k][bytes[i + k] ^ carried];
      }
      sum = next;
    }
    for (; i < bytes.size(); ++i) {
      sum = kTables[0][static_cast<uint8_t>(sum) ^ bytes[i]] ^ (sum >> 8);
    }
    sum_ = sum;
  }
  Word value() const { return ~sum_; }

 private:
  static constexpr size_t kStride = 8;  // bytes a step
  using Tables = std::array<std::array<Word, 256>, kStride>;

  // kTables[k][b]: byte b followed by k zero bytes.
  static constexpr Tables make_tables() {
    Tables tables{};
    for (size_t byte = 0; byte < 256; ++byte) {
      Word sum = static_cast<Word>(byte);
      for (int bit = 0; bit < 8; ++bit) sum = (sum & 1) != 0 ? (sum >> 1) ^ kPolynomial : sum >> 1;
      tables[0][byte] = sum;
    }
    for (size_t k = 1; k < kStride; ++k) {
      for (size_t byte = 0; byte < 256; ++byte) {
        const Word shorter = tables[k - 1][byte];
        tables[k][byte] = tables[0][static_cast<uint8_t>(shorter)] ^ (shorter >> 8);
      }
    }
    return tables;
  }
  static constexpr Tables kTables = make_tables();

  Word sum_ = static_cast<Word>(~Word{0});
};

using Crc32c = Crc<uint32_t, 0x82f63b78U>;           // Castagnoli, as in iSCSI
using Crc64 = Crc<uint64_t, 0xc96c5795d7870f42ULL>;  // ECMA-182, as in xz

}  // namespace armt
