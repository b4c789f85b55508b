// The state reader, and an engine that continues from whatever state it let through. Inputs are whole files; the
// mutator also changes single blocks and sets the sums right again, since a random change never passes them.
#include <unistd.h>

#include <algorithm>
#include <map>

#include "checkpoint/state_file.h"
#include "common.h"
#include "state_bytes.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

using armt::HostState;
using fuzz::require;

std::vector<uint8_t> encoded(const HostState& state) {
  std::vector<uint8_t> bytes(static_cast<size_t>(armt::encoded_bytes(state)));
  armt::encode(state, bytes);
  return bytes;
}

// Engines are dear: one for each set of settings, the latest few.
std::shared_ptr<armt::Engine> engine_for(const armt::StateFacts& facts) {
  static std::map<std::vector<uint8_t>, std::shared_ptr<armt::Engine>> engines;
  HostState empty{.facts = facts};
  empty.facts.weights.clear();
  empty.layers.resize(static_cast<size_t>(facts.config.decoder.n_layers));
  const std::vector<uint8_t> key = encoded(empty);
  if (const auto found = engines.find(key); found != engines.end()) return found->second;
  if (engines.size() == 24) engines.clear();
  return engines[key] = fuzz::make_engine(facts.config);
}

void go_on(HostState state) {
  const armt::ModelConfig& config = state.facts.config;
  if (!fuzz::is_small(config) || state.facts.weight_dtype != armt::DType::f32) return;
  if (state.open_tokens.size() + state.previous_tokens.size() > 200) return;
  try {
    const auto engine = engine_for(state.facts);
    state.facts.weights = engine->fingerprint();
    armt::Session session(engine, armt::to_stream(*engine, state));
    const std::vector<uint8_t> before = encoded(armt::to_host(session.snapshot()));
    require(before == encoded(state), "a state survives its way through an engine");
    std::vector<int32_t> ids(3, 0);
    std::vector<float> logits(static_cast<size_t>(config.decoder.vocab_size));
    armt::Call call{
        .session = &session, .tokens = ids, .logits = armt::LogitsWanted::last, .logits_out = logits.data()};
    armt::run_calls(*engine, {&call, 1});
    session.close_segment({});
    require(session.progress().tokens == state.tokens + 3, "tokens are counted");
  } catch (const armt::Error&) {  // a position past the table, for example
  }
}

void check(std::span<const uint8_t> bytes) {
  try {
    HostState state = armt::decode(bytes);
    const std::vector<uint8_t> again = encoded(state);
    require(encoded(armt::decode(again)) == again, "a state survives being written and read");
    go_on(std::move(state));
  } catch (const armt::StateError& error) {
    require(std::strlen(error.what()) < 100'000, "a message is short");
  } catch (const armt::OutOfMemory&) {
  }
}

uint32_t mix(unsigned seed, uint32_t salt) {
  uint32_t x = seed * 2654435761U + salt * 40503U;
  x ^= x >> 15;
  x *= 2246822519U;
  return x ^ x >> 13;
}

void change(std::vector<fuzz::RawBlock>& blocks, unsigned seed) {
  const size_t at = mix(seed, 1) % blocks.size(), other = mix(seed, 2) % blocks.size();
  fuzz::RawBlock& block = blocks[at];
  switch (mix(seed, 3) % 16) {
    case 0:
      blocks.erase(blocks.begin() + static_cast<ptrdiff_t>(at));
      return;
    case 1:
      blocks.insert(blocks.begin() + static_cast<ptrdiff_t>(other), fuzz::RawBlock(block));
      return;
    case 2:
      std::swap(block, blocks[other]);
      return;
    case 3:
      block.type = mix(seed, 4) % 20;
      return;
    case 4:
      block.layer = mix(seed, 5) % 2 == 0 ? mix(seed, 6) % 4 : 0xffffffff;
      return;
    default: {
      fuzz::RawBlock& chosen =
          mix(seed, 7) % 2 == 0 ? blocks[mix(seed, 8) % std::min<size_t>(2, blocks.size())] : block;
      const size_t size = chosen.payload.size();
      const bool keep = mix(seed, 9) % 2 == 0;  // many blocks have one right size
      chosen.payload.resize(size + 64);
      const size_t changed = LLVMFuzzerMutate(chosen.payload.data(), size, keep ? size : size + 64);
      chosen.payload.resize(keep ? size : changed);
    }
  }
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  std::vector<fuzz::RawBlock> blocks = fuzz::open({data, size});
  if (blocks.empty() || mix(seed, 0) % 8 == 0) return LLVMFuzzerMutate(data, size, max_size);
  change(blocks, seed);
  const std::vector<uint8_t> sealed = fuzz::seal(blocks);
  if (sealed.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::copy(sealed.begin(), sealed.end(), data);
  return sealed.size();
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  check({data, size});
  return 0;
}
