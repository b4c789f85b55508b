// An engine: one model's weights on one device, shared by any number of sessions and threads.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "armt/config.h"
#include "backend.h"
#include "engine/fingerprint.h"
#include "engine/nonfinite.h"
#include "engine/plan.h"
#include "engine/stream.h"
#include "schedule/schedule.h"

namespace armt {

struct EngineOptions {
  BackendOptions backend;
  Schedule schedule = Schedule::automatic;
  OnNonfinite on_nonfinite = OnNonfinite::raise;
};

// Counters since the engine was made.
struct EngineStats {
  int64_t tokens = 0;
  int64_t segments = 0;
  int64_t calls = 0;
  double seconds = 0;          // inside run()
  std::vector<double> recent;  // seconds of the last kRecentCalls calls, in no order
  double last = 0;             // seconds of the last one
  int64_t nonfinite = 0;       // values found that are no finite numbers
  static constexpr int64_t kRecentCalls = 1024;
};

struct RunHooks {
  // Called between waves with the tokens done so far in this call; may throw Interrupted.
  std::function<void(int64_t tokens_done)> progress;
  // Called for each finished piece with its final-norm rows, before they are overwritten.
  std::function<void(const FinishedItem&)> rows;
};

class Engine {
 public:
  Engine(const ModelConfig& config, const EngineOptions& options);

  // Loading: every matrix and vector that the configuration calls for, once, then finish_loading().
  void load(Matrix which, int64_t layer, const HostMatrix& matrix);
  void load(Vector which, int64_t layer, std::span<const float> values);
  void finish_loading();  // CheckpointError that lists what is missing

  const ModelConfig& config() const { return config_; }
  const EngineOptions& options() const { return options_; }
  Backend& backend() const { return *backend_; }
  // Of all weights loaded; state files hold it.
  const std::string& fingerprint() const { return fingerprint_; }

  // Reads the jobs' tokens into their streams. All or nothing: after an exception every stream is as it was before.
  // Jobs must name distinct streams. Thread-safe for distinct streams.
  void run(std::span<Job> jobs, const RunHooks& hooks = {});

  // [rows of `hidden` blocks, vocab]: logits of kept hidden rows.
  void logits_of(std::span<const BlockRef> hidden, float* out);

  // The next token of each, where the backend chooses.
  std::vector<Choice> choose_from(std::span<const BlockRef> hidden, std::span<const Draw> draws);

  // Rejects ids outside the vocabulary, naming the first.
  void check_tokens(std::span<const int32_t> tokens) const;

  // Of values that a caller will get.
  void check_finite(std::span<const float> values, const char* what) { nonfinite_.check(values, what); }
  void check_finite(const Floats& values, const char* what) { nonfinite_.check(*backend_, values, what); }

  EngineStats stats() const;

 private:
  class WorkspaceLease;
  std::unique_ptr<Workspace> take_workspace(int64_t slots, int64_t slot_rows);
  void give_workspace(std::unique_ptr<Workspace> workspace);
  void run_in(Workspace& workspace, Planner& planner, int64_t in_flight, const RunHooks& hooks);
  void keep_rows(const FinishedItem& item);
  void count(std::span<const Job> jobs, std::span<const StreamState> before,
             std::chrono::steady_clock::time_point start);

  ModelConfig config_;
  EngineOptions options_;
  std::unique_ptr<Backend> backend_;
  std::set<std::pair<int, int64_t>> loaded_;  // (matrix, or 100 + vector; layer)
  NonfiniteWatch nonfinite_;
  Fingerprint weights_seen_;
  std::string fingerprint_;
  std::mutex workspace_mutex_;
  std::vector<std::unique_ptr<Workspace>> workspaces_;
  mutable std::mutex stats_mutex_;
  EngineStats stats_;
};

}  // namespace armt
