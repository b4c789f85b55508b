// The orders of cells through a whole engine: bit-equal for any schedule and number of threads,
// nothing torn when a hook throws, streams side by side. Meant for the thread sanitizer too.
#include <algorithm>
#include <cmath>
#include <random>
#include <thread>
#include <vector>

#include "armt/error.h"
#include "check.h"
#include "engine/session.h"
#include "slots.h"

namespace {

using namespace armt;

constexpr int64_t kTokens = 301, kVocab = 53;

ModelConfig config_of(int64_t layers, bool window) {
  ModelConfig config;
  config.decoder = {.vocab_size = kVocab,
                    .d_model = 32,
                    .n_layers = layers,
                    .n_heads = 2,
                    .n_kv_heads = 2,
                    .head_dim = 16,
                    .d_ff = 64};
  config.decoder.rotary_dims = 16;
  config.memory.dialect = window ? Dialect::modern : Dialect::paper;
  config.memory.normalise_keys = window;
  config.memory.sliding_window = window;
  config.memory.memory_tokens = 3;
  config.memory.d_mem = 8;
  config.memory.segment_size = 7;
  return config;
}

std::shared_ptr<Engine> make_engine(const ModelConfig& config, Schedule schedule, int64_t threads) {
  EngineOptions options;
  options.backend.threads = threads;
  options.schedule = schedule;
  auto engine = std::make_shared<Engine>(config, options);
  std::mt19937 generator(5);
  const auto normal = [&](int64_t count, double scale) {
    std::normal_distribution<float> distribution(0.0f, static_cast<float>(scale));
    std::vector<float> values(count);
    for (float& value : values) value = distribution(generator);
    return values;
  };
  for (int64_t layer = 0; layer < config.decoder.n_layers; ++layer) {
    for (int i = 0; i < static_cast<int>(Matrix::count); ++i) {
      const auto which = static_cast<Matrix>(i);
      const Shape shape = expected_shape(which, config);
      if (shape.rows * shape.cols == 0 || which == Matrix::sink) continue;
      if (layer > 0 && which >= Matrix::head) continue;
      const auto values = normal(shape.rows * shape.cols, 0.7 / std::sqrt(static_cast<double>(shape.cols)));
      engine->load(which, layer, {values.data(), DType::f32, shape.rows, shape.cols, shape.cols, 1});
    }
    for (int i = 0; i < static_cast<int>(Vector::count); ++i) {
      const auto which = static_cast<Vector>(i);
      if (which == Vector::q_norm || which == Vector::k_norm) continue;
      if (layer > 0 && which >= Vector::final_norm) continue;
      engine->load(which, layer, normal(expected_size(which, config), 0.5));
    }
  }
  engine->finish_loading();
  return engine;
}

std::vector<int32_t> tokens_of(unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<int32_t> tokens(kTokens);
  for (int32_t& token : tokens) token = static_cast<int32_t>(generator() % kVocab);
  return tokens;
}

std::vector<float> read(Engine& engine, Session& session, const std::vector<int32_t>& tokens,
                        const RunHooks& hooks = {}) {
  std::vector<float> logits(kTokens * kVocab);
  Call call;
  call.session = &session;
  call.tokens = tokens;
  call.logits = LogitsWanted::all;
  call.logits_out = logits.data();
  run_calls(engine, {&call, 1}, hooks);
  return logits;
}

std::vector<float> read_fresh(const std::shared_ptr<Engine>& engine, const std::vector<int32_t>& tokens) {
  Session session(engine);
  return read(*engine, session, tokens);
}

void same_bits() {
  const auto tokens = tokens_of(1);
  for (const bool window : {false, true}) {
    for (const int64_t layers : {1, 2, 5}) {
      const ModelConfig config = config_of(layers, window);
      const auto expected = read_fresh(make_engine(config, Schedule::sequential, 1), tokens);
      check(std::all_of(expected.begin(), expected.end(), [](float x) { return std::isfinite(x); }), "finite logits");
      for (const Schedule schedule : {Schedule::automatic, Schedule::diagonal}) {
        for (const int64_t threads : {1, 2, 3, 8}) {
          const auto engine = make_engine(config, schedule, threads);
          for (int repeat = 0; repeat < 3; ++repeat) {
            check(read_fresh(engine, tokens) == expected,
                  std::to_string(layers) + " layers, " + std::to_string(threads) + " threads");
          }
        }
      }
    }
  }
}

// A hook may stop a call at any wave: it runs in the caller's thread, sees growing counts, and the
// stream is then as before.
void stopped() {
  const auto engine = make_engine(config_of(4, false), Schedule::diagonal, 3);
  const auto tokens = tokens_of(2), more = tokens_of(3);
  const auto expected = [&] {
    Session session(engine);
    read(*engine, session, tokens);
    return read(*engine, session, more);
  }();
  const auto caller = std::this_thread::get_id();
  for (int64_t stop = 0; stop < 40; stop += 3) {
    Session session(engine);
    read(*engine, session, tokens);
    int64_t calls = 0, seen = 0;
    RunHooks hooks;
    hooks.progress = [&](int64_t done) {
      check(std::this_thread::get_id() == caller, "a hook ran in another thread");
      check(done >= seen, "progress never falls");
      seen = done;
      if (calls++ == stop) throw StateError("stop here");
    };
    bool thrown = false;
    try {
      read(*engine, session, more, hooks);
    } catch (const StateError&) {
      thrown = true;
    }
    check(thrown, "the hook's error arrives");
    check(session.progress().tokens == kTokens, "the stream is as before");
    check(read(*engine, session, more) == expected, "and goes on as if nothing had happened");
  }
}

void side_by_side() {
  const auto engine = make_engine(config_of(3, false), Schedule::automatic, 2);
  std::vector<std::vector<float>> expected;
  for (unsigned i = 0; i < 4; ++i) expected.push_back(read_fresh(engine, tokens_of(i)));
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (unsigned i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int repeat = 0; repeat < 5; ++repeat) wrong[i] += read_fresh(engine, tokens_of(i)) != expected[i];
    });
  }
  for (std::thread& thread : threads) thread.join();
  check(std::count(wrong.begin(), wrong.end(), 0) == 4, "streams side by side");
}

}  // namespace

int main() {
  same_bits();
  stopped();
  side_by_side();
  return report("schedule_test");
}
