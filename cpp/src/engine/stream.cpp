#include "engine/stream.h"

#include <algorithm>

namespace armt {
namespace {

std::shared_ptr<KvPage> new_page(Backend& backend) {
  auto page = std::make_shared<KvPage>();
  page->block = backend.allocate(backend.kv_page_bytes());
  return page;
}

// Claims rows [offset, offset + count) of a page for this cache. False: another cache has appended there.
bool claim(std::shared_ptr<KvPage>& page, int64_t offset, int64_t count) {
  if (page.use_count() == 1) {
    page->used.store(offset + count, std::memory_order_relaxed);
    return true;
  }
  int64_t expected = offset;
  return page->used.compare_exchange_strong(expected, offset + count, std::memory_order_acq_rel);
}

}  // namespace

StreamState make_stream(const ModelConfig& config) {
  StreamState state;
  state.layers.resize(config.decoder.n_layers);
  return state;
}

void reserve_rows(Backend& backend, KvCache& cache, int64_t count) {
  const int64_t page_rows = backend.kv_page_rows();
  int64_t row = cache.rows;
  const int64_t end = cache.rows + count;
  while (row < end) {
    const auto index = static_cast<size_t>(row / page_rows);
    const int64_t offset = row % page_rows;
    const int64_t taken = std::min(page_rows - offset, end - row);
    if (index == cache.pages.size()) cache.pages.push_back(new_page(backend));
    std::shared_ptr<KvPage>& page = cache.pages[index];
    if (!claim(page, offset, taken)) {
      auto copy = new_page(backend);
      if (offset > 0) backend.copy(*copy->block, *page->block, backend.kv_page_bytes());
      copy->used.store(offset + taken, std::memory_order_relaxed);
      page = std::move(copy);
    }
    row += taken;
  }
}

void clear_rows(KvCache& cache) {
  std::erase_if(cache.pages, [](const std::shared_ptr<KvPage>& page) { return page.use_count() > 1; });
  cache.rows = 0;
}

void trim_rows(const Backend& backend, KvCache& cache) {
  const int64_t page_rows = backend.kv_page_rows();
  const auto pages = static_cast<size_t>((cache.rows + page_rows - 1) / page_rows);
  if (cache.pages.size() > pages) cache.pages.resize(pages);
}

int64_t association_bytes(const ModelConfig& config) {
  const int64_t heads = config.memory.n_heads, features = config.features();
  const int64_t matrix = heads * features * config.value_dim();
  const int64_t normaliser = config.memory.use_denom ? heads * features : 0;
  return (matrix + normaliser + kWriteStats) * static_cast<int64_t>(sizeof(float));
}

BlockRef writable_memory(Backend& backend, const ModelConfig& config, const Association& memory) {
  if (memory.block && memory.block.use_count() == 1) return memory.block;
  return backend.allocate(association_bytes(config));
}

void wipe_stream(Backend& backend, StreamState& state) {
  const std::vector<uint8_t> zeros(size_t{1} << 16);
  const auto wipe = [&](const BlockRef& block) {
    if (!block || block.use_count() > 1) return;
    for (int64_t at = 0; at < block->bytes; at += std::ssize(zeros)) {
      backend.upload(*block, at, zeros.data(), std::min(std::ssize(zeros), block->bytes - at));
    }
  };
  for (LayerState& layer : state.layers) {
    wipe(layer.memory.block);
    for (const KvCache* cache : {&layer.current, &layer.previous}) {
      for (const std::shared_ptr<KvPage>& page : cache->pages) {
        if (page.use_count() == 1) wipe(page->block);
      }
    }
  }
  wipe(state.carried);
  wipe(state.last_hidden);
  for (std::vector<int32_t>* ids : {&state.open_tokens, &state.previous_tokens}) {
    // Volatile: a store into memory that is freed next may be left out otherwise.
    for (volatile int32_t& id : *ids) id = 0;
  }
}

std::vector<BlockRef> blocks_of(const StreamState& state) {
  std::vector<BlockRef> blocks;
  const auto add = [&](const BlockRef& block) {
    if (block) blocks.push_back(block);
  };
  for (const LayerState& layer : state.layers) {
    add(layer.memory.block);
    for (const KvCache* cache : {&layer.current, &layer.previous}) {
      for (const std::shared_ptr<KvPage>& page : cache->pages) add(page->block);
    }
  }
  add(state.carried);
  add(state.last_hidden);
  return blocks;
}

void InUse::add_made(const StreamState& state) {
  std::vector<const Block*> known;
  for (const BlockRef& block : blocks_) known.push_back(block.get());
  std::ranges::sort(known);
  for (BlockRef& block : blocks_of(state)) {
    if (!std::ranges::binary_search(known, block.get())) made_.push_back(std::move(block));
  }
}

int64_t state_bytes(const Backend& backend, const StreamState& state) {
  int64_t bytes = 0;
  for (const LayerState& layer : state.layers) {
    if (layer.memory.block) bytes += layer.memory.block->bytes;
    const auto pages = layer.current.pages.size() + layer.previous.pages.size();
    bytes += static_cast<int64_t>(pages) * backend.kv_page_bytes();
  }
  if (state.carried) bytes += state.carried->bytes;
  if (state.last_hidden) bytes += state.last_hidden->bytes;
  return bytes;
}

}  // namespace armt
