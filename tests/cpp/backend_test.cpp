// The CPU backend's dense part through the seam: loading and its errors, embedding, linear layers,
// norms, logits, buffers, and the running of groups.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <random>
#include <set>
#include <vector>

#include "armt/error.h"
#include "check.h"
#include "cpu/cpu_backend.h"
#include "slots.h"

// Under a sanitizer an allocation that is too large must fail as it does without one.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }
extern "C" const char* __tsan_default_options() { return "allocator_may_return_null=1"; }

namespace {

using namespace armt;
using cpu::CpuBackend;
using cpu::row_of;

std::mt19937 generator(11);

std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (float& value : values) value = distribution(generator);
  return values;
}

ModelConfig small_config() {
  ModelConfig config;
  config.decoder = {.vocab_size = 101,
                    .d_model = 40,
                    .n_layers = 2,
                    .n_heads = 4,
                    .n_kv_heads = 2,
                    .head_dim = 10,
                    .d_ff = 70};
  config.decoder.learned_positions = 30;
  config.decoder.gated_mlp = true;
  config.decoder.activation = ActivationKind::silu;
  config.memory.memory_tokens = 3;
  config.memory.d_mem = 8;
  config.memory.use_sink = true;
  config.memory.segment_size = 16;
  return config;
}

struct Weights {
  std::vector<std::vector<float>> matrices[2], vectors[2];  // by layer and kind
};

HostMatrix view(const std::vector<float>& values, const Shape& shape) {
  return {values.data(), DType::f32, shape.rows, shape.cols, shape.cols, 1};
}

bool in_layer(Matrix which, int64_t layer) {
  return layer == 0 || which < Matrix::head;
}
bool in_layer(Vector which, int64_t layer) {
  return layer == 0 || which < Vector::final_norm;
}

Weights load_all(CpuBackend& backend, bool with_head) {
  Weights weights;
  for (int64_t layer = 0; layer < 2; ++layer) {
    for (int i = 0; i < static_cast<int>(Matrix::count); ++i) {
      const auto which = static_cast<Matrix>(i);
      const Shape shape = expected_shape(which, backend.config());
      weights.matrices[layer].push_back(normal(shape.rows * shape.cols));
      if (!in_layer(which, layer) || (which == Matrix::head && !with_head)) continue;
      backend.load(which, layer, view(weights.matrices[layer].back(), shape));
    }
    for (int i = 0; i < static_cast<int>(Vector::count); ++i) {
      const auto which = static_cast<Vector>(i);
      weights.vectors[layer].push_back(normal(expected_size(which, backend.config())));
      if (in_layer(which, layer)) backend.load(which, layer, weights.vectors[layer].back());
    }
  }
  backend.finish_loading();
  return weights;
}

const std::vector<float>& of(const Weights& weights, Matrix which, int64_t layer = 0) {
  return weights.matrices[layer][static_cast<size_t>(which)];
}
const std::vector<float>& of(const Weights& weights, Vector which, int64_t layer = 0) {
  return weights.vectors[layer][static_cast<size_t>(which)];
}

BackendOptions with_threads(int64_t threads) {
  BackendOptions options;
  options.threads = threads;
  return options;
}

template <class Expected, class Fn>
void throws(const std::string& part, Fn&& fn) {
  try {
    fn();
    check(false, "nothing thrown, expected: " + part);
  } catch (const Expected& error) {
    check(std::string(error.what()).find(part) != std::string::npos,
          "message '" + std::string(error.what()) + "' lacks '" + part + "'");
  }
}

void refusals() {
  const ModelConfig config = small_config();
  CpuBackend backend(config, with_threads(1));
  const std::vector<float> values(100000);
  throws<CheckpointError>("layer 1 mlp_up: found shape [70, 40], expected [140, 40]", [&] {
    backend.load(Matrix::mlp_up, 1, view(values, {70, 40}));
  });
  throws<CheckpointError>("head: found shape [40, 101], expected [101, 40]", [&] {
    backend.load(Matrix::head, 0, view(values, {40, 101}));
  });
  throws<CheckpointError>("found layer 2, expected one of 0 .. 1", [&] {
    backend.load(Matrix::qkv, 2, view(values, {80, 40}));
  });
  throws<CheckpointError>("layer 0 norm1: found 41 values, expected 40",
                          [&] { backend.load(Vector::norm1, 0, std::span(values).first(41)); });
  throws<CheckpointError>("missing layer 0 qkv, layer 0 attn_out",
                          [&] { backend.finish_loading(); });
  BackendOptions options;
  options.weight_dtype = DType::f16;
  throws<InvalidArgument>("float16", [&] { CpuBackend refused(config, options); });
  options = {};
  options.isa = "avx3";
  throws<InvalidArgument>("found 'avx3'", [&] { CpuBackend refused(config, options); });
  options = {};
  for (const char* device : {"gpu", "cuda:", "cuda:x", "cpu:0", ""}) {
    options.device = device;
    throws<InvalidArgument>("found '" + options.device + "'",
                            [&] { make_backend(config, options); });
  }
  options.device = "auto";
  if (cuda_device_count() == 0)
    check(make_backend(config, options)->device() == "cpu", "auto without a GPU");
  throws<OutOfMemory>(std::to_string(int64_t{1} << 60),
                      [&] { backend.allocate(int64_t{1} << 60); });
}

void blocks() {
  CpuBackend backend(small_config(), with_threads(1));
  backend.set_poison(true);
  const BlockRef a = backend.allocate(64 * 4), b = backend.allocate(64 * 4);
  check(reinterpret_cast<uintptr_t>(a->data) % 64 == 0 && a->bytes == 256, "block");
  check(std::isnan(static_cast<float*>(a->data)[63]), "poison in a block");
  std::vector<float> values = normal(64), back(64);
  backend.upload(*a, 0, values.data(), 256);
  backend.copy(*b, *a, 128);
  backend.download(*b, 16, back.data(), 112);
  check(std::equal(back.begin(), back.begin() + 28, values.begin() + 4), "copied and downloaded");
  check(std::isnan(static_cast<float*>(b->data)[32]), "not copied");
  check(backend.allocate(0)->data != nullptr, "empty block");
  const auto workspace = backend.make_workspace(2, 5);
  check(std::isnan(static_cast<float*>(workspace->residual.data)[2 * 5 * 40 - 1]),
        "poison in a workspace");
}

void embedding(bool with_head) {
  CpuBackend backend(small_config(), with_threads(2));
  const Weights weights = load_all(backend, with_head);
  const int64_t d = 40;
  std::vector<Row> rows(50);
  for (int i = 0; i < 50; ++i) {
    rows[i].source = i % 4 == 3 ? Row::kFirstMemory - i % 3 : i % 7 == 2 ? Row::kSink : 2 * i;
    rows[i].position = i % 30;
  }
  const std::vector<float> carried = normal(3 * d);
  const BlockRef block = backend.allocate(3 * d * 4);
  backend.upload(*block, 0, carried.data(), 3 * d * 4);
  const Cell cells[] = {{.row_begin = 7, .row_count = 20},
                        {.row_begin = 27, .row_count = 30, .carried = block.get()}};
  const Group group{.row_begin = 7, .row_count = 50, .rows = rows.data(), .cells = cells};
  std::vector<float> out(50 * d);
  backend.embed(group, {.data = out.data(), .width = d, .origin = 7});
  for (int i = 0; i < 50; ++i) {
    const float* expected = of(weights, Matrix::sink).data();
    if (rows[i].source >= 0) expected = of(weights, Matrix::embedding).data() + rows[i].source * d;
    if (rows[i].source <= Row::kFirstMemory) {
      expected = (i < 20 ? of(weights, Matrix::memory).data() : carried.data()) +
                 (Row::kFirstMemory - rows[i].source) * d;
    }
    for (int64_t c = 0; c < d; ++c) {
      const float sum = expected[c] + of(weights, Matrix::positions)[rows[i].position * d + c];
      check(out[i * d + c] == sum, "embedding of row " + std::to_string(i));
    }
  }
}

void logits(bool with_head) {
  CpuBackend backend(small_config(), with_threads(2));
  const Weights weights = load_all(backend, with_head);
  const std::vector<float>& head = of(weights, with_head ? Matrix::head : Matrix::embedding);
  const std::vector<float> hidden = normal(9 * 40);
  std::vector<float> out(4 * 101);
  backend.logits({.data = const_cast<float*>(hidden.data()), .width = 40, .origin = 3}, 2, 4,
                 out.data());
  for (int64_t r = 0; r < 4; ++r) {
    for (int64_t v = 0; v < 101; ++v) {
      double expected = 0;
      for (int64_t c = 0; c < 40; ++c)
        expected += double{hidden[(r + 2) * 40 + c]} * head[v * 40 + c];
      check_near(out[r * 101 + v], expected, 1e-5, "logits");
    }
  }
}

// Two groups of different layers in one call, rows that don't start at 0.
void linear_layers() {
  CpuBackend backend(small_config(), with_threads(2));
  const Weights weights = load_all(backend, true);
  const std::vector<float> in = normal(20 * 40);
  std::vector<float> out(20 * 70);
  const Rows from{.data = const_cast<float*>(in.data()), .width = 40, .origin = 5};
  const Rows to{.data = out.data(), .width = 70, .origin = 5};
  const Group groups[] = {{.layer = 1, .row_begin = 5, .row_count = 9},
                          {.layer = 0, .row_begin = 14, .row_count = 11}};
  backend.linear(Matrix::mlp_up, groups, from, to, Epilogue::activate);
  for (int64_t r = 0; r < 20; ++r) {
    const int64_t layer = r < 9 ? 1 : 0;
    const auto dot = [&](int64_t row) {
      double sum = of(weights, Vector::mlp_up_bias, layer)[row];
      for (int64_t c = 0; c < 40; ++c)
        sum += double{in[r * 40 + c]} * of(weights, Matrix::mlp_up, layer)[row * 40 + c];
      return sum;
    };
    for (int64_t c = 0; c < 70; ++c) {
      const double gate = dot(c), up = dot(70 + c);
      check_near(out[r * 70 + c], gate / (1 + std::exp(-gate)) * up, 2e-4, "gated MLP");
    }
  }
}

void rows_back_and_forth() {
  CpuBackend backend(small_config(), with_threads(2));
  load_all(backend, true);
  const int64_t d = 40;
  const std::vector<float> from = normal(12 * d);
  std::vector<float> to(12 * d), back(12 * d);
  const Rows source{.data = const_cast<float*>(from.data()), .width = d, .origin = 100};
  const Rows target{.data = to.data(), .width = d, .origin = 3};
  const int64_t picked[] = {111, 100, 105};
  backend.gather(source, picked, target);
  for (int i = 0; i < 3; ++i) {
    check(std::equal(&to[i * d], &to[i * d] + d, &from[(picked[i] - 100) * d]),
          "gathered row " + std::to_string(i));
  }
  const BlockRef block = backend.allocate(4 * d * 4);
  backend.save_rows(source, 6, 4, *block);
  backend.load_rows(*block, 4, {.data = back.data(), .width = d, .origin = 55}, 7);
  check(std::equal(&back[7 * d], &back[11 * d], &from[6 * d]) && back[11 * d] == 0,
        "saved and loaded rows");
}

// Every group once, with scratch of its own that starts at the group's first row.
void groups(int64_t threads, int64_t count) {
  CpuBackend backend(small_config(), with_threads(threads));
  const auto workspace = backend.make_workspace(count, 10);
  std::vector<Group> all(count);
  for (int64_t i = 0; i < count; ++i) all[i] = {.layer = i, .row_begin = 10 * i, .row_count = 10};
  for (int repeat = 0; repeat < 200; ++repeat) {
    std::mutex mutex;
    std::multiset<int64_t> seen;
    std::set<void*> busy;
    backend.run(*workspace, all, [&](Groups part, const Scratch& scratch) {
      check(part.size() == 1, "one group a call");
      check(scratch.ff.origin == part[0].row_begin && scratch.ff.width == 70 &&
                scratch.qkv.width == 80,
            "scratch");
      {
        const std::lock_guard lock(mutex);
        seen.insert(part[0].layer);
        check(busy.insert(scratch.hidden.data).second, "scratch is shared");
      }
      std::fill_n(row_of(scratch.ff, part[0].row_begin), 700, static_cast<float>(part[0].layer));
      const float* last = row_of(scratch.ff, part[0].row_begin + 9) + 69;
      check(*last == static_cast<float>(part[0].layer), "scratch overwritten");
      const std::lock_guard lock(mutex);
      busy.erase(scratch.hidden.data);
    });
    check(std::ssize(seen) == count && std::ssize(std::set(seen.begin(), seen.end())) == count,
          "each group once");
  }
  throws<StateError>("stop here", [&] {
    backend.run(*workspace, all, [](Groups part, const Scratch&) {
      if (part[0].layer == 0) throw StateError("stop here");
    });
  });
}

void weight_sizes() {
  BackendOptions options = with_threads(1);
  CpuBackend wide(small_config(), options);
  options.weight_dtype = DType::bf16;
  CpuBackend narrow(small_config(), options);
  load_all(wide, false);
  const int64_t tied = wide.weight_bytes();
  load_all(wide, true);
  load_all(narrow, true);
  check(tied < wide.weight_bytes(), "a tied head takes no room");
  check(narrow.weight_bytes() < wide.weight_bytes() * 0.6, "bfloat16 weights take half the room");
}

}  // namespace

int main() {
  refusals();
  blocks();
  for (const bool with_head : {false, true}) {
    embedding(with_head);
    logits(with_head);
  }
  linear_layers();
  rows_back_and_forth();
  for (int64_t threads : {1, 2, 4}) {
    for (int64_t count : {1, 2, 3, 9}) groups(threads, count);
  }
  weight_sizes();
  return report("backend_test");
}
