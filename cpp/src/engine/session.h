// A session: one stream over a shared engine, safe to use from one thread at a time and checked to be.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/sampler.h"

namespace armt {

class Session;

// A frozen copy of a stream. It shares device memory with the session until that moves on.
struct Snapshot {
  std::shared_ptr<Engine> engine;
  StreamState state;
  uint64_t session_id = 0;  // whose checkpoint this is; 0: nobody's (loaded, or taken as a value)
};

// One session's part of a call.
struct Call {
  Session* session = nullptr;
  std::span<const int32_t> tokens;
  LogitsWanted logits = LogitsWanted::none;
  float* logits_out = nullptr;    // `last`: [vocab]; `all`: [tokens, vocab]
  Block* logits_block = nullptr;  // the same on the device, in place of logits_out
  bool one_segment = false;       // step: the tokens are one whole segment, closed at the end
  bool write = true;              // false: the session is left as it was
  bool grow = false;
  bool windowed = true;
  bool close_last = false;         // forward: close the last segment
  std::vector<int64_t> cuts;       // forward: segment lengths
  std::vector<uint8_t> attention;  // forward: [tokens]
};

class Session {
 public:
  explicit Session(std::shared_ptr<Engine> engine);
  Session(std::shared_ptr<Engine> engine, StreamState state);

  const std::shared_ptr<Engine>& engine() const { return engine_; }
  uint64_t id() const { return id_; }

  void close_segment(const RunHooks& hooks);
  void reset();
  std::unique_ptr<Session> fork() const;
  Snapshot snapshot() const;
  void rollback(const Snapshot& snapshot);  // StateError unless it is a checkpoint of this session
  // Frees the stream, with `wipe` overwritten first; every later use is a StateError.
  void close(bool wipe = false);
  bool closed() const { return closed_.load(); }
  void set_seed(uint64_t seed);
  void last_logits(float* out) const;  // [vocab], of the last token read; InvalidArgument before the first

  struct Progress {
    int64_t tokens, closed_segments, open_tokens;
    uint64_t version;
  };
  Progress progress() const;

  // Log-likelihood of each token given all before it: [tokens] (the first is NaN if the stream is empty). Reads the
  // tokens into the session with memory of one segment.
  void score(std::span<const int32_t> tokens, bool write, double* out, const RunHooks& hooks);

 private:
  friend class SessionLock;
  friend void run_calls(Engine& engine, std::span<Call> calls, const RunHooks& hooks);
  friend std::vector<Choice> choose_tokens(std::span<Session* const> sessions, std::span<const SamplingParams> params);

  std::shared_ptr<Engine> engine_;
  StreamState state_;
  uint64_t id_;
  mutable std::atomic<bool> busy_{false};
  std::atomic<bool> closed_{false};
};

// Runs all calls in one batched pass, all or nothing. The sessions are distinct and of this engine.
void run_calls(Engine& engine, std::span<Call> calls, const RunHooks& hooks = {});

// The next token of each session from its last token's logits; a sampler draw is counted in the session, nothing is
// fed.
std::vector<Choice> choose_tokens(std::span<Session* const> sessions, std::span<const SamplingParams> params);

}  // namespace armt
