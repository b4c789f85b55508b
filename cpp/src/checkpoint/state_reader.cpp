#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <new>
#include <set>
#include <utility>

#include "armt/error.h"
#include "checkpoint/block_reader.h"
#include "checkpoint/disk.h"
#include "checkpoint/json_reader.h"
#include "checkpoint/state_file.h"

namespace armt {
namespace {

using namespace state_blocks;

FactValue read_value(Cursor& from, const std::string& name) {
  const auto kind = from.number<uint8_t>();
  switch (static_cast<FactKind>(kind)) {
    case FactKind::boolean: {
      const auto flag = from.number<uint8_t>();
      if (flag > 1) from.fail(name + ": found " + std::to_string(flag) + ", expected 0 or 1");
      return flag == 1;
    }
    case FactKind::integer:
      return from.signed_number();
    case FactKind::real:
      return std::bit_cast<double>(from.number<uint64_t>());
    case FactKind::text: {
      std::string text = from.text();
      // No setting has such a text, and it might not fit into a fact when it is written again.
      if (printable(text) != text) from.fail(name + ": found '" + printable(text) + "', expected a short word");
      return text;
    }
  }
  from.fail(name + ": kind of value " + std::to_string(kind) + " is unknown to this build");
}

std::vector<Fact> read_facts(Cursor& from) {
  std::vector<Fact> facts;
  const auto count = from.number<uint32_t>();
  for (uint32_t i = 0; i < count; ++i) {
    std::string name = printable(from.text());
    FactValue value = read_value(from, name);
    facts.push_back({std::move(name), std::move(value)});
  }
  from.finish();
  return facts;
}

class StateReader {
 public:
  explicit StateReader(BlockReader& in)
      : in_(in), state_{.facts = read_model()}, shape_(state_.facts.config, in.where()) {
    state_.layers.resize(static_cast<size_t>(shape_.layers));
  }

  HostState read() {
    read_counters();
    bool in_layers = false;
    while (const auto head = in_.next()) {
      const bool layered = head->type >= Type::memory;
      if (head->has_layer() != layered || (layered && head->layer >= state_.layers.size())) {
        in_.fail(head->name() + ": expected " +
                 (layered ? "layers 0 .. " + std::to_string(shape_.layers - 1) : "no layer"));
      }
      if (layered && !std::exchange(in_layers, true)) check_counters(state_, in_.where());
      if (layered) {
        read_layer(*head, state_.layers[head->layer]);
      } else {
        read_stream(*head);
      }
    }
    in_.finish();
    check_counters(state_, in_.where());
    require_all_blocks();
    return std::move(state_);
  }

 private:
  BlockHead expect(Type type) {
    const auto head = in_.next();
    if (!head || head->type != type || head->has_layer()) {
      in_.fail("block '" + name_of(type) + "' is missing");
    }
    return *head;
  }

  StateFacts read_model() {
    const BlockHead head = expect(Type::facts);
    const std::vector<uint8_t> payload = in_.small_payload(head);
    Cursor cursor(payload, in_.where() + ": " + head.name());
    return facts_from(read_facts(cursor), in_.where());
  }

  void read_counters() {
    const BlockHead head = expect(Type::counters);
    in_.require_bytes(head, kCounterBytes);
    const std::vector<uint8_t> payload = in_.small_payload(head);
    Cursor cursor(payload, in_.where() + ": " + head.name());
    for (int64_t* value : {&state_.tokens, &state_.closed_segments, &state_.position_base, &state_.window_tokens}) {
      *value = cursor.signed_number();
    }
    for (uint64_t* value : {&state_.version, &state_.sampler.seed, &state_.sampler.drawn}) {
      *value = cursor.number<uint64_t>();
    }
  }

  void read_stream(const BlockHead& head) {
    switch (head.type) {
      case Type::open_tokens:
        return read_array(head, state_.open_tokens, head.bytes / 4);
      case Type::previous_tokens:
        return read_array(head, state_.previous_tokens, head.bytes / 4);
      case Type::carried:
        return read_array(head, state_.carried, shape_.carried);
      case Type::last_hidden:
        return read_array(head, state_.last_hidden, shape_.hidden);
      default:
        in_.fail(head.name() + " stands there twice or out of order");
    }
  }

  template <class T>
  void read_array(const BlockHead& head, std::vector<T>& values, int64_t count) {
    in_.require_bytes(head, count * 4);
    values.resize(static_cast<size_t>(count));
    in_.arrays(head, std::span<T>(values));
  }

  void read_layer(const BlockHead& head, HostLayer& layer) {
    switch (head.type) {
      case Type::memory:
        return read_memory(head, layer.memory);
      case Type::current:
        return read_rows(head, layer.current, state_.current_rows());
      default:
        return read_rows(head, layer.previous, state_.previous_rows());
    }
  }

  void read_memory(const BlockHead& head, LayerMemory& memory) {
    if (shape_.matrix == 0) in_.fail(head.name() + ": a model of this dialect has none");
    in_.require_bytes(head, (shape_.matrix + shape_.normaliser + kWriteStats) * 4);
    memory.a.resize(static_cast<size_t>(shape_.matrix));
    memory.z.resize(static_cast<size_t>(shape_.normaliser));
    in_.arrays(head, std::span<float>(memory.a), std::span<float>(memory.z), std::span<float>(memory.statistics));
    memory.written = true;
  }

  void read_rows(const BlockHead& head, HostRows& rows, int64_t count) {
    int64_t bytes = 0;
    if (__builtin_mul_overflow(count, shape_.row * 8, &bytes)) in_.fail(head.name() + ": too large");
    in_.require_bytes(head, bytes);
    rows.k.resize(static_cast<size_t>(count * shape_.row));
    rows.v.resize(rows.k.size());
    in_.arrays(head, std::span<float>(rows.k), std::span<float>(rows.v));
  }

  void require(bool there, Type type, uint32_t layer = kNoLayer) const {
    if (!there) in_.fail(BlockHead{.type = type, .layer = layer}.name() + " is missing");
  }

  // What a stream with these counters has; check_counters() saw to the token ids.
  void require_all_blocks() const {
    const bool closed = state_.closed_segments > 0;
    require(!state_.last_hidden.empty() || state_.tokens == 0, Type::last_hidden);
    require(!state_.carried.empty() || shape_.carried == 0 || !closed, Type::carried);
    for (uint32_t i = 0; i < state_.layers.size(); ++i) {
      const HostLayer& layer = state_.layers[i];
      require(layer.memory.written || shape_.matrix == 0 || !closed, Type::memory, i);
      require(!layer.current.k.empty() || state_.current_rows() == 0, Type::current, i);
      require(!layer.previous.k.empty() || state_.previous_rows() == 0, Type::previous, i);
    }
  }

  BlockReader& in_;
  HostState state_;
  StateShape shape_;
};

[[noreturn]] void fail_memory(const std::string& where, int64_t size) {
  throw OutOfMemory(where + ": a state of " + std::to_string(size) + " bytes does not fit in memory");
}

// Bytes of the machine's memory.
int64_t physical_memory() {
  const int64_t pages = ::sysconf(_SC_PHYS_PAGES), bytes = ::sysconf(_SC_PAGESIZE);
  return pages > 0 && bytes > 0 ? pages * bytes : INT64_MAX;
}

HostState read_state(Take take, int64_t size, const std::string& where) {
  try {
    BlockReader blocks(std::move(take), size, where);
    // A system that promises more memory than it has would end the process instead of refusing.
    if (size > physical_memory()) fail_memory(where, size);
    return StateReader(blocks).read();
  } catch (const std::bad_alloc&) {
    fail_memory(where, size);
  }
}

}  // namespace

HostState decode(std::span<const uint8_t> bytes, const std::string& where) {
  const auto take = [from = bytes.data()](void* to, int64_t count) mutable {
    std::memcpy(to, from, static_cast<size_t>(count));
    from += count;
  };
  return read_state(take, std::ssize(bytes), where);
}

HostState load_file(const std::string& path) {
  InputFile file(path);
  const auto take = [&file](void* to, int64_t count) { file.read(to, count); };
  return read_state(take, file.size(), printable(path));
}

}  // namespace armt
