// Speed of the packed product alone: GFLOP/s, beside what the processor's multiply-add units can
// do.
//   gemm_bench [isa]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/isa.h"
#include "cpu/multiply.h"

namespace {

using namespace armt;
using namespace armt::cpu;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The packed product with operands that stay in L1: what this core can do now.
double peak(const Kernels& kernels) {
  const int64_t m = 24, k = 128;
  std::vector<float> in(m * k, 0.5f), out(m * kernels.panel);
  ThreadPool pool(1);
  const PackedMatrix weights =
      pack({in.data(), DType::f32, kernels.panel, k, 0, 1}, kernels.panel, false, false, pool);
  double best = 0;
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto start = Clock::now();
    for (int i = 0; i < 2000; ++i) {
      multiply(pool, kernels, weights, {}, in.data(), k, m, out.data(), kernels.panel, 0,
               kernels.panel);
    }
    best = std::max(best, 2e-9 * m * kernels.panel * k * 2000 / seconds_since(start));
  }
  return best;
}

struct Case {
  int64_t m, n, k;
};

double measure(ThreadPool& pool, const Kernels& kernels, const std::vector<PackedMatrix>& weights,
               const Case& size) {
  std::vector<float> in(size.m * size.k, 0.5f), out(size.m * size.n);
  const double flops = 2e-9 * size.m * size.n * size.k;
  const int calls =
      std::max<int>(2 * static_cast<int>(weights.size()), static_cast<int>(2.0 / flops));
  std::vector<double> rates;
  for (int repeat = 0; repeat < 9; ++repeat) {
    const auto start = Clock::now();
    for (int i = 0; i < calls; ++i) {
      multiply(pool, kernels, weights[i % weights.size()], {}, in.data(), size.k, size.m,
               out.data(), size.n, 0, size.n);
    }
    rates.push_back(flops * calls / seconds_since(start));
  }
  std::sort(rates.begin(), rates.end());
  return rates[rates.size() / 2];
}

std::vector<PackedMatrix> make_weights(const Case& size, bool bf16, const Kernels& kernels,
                                       ThreadPool& pool) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(size.n * size.k);
  for (float& value : values) value = normal(random);
  HostMatrix matrix{values.data(), DType::f32, size.n, size.k, size.k, 1};
  std::vector<PackedMatrix> all;
  // As in a model: more layers than the caches hold.
  for (int i = 0; i < 12; ++i) all.push_back(pack(matrix, kernels.panel, bf16, false, pool));
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const Kernels& kernels = kernels_for(argc > 1 ? argv[1] : "");
  std::printf("%s: %.1f GFLOP/s a core in L1\n", kernels.name, peak(kernels));
  for (const bool bf16 : {false, true}) {
    for (const Case& shape : {Case{0, 2304, 768}, Case{0, 3072, 768}, Case{0, 768, 3072}}) {
      ThreadPool one(1), two(2);
      const auto weights = make_weights(shape, bf16, kernels, two);
      for (const int64_t m : {1, 2, 4, 16, 144, 528, 1152}) {
        const Case size{m, shape.n, shape.k};
        const double single = measure(one, kernels, weights, size),
                     pair = measure(two, kernels, weights, size);
        std::printf("%s K %4d N %4d M %4d: 1 thread %6.1f, 2 threads %6.1f GFLOP/s\n",
                    bf16 ? "bf16" : "fp32", static_cast<int>(size.k), static_cast<int>(size.n),
                    static_cast<int>(m), single, pair);
        std::fflush(stdout);
      }
    }
  }
}
