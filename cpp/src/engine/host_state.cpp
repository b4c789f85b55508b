#include "engine/host_state.h"

#include <initializer_list>
#include <stdexcept>

#include "armt/error.h"

namespace armt {
namespace {

constexpr int64_t kFloat = sizeof(float);

int64_t product(std::initializer_list<int64_t> factors, const std::string& where) {
  constexpr int64_t kLimit = int64_t{1} << 48;
  int64_t result = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(result, factor, &result) || result > kLimit) {
      throw StateError(where + ": the model settings in it ask for a layer of more than 2^48 numbers");
    }
  }
  return result;
}

std::vector<float> download(Backend& backend, const Block& block, int64_t first, int64_t count) {
  std::vector<float> values(count);
  if (count > 0) backend.download(block, first * kFloat, values.data(), count * kFloat);
  return values;
}

BlockRef upload(Backend& backend, const std::vector<float>& values) {
  if (values.empty()) return nullptr;
  const int64_t bytes = std::ssize(values) * kFloat;
  BlockRef block = backend.allocate(bytes);
  backend.upload(*block, 0, values.data(), bytes);
  return block;
}

HostRows export_rows(Backend& backend, const KvCache& cache, int64_t count, int64_t row) {
  HostRows rows;
  if (count == 0) return rows;
  if (cache.rows != count) throw std::logic_error("a cache's rows disagree with its stream's tokens");
  rows.k.resize(count * row);
  rows.v.resize(count * row);
  backend.export_kv(cache, rows.k.data(), rows.v.data());
  return rows;
}

KvCache import_rows(Backend& backend, const HostRows& rows, int64_t count) {
  KvCache cache;
  if (count == 0) return cache;
  reserve_rows(backend, cache, count);
  cache.rows = count;
  backend.import_kv(cache, rows.k.data(), rows.v.data());
  return cache;
}

LayerMemory download_memory(Backend& backend, const Association& memory, const StateShape& shape) {
  LayerMemory result;
  if (!memory.written()) return result;
  result.written = true;
  result.a = download(backend, *memory.block, 0, shape.matrix);
  result.z = download(backend, *memory.block, shape.matrix, shape.normaliser);
  backend.download(*memory.block, (shape.matrix + shape.normaliser) * kFloat, result.statistics.data(),
                   kWriteStats * kFloat);
  return result;
}

Association upload_memory(Backend& backend, const ModelConfig& config, const LayerMemory& memory) {
  if (!memory.written) return {};
  BlockRef block = backend.allocate(association_bytes(config));
  const int64_t a = std::ssize(memory.a) * kFloat, z = std::ssize(memory.z) * kFloat;
  backend.upload(*block, 0, memory.a.data(), a);
  if (z > 0) backend.upload(*block, a, memory.z.data(), z);
  backend.upload(*block, a + z, memory.statistics.data(), kWriteStats * kFloat);
  return {.block = std::move(block)};
}

void check_ids(const std::vector<int32_t>& ids, int64_t vocab, const std::string& what) {
  for (const int32_t id : ids) {
    if (id >= 0 && id < vocab) continue;
    throw StateError(what + ": found token id " + std::to_string(id) + ", expected 0 .. " + std::to_string(vocab - 1));
  }
}

}  // namespace

int64_t HostState::current_rows() const {
  return open_tokens.empty() ? 0 : facts.config.front_rows() + std::ssize(open_tokens);
}

int64_t HostState::previous_rows() const {
  return window_tokens == 0 ? 0 : facts.config.front_rows() + window_tokens;
}

StateShape::StateShape(const ModelConfig& config, const std::string& where) {
  const int64_t d_model = config.decoder.d_model;
  layers = config.decoder.n_layers;
  row = product({config.decoder.n_kv_heads, config.decoder.head_dim}, where);
  hidden = d_model;
  if (config.has_association()) {
    const int64_t heads = config.memory.n_heads;
    matrix = product({heads, config.features(), config.value_dim()}, where);
    if (config.memory.use_denom) normaliser = product({heads, config.features()}, where);
  } else {
    carried = product({config.memory.memory_tokens, d_model}, where);
  }
}

StateFacts facts_of(const Engine& engine) {
  return {.config = engine.config(), .weight_dtype = engine.backend().weight_dtype(), .weights = engine.fingerprint()};
}

void check_counters(const HostState& state, const std::string& where) {
  constexpr int64_t kMost = int64_t{1} << 62;
  const auto require = [&](bool holds, const char* name, int64_t found) {
    if (!holds) {
      throw StateError(where + ": " + name + ": found " + std::to_string(found) +
                       ", which does not fit the rest of the state");
    }
  };
  const MemoryConfig& memory = state.facts.config.memory;
  const int64_t open = std::ssize(state.open_tokens), previous = std::ssize(state.previous_tokens);
  require(state.tokens >= open && state.tokens - open >= previous && state.tokens < kMost, "tokens", state.tokens);
  require(state.closed_segments >= 0 && state.closed_segments < kMost, "closed_segments", state.closed_segments);
  // Every closed segment has a token or more.
  const int64_t older = state.tokens - open - previous, older_segments = state.closed_segments - 1;
  require(older_segments > 0 ? older >= older_segments : older == 0, "tokens", state.tokens);
  require((previous > 0) == (state.closed_segments > 0), "previous tokens", previous);
  const bool inner = memory.dialect == Dialect::inner;
  require(state.position_base >= 0 && state.position_base < (inner ? kMost : 1), "position_base", state.position_base);
  const bool window = memory.sliding_window && state.window_tokens == previous;
  require(state.window_tokens == 0 || window, "window_tokens", state.window_tokens);
  // Rows are numbered with 32 bits inside a segment.
  constexpr int64_t kMostRows = int64_t{1} << 30;
  require(state.current_rows() < kMostRows, "open tokens", open);
  require(state.previous_rows() < kMostRows, "previous tokens", previous);
  check_ids(state.open_tokens, state.facts.config.decoder.vocab_size, where + ": open tokens");
  check_ids(state.previous_tokens, state.facts.config.decoder.vocab_size, where + ": previous tokens");
}

HostState to_host(const Snapshot& snapshot) {
  Backend& backend = snapshot.engine->backend();
  const StreamState& from = snapshot.state;
  HostState state;
  state.facts = facts_of(*snapshot.engine);
  const StateShape shape(state.facts.config, "state");
  const InUse in_use(backend, blocks_of(from));
  state.open_tokens = from.open_tokens;
  state.previous_tokens = from.previous_tokens;
  state.window_tokens = from.window_tokens;
  state.position_base = from.position_base;
  state.closed_segments = from.closed_segments;
  state.tokens = from.tokens;
  state.sampler = from.sampler;
  state.version = from.version;
  if (from.carried) state.carried = download(backend, *from.carried, 0, shape.carried);
  if (from.last_hidden) state.last_hidden = download(backend, *from.last_hidden, 0, shape.hidden);
  state.layers.reserve(from.layers.size());
  for (const LayerState& layer : from.layers) {
    HostLayer& to = state.layers.emplace_back();
    to.memory = download_memory(backend, layer.memory, shape);
    to.current = export_rows(backend, layer.current, state.current_rows(), shape.row);
    to.previous = export_rows(backend, layer.previous, state.previous_rows(), shape.row);
  }
  return state;
}

LayerMemory layer_memory(const Snapshot& snapshot, int64_t layer) {
  const StateShape shape(snapshot.engine->config(), "state");
  return download_memory(snapshot.engine->backend(), snapshot.state.layers.at(layer).memory, shape);
}

std::vector<float> carried_memory(const Snapshot& snapshot) {
  const BlockRef& carried = snapshot.state.carried;
  if (!carried) return {};
  return download(snapshot.engine->backend(), *carried, 0, carried->bytes / kFloat);
}

int64_t host_bytes(const HostState& state) {
  int64_t numbers = std::ssize(state.open_tokens) + std::ssize(state.previous_tokens) + std::ssize(state.carried) +
                    std::ssize(state.last_hidden);
  for (const HostLayer& layer : state.layers) {
    numbers += std::ssize(layer.memory.a) + std::ssize(layer.memory.z);
    numbers += 2 * (std::ssize(layer.current.k) + std::ssize(layer.previous.k));
  }
  return numbers * kFloat + std::ssize(state.layers) * static_cast<int64_t>(sizeof(HostLayer));
}

StreamState to_stream(Engine& engine, const HostState& state) {
  require_same_model(state.facts, facts_of(engine));
  Backend& backend = engine.backend();
  StreamState stream = make_stream(engine.config());
  stream.open_tokens = state.open_tokens;
  stream.previous_tokens = state.previous_tokens;
  stream.window_tokens = state.window_tokens;
  stream.position_base = state.position_base;
  stream.closed_segments = state.closed_segments;
  stream.tokens = state.tokens;
  stream.sampler = state.sampler;
  stream.version = state.version;
  stream.carried = upload(backend, state.carried);
  stream.last_hidden = upload(backend, state.last_hidden);
  for (size_t i = 0; i < stream.layers.size(); ++i) {
    const HostLayer& from = state.layers[i];
    LayerState& to = stream.layers[i];
    to.memory = upload_memory(backend, engine.config(), from.memory);
    to.current = import_rows(backend, from.current, state.current_rows());
    to.previous = import_rows(backend, from.previous, state.previous_rows());
  }
  backend.let_go(blocks_of(stream));
  return stream;
}

}  // namespace armt
