// Sessions: random sequences of everything that can be done to them, against one expectation: a stream's whole state,
// byte for byte, is that of a fresh session which reads the same tokens one at a time and closes segments at the same
// places. What fails leaves the state as it was.
#include <algorithm>
#include <cmath>

#include "checkpoint/state_file.h"
#include "common.h"

namespace {

using namespace armt;
using fuzz::Bytes;
using fuzz::require;

constexpr size_t kMostSessions = 4;
constexpr size_t kMostEvents = 48;  // of one stream; replaying them is what an input costs
constexpr int32_t kClose = -1;

struct Event {
  int32_t token = kClose;
  bool grow = false;
};

struct Stream {
  std::unique_ptr<Session> session;
  std::vector<Event> events;
  struct Saved {
    Snapshot snapshot;
    std::vector<Event> events;
  };
  std::optional<Saved> checkpoint;
};

// The state as bytes, without what its reading history decides: the version and the draws.
std::vector<uint8_t> bytes_of(const Session& session) {
  HostState state = to_host(session.snapshot());
  state.version = 0;
  state.sampler = {};
  std::vector<uint8_t> bytes(static_cast<size_t>(encoded_bytes(state)));
  encode(state, bytes);
  return bytes;
}

struct Stop {};

class Run {
 public:
  Run(Bytes in, const std::shared_ptr<Engine>& engine, const std::shared_ptr<Engine>& other)
      : in_(in), engine_(engine), other_(other) {
    streams_.push_back({std::make_unique<Session>(engine_)});
  }

  void go() {
    for (int step = 0; step < 24 && !in_.empty() && !streams_.empty(); ++step) one();
    for (Stream& stream : streams_) check(stream);
  }

 private:
  int64_t vocab() const { return engine_->config().decoder.vocab_size; }
  Stream& any() { return streams_[static_cast<size_t>(in_.below(std::ssize(streams_)))]; }

  std::vector<int32_t> tokens(int64_t most) {
    std::vector<int32_t> ids(static_cast<size_t>(1 + in_.below(most)));
    for (int32_t& id : ids) id = static_cast<int32_t>(in_.below(vocab()));
    return ids;
  }

  // Replays the events in the other engine (another schedule, the same weights).
  void check(Stream& stream) {
    Session fresh(other_);
    for (const Event& event : stream.events) {
      if (event.token == kClose) {
        fresh.close_segment({});
      } else {
        Call call{.session = &fresh, .tokens = {&event.token, 1}, .grow = event.grow};
        run_calls(*other_, {&call, 1});
      }
    }
    require(bytes_of(fresh) == bytes_of(*stream.session), "the state is that of reading token by token");
    if (stream.events.empty() || stream.session->progress().tokens == 0) return;
    std::vector<float> mine(static_cast<size_t>(vocab())), theirs(mine.size());
    stream.session->last_logits(mine.data());
    fresh.last_logits(theirs.data());
    require(std::memcmp(mine.data(), theirs.data(), mine.size() * 4) == 0, "the logits are those of the same tokens");
    for (const float value : mine) require(std::isfinite(value), "the logits are numbers");
  }

  void add(Stream& stream, std::span<const int32_t> ids, bool grow = false) {
    for (const int32_t id : ids) stream.events.push_back({id, grow});
  }

  // Runs calls; if they fail with a typed error, the sessions are as they were.
  bool run(std::span<Call> calls, const RunHooks& hooks = {}) {
    std::vector<std::vector<uint8_t>> before;
    for (const Call& call : calls) before.push_back(bytes_of(*call.session));
    bool done = false;
    try {
      run_calls(*engine_, calls, hooks);
      done = true;
    } catch (const Error&) {
    } catch (const Stop&) {
    }
    for (size_t i = 0; i < calls.size(); ++i) {
      if (done && calls[i].write) continue;
      require(bytes_of(*calls[i].session) == before[i], "a call that failed or only asked changes nothing");
    }
    return done;
  }

  void feed(bool grow, bool write) {
    Stream& stream = any();
    const auto ids = tokens(grow ? 6 : 14);
    Call call{.session = stream.session.get(), .tokens = ids, .write = write, .grow = grow};
    if (run({&call, 1}) && write) add(stream, ids, grow);
  }

  void step() {
    Stream& stream = any();
    const auto ids = tokens(engine_->config().memory.segment_size);
    Call call{.session = stream.session.get(), .tokens = ids, .one_segment = true};
    if (stream.session->progress().open_tokens > 0) stream.events.push_back({});
    const size_t events = stream.events.size();
    if (run({&call, 1})) {
      add(stream, ids);
      stream.events.push_back({});
    } else if (events > 0 && stream.session->progress().open_tokens > 0) {
      stream.events.pop_back();
    }
  }

  void together() {
    std::vector<std::vector<int32_t>> ids;
    std::vector<Call> calls;
    for (size_t i = 0; i < streams_.size(); ++i) ids.push_back(tokens(9));
    for (size_t i = 0; i < streams_.size(); ++i)
      calls.push_back({.session = streams_[i].session.get(), .tokens = ids[i]});
    if (!run(calls)) return;
    for (size_t i = 0; i < streams_.size(); ++i) add(streams_[i], ids[i]);
  }

  void interrupted() {
    Stream& stream = any();
    const auto ids = tokens(14);
    int64_t left = in_.below(4);
    RunHooks hooks;
    hooks.progress = [&](int64_t) {
      if (left-- == 0) throw Stop();
    };
    Call call{.session = stream.session.get(), .tokens = ids};
    if (run({&call, 1}, hooks)) add(stream, ids);
  }

  void wrong() {
    Stream& stream = any();
    std::vector<int32_t> ids = tokens(9);
    ids.back() = in_.flag() ? -1 : static_cast<int32_t>(vocab());
    Call call{.session = stream.session.get(), .tokens = ids};
    require(!run({&call, 1}), "an id outside the vocabulary is an error");
    std::vector<int32_t> one = {0};
    std::vector<Call> twice(2, Call{.session = stream.session.get(), .tokens = one});
    require(!run(twice), "one session twice is an error");
  }

  void generate() {
    Stream& stream = any();
    if (stream.session->progress().tokens == 0) return;
    SamplingParams params;
    if (in_.flag()) params = {.temperature = 0.1 + in_.byte() / 64.0, .top_k = in_.below(5), .top_p = 0.9};
    const bool grow = in_.below(4) == 0;
    for (int64_t left = in_.below(6); left >= 0; --left) {
      Session* const pointer = stream.session.get();
      const int32_t token = choose_tokens({&pointer, 1}, {&params, 1})[0].token;
      require(token >= 0 && token < vocab(), "a chosen token is in the vocabulary");
      Call call{.session = pointer, .tokens = {&token, 1}, .grow = grow};
      if (!run({&call, 1})) return;
      stream.events.push_back({token, grow});
    }
  }

  void score() {
    Stream& stream = any();
    const auto ids = tokens(9);
    const bool write = in_.flag();
    const std::vector<uint8_t> before = bytes_of(*stream.session);
    std::vector<double> scores(ids.size());
    try {
      stream.session->score(ids, write, scores.data(), {});
    } catch (const Error&) {
      return require(bytes_of(*stream.session) == before, "scoring that failed changes nothing");
    }
    for (size_t i = 1; i < ids.size(); ++i) require(scores[i] <= 0, "a log-likelihood is not positive");
    if (write) {
      add(stream, ids);
    } else {
      require(bytes_of(*stream.session) == before, "scoring without writing changes nothing");
    }
  }

  void fork() {
    if (streams_.size() == kMostSessions) return;
    Stream& stream = any();
    Stream copy{stream.session->fork(), stream.events};
    streams_.push_back(std::move(copy));
  }

  void checkpoint() {
    Stream& stream = any();
    stream.checkpoint = Stream::Saved{stream.session->snapshot(), stream.events};
  }

  void rollback() {
    Stream& stream = any();
    Stream& from = any();
    if (!from.checkpoint) return;
    const bool own = &from == &stream;
    try {
      stream.session->rollback(from.checkpoint->snapshot);
      require(own, "a checkpoint of another session is refused");
      stream.events = from.checkpoint->events;
    } catch (const StateError&) {
      require(!own, "a session takes its own checkpoint");
    }
  }

  // Through bytes, into the same engine or another.
  void save_and_load() {
    Stream& stream = any();
    const HostState state = to_host(stream.session->snapshot());
    std::vector<uint8_t> bytes(static_cast<size_t>(encoded_bytes(state)));
    encode(state, bytes);
    stream.session = std::make_unique<Session>(engine_, to_stream(*engine_, decode(bytes)));
    stream.checkpoint.reset();
  }

  void close_segment() {
    Stream& stream = any();
    const bool open = stream.session->progress().open_tokens > 0;
    const std::vector<uint8_t> before = bytes_of(*stream.session);
    try {
      stream.session->close_segment({});
      if (open) stream.events.push_back({});
    } catch (const Error&) {  // grown so long that the memory tokens have no position left
      require(bytes_of(*stream.session) == before, "a close that failed changes nothing");
    }
  }

  void close_one() {
    if (streams_.size() == 1) return;
    const auto at = in_.below(std::ssize(streams_));
    Session& session = *streams_[static_cast<size_t>(at)].session;
    check(streams_[static_cast<size_t>(at)]);
    session.close();
    try {
      session.progress();
      require(false, "a closed session is an error");
    } catch (const StateError&) {
    }
    streams_.erase(streams_.begin() + at);
  }

  void one() {
    for (const Stream& stream : streams_) {
      if (stream.events.size() > kMostEvents) return reset(stream);
    }
    switch (in_.below(16)) {
      case 0:
      case 1:
        return feed(false, true);
      case 2:
        return feed(false, false);
      case 3:
        return feed(true, true);
      case 4:
        return step();
      case 5:
        return together();
      case 6:
        return interrupted();
      case 7:
        return wrong();
      case 8:
        return generate();
      case 9:
        return score();
      case 10:
        return fork();
      case 11:
        return checkpoint();
      case 12:
        return rollback();
      case 13:
        return save_and_load();
      case 14:
        return close_one();
      default:
        return close_segment();
    }
  }

  void reset(const Stream& of) {
    Stream& stream = const_cast<Stream&>(of);
    check(stream);
    stream.session->reset();
    stream.events.clear();
  }

  Bytes in_;
  const std::shared_ptr<Engine>& engine_;
  const std::shared_ptr<Engine>& other_;
  std::vector<Stream> streams_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static std::shared_ptr<Engine> engines[fuzz::kModels][2];
  Bytes in(data, size);
  const auto model = in.below(fuzz::kModels);
  auto& [diagonal, sequential] = engines[model];
  if (!diagonal) {
    diagonal = fuzz::make_engine(fuzz::model(model), Schedule::diagonal);
    sequential = fuzz::make_engine(fuzz::model(model), Schedule::sequential);
  }
  Run(in, in.flag() ? diagonal : sequential, in.flag() ? diagonal : sequential).go();
  return 0;
}
