#include "engine/session.h"

#include <algorithm>
#include <limits>

#include "armt/error.h"

namespace armt {

// Holds one session for one thread; a second thread gets an error instead of a torn state.
class SessionLock {
 public:
  explicit SessionLock(const Session& session) : session_(session) {
    if (session.busy_.exchange(true, std::memory_order_acquire)) {
      throw StateError(
          "session: it is in use by another thread; give each thread a session of its own (fork() is cheap)");
    }
    if (session.closed()) {
      session.busy_.store(false, std::memory_order_release);
      throw StateError("session: it was closed; make a new one with engine.session()");
    }
  }
  ~SessionLock() { session_.busy_.store(false, std::memory_order_release); }
  SessionLock(const SessionLock&) = delete;
  SessionLock& operator=(const SessionLock&) = delete;

 private:
  const Session& session_;
};

namespace {

uint64_t next_session_id() {
  static std::atomic<uint64_t> next{1};
  return next.fetch_add(1);
}

constexpr int64_t kScoreRows = 32;  // rows of logits held at a time while scoring

const BlockRef& last_hidden_of(const StreamState& state) {
  if (!state.last_hidden) throw InvalidArgument("session: it has read no token yet; feed at least one");
  return state.last_hidden;
}

Job to_job(const Call& call, StreamState& state) {
  Job job;
  job.state = &state;
  job.tokens = call.tokens;
  job.logits = call.logits;
  job.grow = call.grow;
  job.windowed = call.windowed;
  job.cuts = call.cuts;
  job.attention = call.attention;
  job.close_last = call.one_segment || call.close_last;
  if (call.one_segment) {
    if (!state.open_tokens.empty()) job.cuts.push_back(std::ssize(state.open_tokens));
    job.cuts.push_back(std::ssize(call.tokens));
  }
  return job;
}

}  // namespace

Session::Session(std::shared_ptr<Engine> engine) : Session(engine, make_stream(engine->config())) {}

Session::Session(std::shared_ptr<Engine> engine, StreamState state)
    : engine_(std::move(engine)), state_(std::move(state)), id_(next_session_id()) {}

void Session::close_segment(const RunHooks& hooks) {
  SessionLock lock(*this);
  Job job;
  job.state = &state_;
  job.close_last = true;
  engine_->run({&job, 1}, hooks);
}

void Session::reset() {
  SessionLock lock(*this);
  const uint64_t version = state_.version;
  state_ = make_stream(engine_->config());
  state_.version = version + 1;
}

std::unique_ptr<Session> Session::fork() const {
  SessionLock lock(*this);
  return std::make_unique<Session>(engine_, state_);
}

Snapshot Session::snapshot() const {
  SessionLock lock(*this);
  return {engine_, state_, id_};
}

void Session::rollback(const Snapshot& snapshot) {
  SessionLock lock(*this);
  if (snapshot.session_id != id_) {
    throw StateError(
        "rollback: the checkpoint belongs to another session; to continue from it, make a session with "
        "engine.session(state=...)");
  }
  StreamState state = snapshot.state;  // copied before anything changes: the copy may find no memory
  state.version = state_.version + 1;
  state_ = std::move(state);
}

void Session::close(bool wipe) {
  SessionLock lock(*this);
  if (wipe) wipe_stream(engine_->backend(), state_);
  state_ = make_stream(engine_->config());
  closed_.store(true);
}

void Session::set_seed(uint64_t seed) {
  SessionLock lock(*this);
  state_.sampler = {.seed = seed, .drawn = 0};
}

void Session::last_logits(float* out) const {
  SessionLock lock(*this);
  engine_->logits_of({&last_hidden_of(state_), 1}, out);
}

Session::Progress Session::progress() const {
  SessionLock lock(*this);
  return {state_.tokens, state_.closed_segments, std::ssize(state_.open_tokens), state_.version};
}

void Session::score(std::span<const int32_t> tokens, bool write, double* out, const RunHooks& hooks) {
  SessionLock lock(*this);
  engine_->check_tokens(tokens);
  if (tokens.empty()) throw InvalidArgument("score: no tokens; expected at least one");
  const int64_t vocab = engine_->config().decoder.vocab_size;
  std::vector<float> logits(kScoreRows * vocab);
  out[0] = std::numeric_limits<double>::quiet_NaN();
  if (state_.last_hidden) {
    engine_->logits_of({&state_.last_hidden, 1}, logits.data());
    out[0] = log_probability({logits.data(), static_cast<size_t>(vocab)}, tokens[0]);
  }
  RunHooks scoring = hooks;
  scoring.rows = [&](const FinishedItem& item) {
    for (int64_t begin = 0; begin < item.tokens; begin += kScoreRows) {
      const int64_t count = std::min(kScoreRows, item.tokens - begin);
      engine_->backend().logits(item.normed, item.first + begin, count, logits.data());
      engine_->check_finite({logits.data(), static_cast<size_t>(count * vocab)}, "logits of scored tokens");
      for (int64_t i = 0; i < count; ++i) {
        const int64_t next = item.token_begin + begin + i + 1;
        if (next == std::ssize(tokens)) break;
        const std::span<const float> row(logits.data() + i * vocab, vocab);
        out[next] = log_probability(row, tokens[next]);
      }
    }
  };
  StreamState before = state_;
  Job job;
  job.state = &state_;
  job.tokens = tokens;
  job.logits = LogitsWanted::all;
  engine_->run({&job, 1}, scoring);
  if (!write) state_ = std::move(before);
}

void run_calls(Engine& engine, std::span<Call> calls, const RunHooks& hooks) {
  std::vector<std::unique_ptr<SessionLock>> locks;
  for (size_t i = 0; i < calls.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (calls[i].session != calls[j].session) continue;
      throw InvalidArgument("sessions: entries " + std::to_string(j) + " and " + std::to_string(i) +
                            " are the same session; fork it, or join their tokens");
    }
    if (calls[i].session->engine_.get() != &engine) {
      throw InvalidArgument("sessions: entry " + std::to_string(i) + " belongs to another engine");
    }
    locks.push_back(std::make_unique<SessionLock>(*calls[i].session));
  }

  std::vector<Job> jobs;
  std::vector<std::optional<StreamState>> restore;
  jobs.reserve(calls.size());
  for (Call& call : calls) {
    StreamState& state = call.session->state_;
    jobs.push_back(to_job(call, state));
    restore.push_back(call.write ? std::nullopt : std::optional(state));
  }
  const int64_t vocab = engine.config().decoder.vocab_size;
  RunHooks with_logits = hooks;
  with_logits.rows = [&](const FinishedItem& item) {
    const Call& call = calls[item.item.job - jobs.data()];
    if (call.logits == LogitsWanted::none || item.tokens == 0) return;
    const int64_t first = call.logits == LogitsWanted::all ? item.token_begin : 0;
    if (call.logits_block != nullptr) {
      const int64_t offset = first * vocab * static_cast<int64_t>(sizeof(float));
      engine.backend().logits(item.normed, item.first, item.tokens, *call.logits_block, offset);
      engine.check_finite({.block = call.logits_block, .offset = offset, .count = item.tokens * vocab}, "logits");
      return;
    }
    float* const out = call.logits_out + first * vocab;
    engine.backend().logits(item.normed, item.first, item.tokens, out);
    engine.check_finite({out, static_cast<size_t>(item.tokens * vocab)}, "logits");
  };
  engine.run(jobs, with_logits);
  for (size_t i = 0; i < calls.size(); ++i) {
    if (restore[i]) calls[i].session->state_ = std::move(*restore[i]);
  }
}

std::vector<Choice> choose_tokens(std::span<Session* const> sessions, std::span<const SamplingParams> params) {
  std::vector<std::unique_ptr<SessionLock>> locks;
  std::vector<BlockRef> hidden;
  for (size_t i = 0; i < sessions.size(); ++i) {
    params[i].validate();
    if (sessions[i]->engine_ != sessions[0]->engine_) {
      throw InvalidArgument("sessions: entry " + std::to_string(i) + " belongs to another engine");
    }
    locks.push_back(std::make_unique<SessionLock>(*sessions[i]));
    hidden.push_back(last_hidden_of(sessions[i]->state_));
  }
  Engine& engine = *sessions[0]->engine_;
  std::vector<size_t> on_device, on_host;
  for (size_t i = 0; i < sessions.size(); ++i) {
    const bool penalised = params[i].repetition_penalty != 1.0;
    (engine.backend().chooses() && !penalised ? on_device : on_host).push_back(i);
  }
  const auto hidden_of = [&](const std::vector<size_t>& rows) {
    std::vector<BlockRef> found;
    for (const size_t i : rows) found.push_back(hidden[i]);
    return found;
  };
  std::vector<Choice> choices(sessions.size());
  std::vector<SamplerState> samplers;  // counted in the sessions when all draws are done: all or nothing
  for (const Session* session : sessions) samplers.push_back(session->state_.sampler);
  if (!on_device.empty()) {
    std::vector<Draw> draws;
    for (const size_t i : on_device) draws.push_back(draw_of(params[i], samplers[i]));
    const std::vector<Choice> found = engine.choose_from(hidden_of(on_device), draws);
    for (size_t row = 0; row < found.size(); ++row) {
      const size_t i = on_device[row];
      choices[i] = found[row];
      samplers[i].drawn += params[i].temperature > 0.0;
    }
  }
  if (!on_host.empty()) {
    const int64_t vocab = engine.config().decoder.vocab_size;
    std::vector<float> logits(on_host.size() * vocab);
    engine.logits_of(hidden_of(on_host), logits.data());
    for (size_t row = 0; row < on_host.size(); ++row) {
      const size_t i = on_host[row];
      const StreamState& state = sessions[i]->state_;
      std::vector<int32_t> seen;
      if (params[i].repetition_penalty != 1.0) {
        seen = state.previous_tokens;
        seen.insert(seen.end(), state.open_tokens.begin(), state.open_tokens.end());
      }
      choices[i] =
          choose_token({logits.data() + row * vocab, static_cast<size_t>(vocab)}, params[i], seen, samplers[i]);
    }
  }
  for (size_t i = 0; i < sessions.size(); ++i) sessions[i]->state_.sampler = samplers[i];
  return choices;
}

}  // namespace armt
