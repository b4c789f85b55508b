#include "engine/engine.h"

#include <algorithm>
#include <iterator>
#include <thread>

#include "armt/error.h"

namespace armt {
namespace {

constexpr int kVectorKey = 100;

struct Required {
  const char* name;
  int key;
  bool per_layer;
};

std::vector<Required> required_tensors(const ModelConfig& config) {
  std::vector<Required> all = {
      {"qkv", int(Matrix::qkv), true},
      {"attn_out", int(Matrix::attn_out), true},
      {"mlp_up", int(Matrix::mlp_up), true},
      {"mlp_down", int(Matrix::mlp_down), true},
      {"embedding", int(Matrix::embedding), false},
      {"memory", int(Matrix::memory), false},
      {"norm1", kVectorKey + int(Vector::norm1), true},
      {"norm2", kVectorKey + int(Vector::norm2), true},
      {"final_norm", kVectorKey + int(Vector::final_norm), false},
  };
  if (config.has_association()) {
    all.push_back({"mem_query", int(Matrix::mem_query), true});
    all.push_back({"mem_key", int(Matrix::mem_key), true});
    all.push_back({"mem_value", int(Matrix::mem_value), true});
    all.push_back({"mem_gate", int(Matrix::mem_gate), true});
    all.push_back({"mem_gate_bias", kVectorKey + int(Vector::mem_gate_bias), true});
  }
  if (config.memory.use_sink) all.push_back({"sink", int(Matrix::sink), false});
  if (config.decoder.learned_positions > 0) all.push_back({"positions", int(Matrix::positions), false});
  if (config.decoder.qk_norm) {
    all.push_back({"q_norm", kVectorKey + int(Vector::q_norm), true});
    all.push_back({"k_norm", kVectorKey + int(Vector::k_norm), true});
  }
  return all;
}

}  // namespace

Engine::Engine(const ModelConfig& config, const EngineOptions& options)
    : config_(config), options_(options), nonfinite_(options.on_nonfinite) {
  config_.validate();
  if (options_.backend.threads < 0 || options_.backend.threads > 1024) {
    throw InvalidArgument("threads: found " + std::to_string(options_.backend.threads) +
                          ", expected 0 (all cores) to 1024");
  }
  if (options_.backend.threads == 0) {
    options_.backend.threads = std::max(1u, std::thread::hardware_concurrency());
  }
  backend_ = make_backend(config_, options_.backend);
}

void Engine::load(Matrix which, int64_t layer, const HostMatrix& matrix) {
  backend_->load(which, layer, matrix);
  loaded_.insert({static_cast<int>(which), layer});
  weights_seen_.add(which, layer, matrix);
}

void Engine::load(Vector which, int64_t layer, std::span<const float> values) {
  backend_->load(which, layer, values);
  loaded_.insert({kVectorKey + static_cast<int>(which), layer});
  weights_seen_.add(which, layer, values);
}

void Engine::finish_loading() {
  std::string missing;
  for (const Required& tensor : required_tensors(config_)) {
    const int64_t layers = tensor.per_layer ? config_.decoder.n_layers : 1;
    for (int64_t layer = 0; layer < layers; ++layer) {
      if (loaded_.contains({tensor.key, layer})) continue;
      missing += std::string("\n  - ") + tensor.name + (tensor.per_layer ? ", layer " + std::to_string(layer) : "");
    }
  }
  if (!missing.empty()) throw CheckpointError("weights: missing tensors:" + missing);
  backend_->finish_loading();
  fingerprint_ = weights_seen_.hex();
}

// Gives the workspace back however the call ends.
class Engine::WorkspaceLease {
 public:
  WorkspaceLease(Engine& engine, int64_t slots, int64_t slot_rows)
      : engine_(engine), workspace_(engine.take_workspace(slots, slot_rows)) {}
  ~WorkspaceLease() { engine_.give_workspace(std::move(workspace_)); }
  WorkspaceLease(const WorkspaceLease&) = delete;
  WorkspaceLease& operator=(const WorkspaceLease&) = delete;
  Workspace& operator*() { return *workspace_; }

 private:
  Engine& engine_;
  std::unique_ptr<Workspace> workspace_;
};

std::unique_ptr<Workspace> Engine::take_workspace(int64_t slots, int64_t slot_rows) {
  {
    std::lock_guard lock(workspace_mutex_);
    for (auto it = workspaces_.begin(); it != workspaces_.end(); ++it) {
      if ((*it)->slots < slots || (*it)->slot_rows < slot_rows) continue;
      auto found = std::move(*it);
      workspaces_.erase(it);
      return found;
    }
    // One that is too small will not be wanted again soon; its memory serves the larger one.
    if (!workspaces_.empty()) workspaces_.pop_back();
  }
  return backend_->make_workspace(slots, slot_rows);
}

void Engine::give_workspace(std::unique_ptr<Workspace> workspace) {
  if (!workspace) return;
  std::lock_guard lock(workspace_mutex_);
  if (std::ssize(workspaces_) < options_.backend.threads) workspaces_.push_back(std::move(workspace));
}

void Engine::check_tokens(std::span<const int32_t> tokens) const {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] >= 0 && tokens[i] < config_.decoder.vocab_size) continue;
    throw InvalidArgument("token ids: found " + std::to_string(tokens[i]) + " at position " + std::to_string(i) +
                          ", expected 0 .. " + std::to_string(config_.decoder.vocab_size - 1) +
                          "; was the text encoded with this model's tokenizer?");
  }
}

void Engine::run(std::span<Job> jobs, const RunHooks& hooks) {
  const auto start = std::chrono::steady_clock::now();
  for (const Job& job : jobs) check_tokens(job.tokens);
  std::vector<StreamState> before;
  before.reserve(jobs.size());
  for (const Job& job : jobs) before.push_back(*job.state);
  std::vector<BlockRef> blocks;
  for (const Job& job : jobs) {
    if (backend_->spills()) std::ranges::move(blocks_of(*job.state), std::back_inserter(blocks));
  }
  InUse in_use(*backend_, std::move(blocks));
  try {
    Planner planner(config_, jobs);
    if (planner.done()) return;
    const int64_t in_flight = waves_in_flight(*backend_, config_, planner, options_.schedule);
    WorkspaceLease workspace(*this, in_flight, planner.max_wave_rows());
    run_in(*workspace, planner, in_flight, hooks);
    std::vector<Written> written;
    for (size_t i = 0; i < jobs.size(); ++i) {
      const int64_t first = before[i].closed_segments;
      if (jobs[i].state->closed_segments > first) written.push_back({.state = jobs[i].state, .first = first});
    }
    nonfinite_.check_written(*backend_, config_, written);
    for (const Job& job : jobs) {
      ++job.state->version;
      for (LayerState& layer : job.state->layers) {
        trim_rows(*backend_, layer.current);
        trim_rows(*backend_, layer.previous);
      }
      if (backend_->spills()) in_use.add_made(*job.state);
    }
  } catch (...) {
    for (size_t i = 0; i < jobs.size(); ++i) *jobs[i].state = std::move(before[i]);
    throw;
  }
  count(jobs, before, start);
}

void Engine::run_in(Workspace& workspace, Planner& planner, int64_t in_flight, const RunHooks& hooks) {
  int64_t tokens_done = 0;
  const ScheduleHooks schedule_hooks = {
      .finished =
          [&](const FinishedItem& item) {
            keep_rows(item);
            if (hooks.rows) hooks.rows(item);
          },
      .progressed =
          [&](int64_t tokens) {
            tokens_done += tokens;
            if (hooks.progress) hooks.progress(tokens_done);
          },
  };
  run_waves(*backend_, config_, workspace, planner, in_flight, schedule_hooks);
}

void Engine::keep_rows(const FinishedItem& item) {
  StreamState& state = *item.item.job->state;
  const int64_t width = config_.decoder.d_model;
  if (item.item.last_of_job && item.tokens > 0) {
    state.last_hidden = backend_->allocate(width * static_cast<int64_t>(sizeof(float)));
    backend_->save_rows(item.normed, item.first + item.tokens - 1, 1, *state.last_hidden);
  }
  if (config_.recurrent_tokens() && item.item.memory_rows > 0) {
    const int64_t rows = item.item.memory_rows;
    state.carried = backend_->allocate(rows * width * static_cast<int64_t>(sizeof(float)));
    backend_->save_rows(item.normed, item.first + item.tokens, rows, *state.carried);
  }
}

void Engine::logits_of(std::span<const BlockRef> hidden, float* out) {
  const auto count = std::ssize(hidden);
  const InUse in_use(*backend_, {hidden.begin(), hidden.end()});
  WorkspaceLease workspace(*this, 1, count);
  const Rows& normed = (*workspace).normed;
  for (int64_t i = 0; i < count; ++i) backend_->load_rows(*hidden[i], 1, normed, i);
  backend_->logits(normed, 0, count, out);
  check_finite({out, static_cast<size_t>(count * config_.decoder.vocab_size)}, "logits of the last token");
}

std::vector<Choice> Engine::choose_from(std::span<const BlockRef> hidden, std::span<const Draw> draws) {
  const auto count = std::ssize(hidden);
  const InUse in_use(*backend_, {hidden.begin(), hidden.end()});
  WorkspaceLease workspace(*this, 1, count);
  const Rows& normed = (*workspace).normed;
  for (int64_t i = 0; i < count; ++i) backend_->load_rows(*hidden[i], 1, normed, i);
  std::vector<Choice> choices(hidden.size());
  backend_->choose(normed, 0, draws, choices.data());
  std::vector<float> logprobs;
  for (const Choice& choice : choices) logprobs.push_back(static_cast<float>(choice.logprob));
  check_finite(logprobs, "log probability of the chosen token");
  return choices;
}

void Engine::count(std::span<const Job> jobs, std::span<const StreamState> before,
                   std::chrono::steady_clock::time_point start) {
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  std::lock_guard lock(stats_mutex_);
  const auto slot = static_cast<size_t>(stats_.calls++ % EngineStats::kRecentCalls);
  if (slot == stats_.recent.size()) stats_.recent.emplace_back();
  stats_.last = stats_.recent[slot] = elapsed.count();
  stats_.seconds += stats_.last;
  for (size_t i = 0; i < jobs.size(); ++i) {
    stats_.tokens += jobs[i].state->tokens - before[i].tokens;
    stats_.segments += jobs[i].state->closed_segments - before[i].closed_segments;
  }
}

EngineStats Engine::stats() const {
  std::lock_guard lock(stats_mutex_);
  EngineStats stats = stats_;
  stats.nonfinite = nonfinite_.seen();
  return stats;
}

}  // namespace armt
