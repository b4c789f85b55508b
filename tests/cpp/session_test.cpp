// Sessions from many threads over shared memory, and states that are wiped. Meant for the thread sanitizer too.
#include "engine/session.h"

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "armt/error.h"
#include "check.h"
#include "common.h"

namespace {

using namespace armt;

std::vector<float> read(Session& session, const std::vector<int32_t>& ids) {
  std::vector<float> logits(static_cast<size_t>(session.engine()->config().decoder.vocab_size));
  Call call{.session = &session, .tokens = ids, .logits = LogitsWanted::last, .logits_out = logits.data()};
  run_calls(*session.engine(), {&call, 1});
  return logits;
}

const std::vector<int32_t> kBook = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, kQuestion = {3, 1, 4, 1, 5};

// Every thread forks the same state again and again: pages and blocks are shared until somebody writes.
void forks_in_threads(int64_t model) {
  const auto engine = fuzz::make_engine(fuzz::model(model));
  Session first(engine);
  read(first, kBook);
  const Snapshot book = first.snapshot();
  Session alone(engine, book.state);
  const std::vector<float> expected = read(alone, kQuestion);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < 30; ++round) {
        Session session(engine, book.state);
        const auto fork = session.fork();
        const Snapshot here = session.snapshot();
        wrong += read(session, kQuestion) != expected;
        session.rollback(here);
        wrong += read(session, kQuestion) != expected;
        wrong += read(*fork, kQuestion) != expected;
        session.close(t % 2 == 0);
        engine->stats();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  check(wrong == 0, "forks in threads, model " + std::to_string(model));
}

// A second thread gets an error instead of a torn state.
void one_session_in_two_threads() {
  const auto engine = fuzz::make_engine(fuzz::model(0));
  Session session(engine);
  std::atomic<int64_t> done{0}, refused{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        try {
          read(session, {1, 2});
          ++done;
        } catch (const StateError&) {
          ++refused;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  check(done + refused == 600, "every call ends");
  check(session.progress().tokens == 2 * done, "tokens of the calls that were not refused");
}

struct Freed {
  int64_t blocks = 0, dirty = 0;
};

// Looks at a block's bytes when it is given back.
void watch(const BlockRef& block, Freed& freed) {
  if (!block) return;
  block->release = [&freed, release = block->release](Block& released) {
    ++freed.blocks;
    for (int64_t i = 0; i < released.bytes; ++i) {
      if (static_cast<const char*>(released.data)[i] == 0) continue;
      ++freed.dirty;
      break;
    }
    release(released);
  };
}

Freed freed_by_close(int64_t model, bool wipe, bool shared) {
  const auto engine = fuzz::make_engine(fuzz::model(model));
  Session session(engine);
  read(session, kBook);
  Freed freed;
  {
    const Snapshot state = session.snapshot();
    for (const LayerState& layer : state.state.layers) {
      watch(layer.memory.block, freed);
      for (const auto& page : layer.current.pages) watch(page->block, freed);
      for (const auto& page : layer.previous.pages) watch(page->block, freed);
    }
    watch(state.state.carried, freed);
    watch(state.state.last_hidden, freed);
    if (shared) session.close(wipe);
  }
  if (!shared) session.close(wipe);
  return freed;
}

void wiped() {
  for (int64_t model = 0; model < fuzz::kModels; ++model) {
    const std::string name = "model " + std::to_string(model);
    const Freed plain = freed_by_close(model, false, false), clean = freed_by_close(model, true, false);
    check(plain.blocks > 3 && plain.dirty == plain.blocks, "without wiping contents are left: " + name);
    check(clean.blocks == plain.blocks && clean.dirty == 0, "a wiped state holds zeros: " + name);
    const Freed shared = freed_by_close(model, true, true);
    check(shared.dirty == plain.dirty, "what a snapshot shares is left alone: " + name);
  }
}

}  // namespace

int main() {
  for (int64_t model = 0; model < fuzz::kModels; ++model) forks_in_threads(model);
  one_session_in_two_threads();
  wiped();
  return report("session_test");
}
