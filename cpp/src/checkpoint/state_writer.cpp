#include <bit>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "checkpoint/crc.h"
#include "checkpoint/disk.h"
#include "checkpoint/state_blocks.h"
#include "checkpoint/state_file.h"

namespace armt {
namespace {

using namespace state_blocks;

// Fills a buffer, or only counts when there is none.
class Writer {
 public:
  explicit Writer(uint8_t* out) : out_(out) {}

  int64_t size() const { return at_; }
  std::span<const uint8_t> from(int64_t begin) const {
    if (!out_) return {};
    return {out_ + begin, static_cast<size_t>(at_ - begin)};
  }

  void bytes(const void* from, size_t count) {
    if (out_ && count > 0) std::memcpy(out_ + at_, from, count);
    at_ += static_cast<int64_t>(count);
  }
  template <class T>
  void number(T value) {
    static_assert(std::is_unsigned_v<T>);
    uint8_t raw[sizeof(T)];
    for (size_t i = 0; i < sizeof(T); ++i) raw[i] = static_cast<uint8_t>(value >> (8 * i));
    bytes(raw, sizeof raw);
  }
  template <class T>
  void array(std::span<const T> values) {
    static_assert(sizeof(T) == 4);
    if constexpr (std::endian::native == std::endian::little) {
      bytes(values.data(), values.size_bytes());
    } else {
      for (const T value : values) number(std::bit_cast<uint32_t>(value));
    }
  }
  void text(const std::string& value) {
    if (value.size() > 255) throw std::logic_error("a fact is longer than 255 bytes");
    number(static_cast<uint8_t>(value.size()));
    bytes(value.data(), value.size());
  }

  // fill(*this) writes the payload of `count` bytes.
  template <class Fill>
  void block(Type type, uint32_t layer, int64_t count, const Fill& fill) {
    if (count == 0) return;
    ++blocks_;
    const int64_t head = at_;
    number(static_cast<uint32_t>(type));
    number(layer);
    number(static_cast<uint64_t>(count));
    sum(head);
    const int64_t payload = at_;
    fill();
    if (at_ - payload != count) throw std::logic_error("a block's size is not as announced");
    sum(payload);
  }
  template <class T>
  void array_block(Type type, uint32_t layer, const std::vector<T>& values) {
    block(type, layer, std::ssize(values) * 4, [&] { array(std::span<const T>(values)); });
  }
  void sum(int64_t begin) {
    Crc32c crc;
    crc.add(from(begin));
    number(crc.value());
  }
  uint32_t blocks() const { return blocks_; }

 private:
  uint8_t* out_;
  int64_t at_ = 0;
  uint32_t blocks_ = 0;
};

void write_value(Writer& out, const FactValue& value) {
  if (const auto* flag = std::get_if<bool>(&value)) {
    out.number(static_cast<uint8_t>(FactKind::boolean));
    out.number(static_cast<uint8_t>(*flag));
  } else if (const auto* number = std::get_if<int64_t>(&value)) {
    out.number(static_cast<uint8_t>(FactKind::integer));
    out.number(static_cast<uint64_t>(*number));
  } else if (const auto* real = std::get_if<double>(&value)) {
    out.number(static_cast<uint8_t>(FactKind::real));
    out.number(std::bit_cast<uint64_t>(*real));
  } else {
    out.number(static_cast<uint8_t>(FactKind::text));
    out.text(std::get<std::string>(value));
  }
}

void write_facts(Writer& out, const std::vector<Fact>& facts) {
  out.number(static_cast<uint32_t>(facts.size()));
  for (const Fact& fact : facts) {
    out.text(fact.name);
    write_value(out, fact.value);
  }
}

void write_counters(Writer& out, const HostState& state) {
  for (const int64_t value : {state.tokens, state.closed_segments, state.position_base, state.window_tokens}) {
    out.number(static_cast<uint64_t>(value));
  }
  for (const uint64_t value : {state.version, state.sampler.seed, state.sampler.drawn}) {
    out.number(value);
  }
}

void write_rows(Writer& out, Type type, uint32_t layer, const HostRows& rows) {
  out.block(type, layer, std::ssize(rows.k) * 8, [&] {
    out.array(std::span<const float>(rows.k));
    out.array(std::span<const float>(rows.v));
  });
}

void write_layer(Writer& out, uint32_t index, const HostLayer& layer) {
  const LayerMemory& memory = layer.memory;
  const int64_t floats = std::ssize(memory.a) + std::ssize(memory.z) + kWriteStats;
  out.block(Type::memory, index, memory.written ? floats * 4 : 0, [&] {
    out.array(std::span<const float>(memory.a));
    out.array(std::span<const float>(memory.z));
    out.array(std::span<const float>(memory.statistics));
  });
  write_rows(out, Type::current, index, layer.current);
  write_rows(out, Type::previous, index, layer.previous);
}

void write_blocks(Writer& out, const HostState& state) {
  const std::vector<Fact> facts = list_facts(state.facts);
  Writer counted(nullptr);
  write_facts(counted, facts);
  out.block(Type::facts, kNoLayer, counted.size(), [&] { write_facts(out, facts); });
  out.block(Type::counters, kNoLayer, kCounterBytes, [&] { write_counters(out, state); });
  out.array_block(Type::open_tokens, kNoLayer, state.open_tokens);
  out.array_block(Type::previous_tokens, kNoLayer, state.previous_tokens);
  out.array_block(Type::carried, kNoLayer, state.carried);
  out.array_block(Type::last_hidden, kNoLayer, state.last_hidden);
  for (size_t i = 0; i < state.layers.size(); ++i) {
    write_layer(out, static_cast<uint32_t>(i), state.layers[i]);
  }
}

}  // namespace

int64_t encoded_bytes(const HostState& state) {
  Writer counted(nullptr);
  write_blocks(counted, state);
  return kPrefixBytes + counted.size() + kTrailerBytes;
}

void encode(const HostState& state, std::span<uint8_t> out) {
  Writer counted(nullptr);
  write_blocks(counted, state);
  if (kPrefixBytes + counted.size() + kTrailerBytes != std::ssize(out)) {
    throw std::logic_error("encode: the buffer has another size than encoded_bytes()");
  }
  Writer writer(out.data());
  writer.bytes(kMagic.data(), kMagic.size());
  writer.number(kOrderMark);
  writer.number(kStateFormat);
  writer.number(static_cast<uint64_t>(out.size()));
  writer.number(counted.blocks());
  writer.sum(0);
  write_blocks(writer, state);
  Crc64 crc;
  crc.add(writer.from(0));
  writer.number(crc.value());
}

void save_file(const std::string& path, std::span<const uint8_t> bytes) {
  replace_file(path, bytes);
}

}  // namespace armt
