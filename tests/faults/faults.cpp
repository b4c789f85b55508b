// Loading, reading tokens, choosing, forking, saving and restoring, with every allocation and every file operation
// failing in turn. Each fault must give a typed error (std::bad_alloc becomes OutOfMemory in Python), leave the session
// and the old file as they were, lose no memory and no descriptor; and the same call must succeed afterwards.
#include <dirent.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <functional>
#include <iterator>
#include <new>
#include <string>
#include <vector>

#include "checkpoint/state_file.h"
#include "checkpoint_bytes.h"
#include "inject.h"

#if defined(__SANITIZE_ADDRESS__) || (defined(__has_feature) && __has_feature(address_sanitizer))
#include <sanitizer/lsan_interface.h>
static bool leaks() {
  return __lsan_do_recoverable_leak_check() != 0;
}
#else
static bool leaks() {
  return false;
}
#endif

namespace {

using armt::Engine;
using armt::Session;
using faults::What;
using fuzz::require;

std::string folder;  // for files

std::vector<uint8_t> bytes_of(const Session& session) {
  const armt::HostState state = armt::to_host(session.snapshot());
  std::vector<uint8_t> bytes(static_cast<size_t>(armt::encoded_bytes(state)));
  armt::encode(state, bytes);
  return bytes;
}

std::vector<uint8_t> file_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

int64_t entries(const char* path) {
  DIR* const listing = ::opendir(path);
  require(listing != nullptr, "a folder can be listed");
  int64_t count = 0;
  while (::readdir(listing) != nullptr) ++count;
  ::closedir(listing);
  return count;
}

// What is done under faults, and what must hold after a failure and after a success.
struct Scenario {
  const char* name;
  std::function<void()> start;
  std::function<void()> act;
  std::function<void()> unharmed;
  std::function<void()> done;
};

// Whether the call was completed in spite of the fault, or without meeting it.
bool attempt(const Scenario& scenario) {
  try {
    scenario.act();
    return true;
  } catch (const armt::Error&) {
  } catch (const std::bad_alloc&) {
  }
  return false;
}

int64_t try_all(const Scenario& scenario, What what) {
  for (int64_t number = 0;; ++number) {
    scenario.start();
    const int64_t descriptors = entries("/proc/self/fd"), files = entries(folder.c_str());
    faults::arm(what, number);
    const bool completed = attempt(scenario);
    const bool met = faults::disarm();
    require(completed || met, "nothing fails without a fault");
    require(entries("/proc/self/fd") == descriptors, "no descriptor is lost");
    if (!completed) {
      require(entries(folder.c_str()) == files, "no file is left behind");
      scenario.unharmed();
      scenario.act();
    }
    scenario.done();
    if (!met) return number;
  }
}

void run(const Scenario& scenario, bool files) {
  std::string line = std::string(scenario.name) + ":";
  const auto note = [&](const char* what, int64_t count) { line += " " + std::to_string(count) + what; };
  note(" allocations alone,", try_all(scenario, What::allocation));
  note(" allocations and all after them,", try_all(scenario, What::allocations));
  if (files) {
    note(" file operations,", try_all(scenario, What::file));
    note(" on a full disk,", try_all(scenario, What::full));
    scenario.start();
    faults::arm(What::stuttering, 0);
    scenario.act();
    faults::disarm();
    scenario.done();
  }
  require(!leaks(), "no memory is lost");
  std::printf("%s no harm\n", line.c_str());
}

std::shared_ptr<Engine> loaded(const std::string& path, int64_t model, int64_t threads) {
  const armt::SafetensorsFile file(path);
  armt::EngineOptions options;
  options.backend.threads = threads;
  options.backend.isa = "baseline";
  auto engine = std::make_shared<Engine>(fuzz::model(model), options);
  for (const armt::StoredTensor& tensor : file.tensors()) fuzz::load_one(*engine, file, tensor);
  engine->finish_loading();
  return engine;
}

std::vector<float> read(Session& session, std::span<const int32_t> ids) {
  std::vector<float> logits(ids.size() * static_cast<size_t>(session.engine()->config().decoder.vocab_size));
  armt::Call call{.session = &session, .tokens = ids};
  call.logits = armt::LogitsWanted::all;
  call.logits_out = logits.data();
  armt::run_calls(*session.engine(), {&call, 1});
  return logits;
}

const std::vector<int32_t> kBegin = {1, 2, 3, 4, 5, 6}, kMore = {7, 8, 9, 10, 11, 12, 0, 1, 2};

void nothing() {}

void load_scenario(int64_t model, int64_t threads) {
  const std::string path = folder + "/model.safetensors";
  const std::vector<uint8_t> file = fuzz::right_file(fuzz::model(model));
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(file.data()), std::ssize(file));
  const std::string expected = loaded(path, model, threads)->fingerprint();
  std::string found;
  run({.name = "load",
       .start = nothing,
       .act = [&] { found = loaded(path, model, threads)->fingerprint(); },
       .unharmed = nothing,
       .done = [&] { require(found == expected, "the engine is whole"); }},
      true);
}

// One session in the middle of a segment, and a copy of its state that shares the memory.
class Bench {
 public:
  explicit Bench(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) {
    Session first(engine_);
    read(first, kBegin);
    begin_ = first.snapshot();
    start();
    before_ = bytes_of(*session_);
    logits_ = read(*session_, kMore);
    after_ = bytes_of(*session_);
  }

  void feed() {
    std::vector<float> found;
    run({.name = "feed",
         .start = [&] { start(); },
         .act = [&] { found = read(*session_, kMore); },
         .unharmed = [&] { unharmed(); },
         .done =
             [&] {
               require(found == logits_, "the same logits as ever");
               require(bytes_of(*session_) == after_, "the same state as ever");
             }},
        false);
  }

  void close_and_score() {
    std::vector<double> scores(kMore.size());
    run({.name = "close, score",
         .start = [&] { start(); },
         .act = [&] { session_->score(kMore, false, scores.data(), {}); },
         .unharmed = [&] { unharmed(); },
         .done = [&] { unharmed(); }},
        false);
    run({.name = "close",
         .start = [&] { start(); },
         .act = [&] { session_->close_segment({}); },
         .unharmed = [&] { unharmed(); },
         .done = [&] { require(session_->progress().open_tokens == 0, "the segment is closed"); }},
        false);
  }

  void choose() {
    const armt::SamplingParams params{.temperature = 0.8, .repetition_penalty = 1.1};
    armt::Choice choice;
    const auto draw = [&] {
      Session* const pointer = session_.get();
      choice = armt::choose_tokens({&pointer, 1}, {&params, 1})[0];
    };
    start();
    draw();
    const armt::Choice expected = choice;
    run({.name = "choose",
         .start = [&] { start(); },
         .act = draw,
         .unharmed = [&] { unharmed(); },
         .done = [&] { require(choice.token == expected.token, "the same draw as ever"); }},
        false);
  }

  void fork_and_rollback() {
    std::unique_ptr<Session> copy;
    run({.name = "fork",
         .start =
             [&] {
               start();
               copy.reset();
             },
         .act = [&] { copy = session_->fork(); },
         .unharmed = [&] { unharmed(); },
         .done = [&] { require(bytes_of(*copy) == bytes_of(*session_), "the copy is alike"); }},
        false);
    armt::Snapshot point;
    run({.name = "rollback",
         .start =
             [&] {
               start();
               point = session_->snapshot();
               session_->reset();
             },
         .act = [&] { session_->rollback(point); },
         .unharmed = [&] { require(session_->progress().tokens == 0, "the session is as before"); },
         .done = [&] { require(session_->progress().tokens == std::ssize(kBegin), "it went back"); }},
        false);
  }

  void save_and_load() {
    const std::string path = folder + "/book.armt-state";
    const std::vector<uint8_t> old(100, 7);
    start();
    const auto state = [&] { return armt::to_host(session_->snapshot()); };
    run({.name = "save",
         .start = [&] { std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(old.data()), 100); },
         .act =
             [&] {
               const armt::HostState host = state();
               std::vector<uint8_t> bytes(static_cast<size_t>(armt::encoded_bytes(host)));
               armt::encode(host, bytes);
               armt::save_file(path, bytes);
             },
         .unharmed =
             [&] {
               const auto found = file_bytes(path);
               require(found == old || found == before_, "the old file or the new one, whole");
               unharmed();
             },
         .done = [&] { require(file_bytes(path) == before_, "the new file, whole"); }},
        true);
    std::unique_ptr<Session> continued;
    run({.name = "restore",
         .start = [&] { continued.reset(); },
         .act =
             [&] {
               armt::StreamState stream = armt::to_stream(*engine_, armt::load_file(path));
               continued = std::make_unique<Session>(engine_, std::move(stream));
             },
         .unharmed = [&] { require(file_bytes(path) == before_, "the file is as before"); },
         .done = [&] { require(bytes_of(*continued) == before_, "the state came back"); }},
        true);
  }

 private:
  void start() { session_ = std::make_unique<Session>(engine_, begin_.state); }
  void unharmed() { require(bytes_of(*session_) == before_, "the session is as before"); }

  std::shared_ptr<Engine> engine_;
  std::unique_ptr<Session> session_;
  armt::Snapshot begin_;
  std::vector<uint8_t> before_, after_;
  std::vector<float> logits_;
};

}  // namespace

int main(int argc, char** argv) {
  require(argc == 2, "usage: faults FOLDER");
  folder = argv[1];
  for (int64_t model = 0; model < fuzz::kModels; ++model) {
    std::printf("model %d\n", static_cast<int>(model));
    load_scenario(model, 1);
    Bench bench(loaded(folder + "/model.safetensors", model, 1));
    bench.feed();
    bench.close_and_score();
    bench.choose();
    bench.fork_and_rollback();
    bench.save_and_load();
  }
  std::printf("two threads\n");
  load_scenario(0, 2);
  Bench(loaded(folder + "/model.safetensors", 0, 2)).feed();
  std::printf("faults: passed\n");
  return 0;
}
