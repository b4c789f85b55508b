// One stream's state: everything that passes from one call to the next, and the rules for sharing it.
#pragma once

#include <cstdint>
#include <vector>

#include "backend.h"

namespace armt {

struct SamplerState {
  uint64_t seed = 0;
  uint64_t drawn = 0;  // tokens drawn from this seed so far
};

// Copies share device memory: pages of keys and values until they diverge, the associative memory until its next write.
struct StreamState {
  std::vector<LayerState> layers;
  std::vector<int32_t> open_tokens;      // ids of the open segment
  std::vector<int32_t> previous_tokens;  // ids of the segment closed last
  int64_t window_tokens = 0;             // tokens held by LayerState::previous (0: no window, or first segment)
  int64_t position_base = 0;             // inner loop: rows of all closed segments
  int64_t closed_segments = 0;
  int64_t tokens = 0;    // fed and generated, since the last reset
  BlockRef carried;      // RMT: memory vectors [m, D] float32 from the last closed segment; null: the learned ones
  BlockRef last_hidden;  // [D] float32 after the final norm, of the last token; null: no token yet
  SamplerState sampler;
  uint64_t version = 0;  // counts the calls that changed this stream
};

StreamState make_stream(const ModelConfig& config);

// Makes room for `count` more rows behind cache.rows: adds pages, and copies a shared page that another cache has
// already appended to. cache.rows itself is left alone.
void reserve_rows(Backend& backend, KvCache& cache, int64_t count);

// Empties a cache; pages that nobody else holds are kept for reuse.
void clear_rows(KvCache& cache);

// Gives back the pages that no row lies in: at the end of a call, so that an idle stream holds no more than it needs.
void trim_rows(const Backend& backend, KvCache& cache);

// The block to write the next memory into: the current one if this stream alone holds it, else a new one.
BlockRef writable_memory(Backend& backend, const ModelConfig& config, const Association& memory);

// Bytes of one layer's association block: A [h, F, E], z [h, F], statistics.
int64_t association_bytes(const ModelConfig& config);

// All device memory that the state refers to.
std::vector<BlockRef> blocks_of(const StreamState& state);

// Keeps blocks on the device for as long as it lives.
class InUse {
 public:
  InUse(Backend& backend, std::vector<BlockRef> blocks) : backend_(backend), blocks_(std::move(blocks)) {
    backend_.use(blocks_);
  }
  ~InUse() {
    backend_.let_go(blocks_);
    backend_.let_go(made_);
  }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;
  // Blocks of a state that were not in use from the start were made meanwhile.
  void add_made(const StreamState& state);

 private:
  Backend& backend_;
  std::vector<BlockRef> blocks_, made_;
};

// Overwrites with zeros what this state alone holds: memory, keys and values, hidden rows, token ids. Parts that a fork
// or checkpoint shares stay as they are.
void wipe_stream(Backend& backend, StreamState& state);

// Device bytes that this state holds, shared or not.
int64_t state_bytes(const Backend& backend, const StreamState& state);

}  // namespace armt
