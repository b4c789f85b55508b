// A stream's whole state in host memory, in a layout that no device decides.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "backend.h"
#include "engine/engine.h"
#include "engine/facts.h"
#include "engine/session.h"
#include "engine/stream.h"

namespace armt {

// One layer's associative memory; all empty until the first write.
struct LayerMemory {
  bool written = false;
  std::vector<float> a;  // [h, F, E], row-major
  std::vector<float> z;  // [h, F]; empty without use_denom
  std::array<float, kWriteStats> statistics{};
};

// Keys and values after rotation.
struct HostRows {
  std::vector<float> k, v;  // [rows, Hkv, c] each, row-major
};

struct HostLayer {
  LayerMemory memory;
  HostRows current;   // [current_rows(), ..]
  HostRows previous;  // [previous_rows(), ..]
};

struct HostState {
  StateFacts facts;
  std::vector<HostLayer> layers;
  std::vector<int32_t> open_tokens, previous_tokens;
  int64_t window_tokens = 0, position_base = 0, closed_segments = 0, tokens = 0;
  std::vector<float> carried;      // [m, D] or empty
  std::vector<float> last_hidden;  // [D] or empty
  SamplerState sampler;
  uint64_t version = 0;

  // Rows of the caches, the same in every layer: front rows and tokens.
  int64_t current_rows() const;
  int64_t previous_rows() const;
};

// Floats of each part of a state, from the model's settings.
struct StateShape {
  int64_t layers = 0;
  int64_t matrix = 0;      // A: h F E; 0 for RMT
  int64_t normaliser = 0;  // z: h F; 0 without use_denom
  int64_t row = 0;         // keys (or values) of one row: Hkv c
  int64_t hidden = 0;      // D
  int64_t carried = 0;     // m D; 0 but for RMT

  // StateError if a size is past 2^48.
  StateShape(const ModelConfig& config, const std::string& where);
};

StateFacts facts_of(const Engine& engine);

// StateError, headed by `where`, unless counters and token ids are possible for the model.
void check_counters(const HostState& state, const std::string& where);

HostState to_host(const Snapshot& snapshot);
LayerMemory layer_memory(const Snapshot& snapshot, int64_t layer);
std::vector<float> carried_memory(const Snapshot& snapshot);  // [m, D], or empty
int64_t host_bytes(const HostState& state);

// Uploads. StateError that names every fact in which the state's model differs from the engine's.
StreamState to_stream(Engine& engine, const HostState& state);

}  // namespace armt
