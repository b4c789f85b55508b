// The dense kernels of every instruction set that this machine has, against plain loops in double.
#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/multiply.h"

namespace {

using namespace armt;
using namespace armt::cpu;

constexpr float kFence = 1234.5f;  // around every output: nothing else may be written
std::mt19937 generator(7);

std::vector<float> normal(int64_t count, float scale = 1.0f) {
  std::normal_distribution<float> distribution(0.0f, scale);
  std::vector<float> values(count);
  for (float& value : values) value = distribution(generator);
  return values;
}

float rounded_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

double activation(ActivationKind kind, double x) {
  switch (kind) {
    case ActivationKind::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case ActivationKind::gelu_erf:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case ActivationKind::silu:
      return x / (1 + std::exp(-x));
    case ActivationKind::relu:
      return std::max(x, 0.0);
  }
  return NAN;
}

struct Problem {
  int64_t m, n, k;
  bool bf16 = false, gated = false, transposed = false;
  Finish finish = {};
  std::string name() const {
    return "m " + std::to_string(m) + " n " + std::to_string(n) + " k " + std::to_string(k) +
           (bf16 ? " bf16" : "") + (gated ? " gated" : "") + (transposed ? " transposed" : "");
  }
};

struct Product {
  std::vector<float> in, weights, bias, before;
  int64_t ld_in, ld_out;
  PackedMatrix packed;
};

Product make_product(const Problem& problem, const Kernels& kernels, ThreadPool& pool) {
  Product product;
  product.ld_in = problem.k + 3;
  product.ld_out = problem.n + 5;
  const int64_t rows = problem.gated ? 2 * problem.n : problem.n;
  product.in = normal(problem.m * product.ld_in);
  product.weights = normal(rows * problem.k);
  product.bias = normal(rows);
  product.before = normal(problem.m * product.ld_out);
  for (int64_t r = 0; r < problem.m; ++r) {
    for (int64_t c = problem.n; c < product.ld_out; ++c)
      product.before[r * product.ld_out + c] = kFence;
  }
  HostMatrix matrix{product.weights.data(), DType::f32, rows, problem.k, problem.k, 1};
  std::vector<float> turned(product.weights.size());
  if (problem.transposed) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < problem.k; ++c)
        turned[c * rows + r] = product.weights[r * problem.k + c];
    }
    matrix = {turned.data(), DType::f32, rows, problem.k, 1, rows};
  }
  product.packed = pack(matrix, kernels.panel, problem.bf16, problem.gated, pool);
  if (problem.bf16)
    std::transform(product.weights.begin(), product.weights.end(), product.weights.begin(),
                   rounded_to_bf16);
  return product;
}

std::vector<float> multiplied(const Problem& problem, const Product& product,
                              const Kernels& kernels, ThreadPool& pool, int64_t first = 0,
                              int64_t count = -1) {
  std::vector<float> out = product.before;
  Finish finish = problem.finish;
  finish.bias = product.bias.data();
  multiply(pool, kernels, product.packed, finish, product.in.data() + first * product.ld_in,
           product.ld_in, count < 0 ? problem.m : count, out.data() + first * product.ld_out,
           product.ld_out, 0, problem.n);
  return out;
}

struct Sum {
  double value, size;  // size: the sum of the absolute terms, for the error bound
};

Sum dot(const Product& product, int64_t row, int64_t column, int64_t k) {
  Sum sum{product.bias[column], std::abs(product.bias[column])};
  for (int64_t i = 0; i < k; ++i) {
    const double term =
        double{product.in[row * product.ld_in + i]} * product.weights[column * k + i];
    sum.value += term;
    sum.size += std::abs(term);
  }
  return sum;
}

void check_product(const Problem& problem, const Kernels& kernels, ThreadPool& pool) {
  const Product product = make_product(problem, kernels, pool);
  const std::vector<float> out = multiplied(problem, product, kernels, pool);
  const double unit = 1.2e-7 * (2 + std::sqrt(static_cast<double>(problem.k)));
  for (int64_t r = 0; r < problem.m; ++r) {
    for (int64_t c = 0; c < product.ld_out; ++c) {
      const float found = out[r * product.ld_out + c],
                  before = product.before[r * product.ld_out + c];
      if (c >= problem.n) {
        check(found == kFence, problem.name() + " wrote past column " + std::to_string(c));
        continue;
      }
      Sum sum = dot(product, r, c, problem.k);
      double tolerance = unit * sum.size;
      if (problem.finish.activate) {
        tolerance = 1.2 * tolerance + 3e-7;
        sum.value = activation(problem.finish.activation, sum.value);
      }
      if (problem.gated) {
        const Sum up = dot(product, r, problem.n + c, problem.k);
        tolerance = tolerance * std::abs(up.value) + (std::abs(sum.value) + 1e-6) * unit * up.size;
        sum.value *= up.value;
      }
      if (problem.finish.add) sum.value += before;
      check_near(found, sum.value, tolerance + 2e-7 * std::abs(sum.value),
                 std::string(kernels.name) + " " + problem.name() + " at " + std::to_string(r) +
                     ", " + std::to_string(c));
    }
  }
}

Finish finish_of(int index) {
  Finish finish;
  finish.add = index == 1;
  finish.activate = index >= 2;
  if (index >= 2) finish.activation = static_cast<ActivationKind>((index - 2) % 4);
  return finish;
}

void products(const Kernels& kernels) {
  ThreadPool one(1), two(2);
  std::uniform_int_distribution<int64_t> columns(1, 100), depths(1, 300);
  int index = 0;
  for (int64_t m = 1; m <= 40; ++m) {
    for (int repeat = 0; repeat < 6; ++repeat, ++index) {
      Problem problem{m, columns(generator), depths(generator)};
      problem.bf16 = index % 2 == 1;
      problem.transposed = index % 3 == 1;
      problem.finish = finish_of(index % 6);
      problem.gated = problem.finish.activate && index % 5 < 3;
      check_product(problem, kernels, index % 4 == 0 ? one : two);
    }
  }
  // Several blocks over k, several row blocks, several tasks.
  for (const bool bf16 : {false, true}) {
    check_product({211, 200, 1030, bf16, false, false, finish_of(1)}, kernels, two);
    check_product({150, 97, 513, bf16, true, false, finish_of(4)}, kernels, two);
    check_product({1, 400, 770, bf16, true, false, finish_of(4)}, kernels, two);
    check_product({3, 400, 770, bf16, true, false, finish_of(2)}, kernels, two);
  }
}

// A row alone, in any piece of the batch, on one thread or two: the same bits.
void rows_do_not_depend_on_company(const Kernels& kernels) {
  ThreadPool one(1), two(2);
  for (const bool bf16 : {false, true}) {
    for (const bool gated : {false, true}) {
      Problem problem{131, 333, 700, bf16, gated, false, finish_of(gated ? 4 : 3)};
      const Product product = make_product(problem, kernels, one);
      const std::vector<float> all = multiplied(problem, product, kernels, one);
      check(std::memcmp(all.data(), multiplied(problem, product, kernels, two).data(),
                        all.size() * 4) == 0,
            "threads: " + problem.name());
      for (int64_t piece = 1; piece <= 24; ++piece) {
        for (int64_t first = 0; first + piece <= problem.m; first += piece) {
          const std::vector<float> part = multiplied(problem, product, kernels, two, first, piece);
          const int64_t from = first * product.ld_out;
          check(std::memcmp(&all[from], &part[from], piece * product.ld_out * 4) == 0,
                std::string(kernels.name) + " rows " + std::to_string(first) + " + " +
                    std::to_string(piece) + " of " + problem.name());
        }
      }
    }
  }
}

void column_ranges(const Kernels& kernels) {
  ThreadPool two(2);
  Problem problem{17, 300, 64};
  const Product product = make_product(problem, kernels, two);
  const std::vector<float> all = multiplied(problem, product, kernels, two);
  for (const auto& [c0, c1] :
       {std::pair<int64_t, int64_t>{0, 100}, {100, 300}, {37, 38}, {255, 300}}) {
    std::vector<float> out = product.before;
    Finish finish;
    finish.bias = product.bias.data();
    multiply(two, kernels, product.packed, finish, product.in.data(), product.ld_in, problem.m,
             out.data(), product.ld_out, c0, c1);
    for (int64_t r = 0; r < problem.m; ++r) {
      const int64_t at = r * product.ld_out;
      check(std::memcmp(&all[at + c0], &out[at + c0], (c1 - c0) * 4) == 0,
            "columns from " + std::to_string(c0));
      check(out[at + problem.n] == kFence, "columns: fence");
    }
  }
}

void packed_rows(const Kernels& kernels) {
  ThreadPool one(1);
  for (const bool bf16 : {false, true}) {
    Problem problem{1, 101, 33, bf16};
    const Product product = make_product(problem, kernels, one);
    std::vector<float> row(problem.k);
    for (int64_t r = 0; r < problem.n; ++r) {
      unpack_row(product.packed, r, row.data());
      check(std::equal(row.begin(), row.end(), product.weights.begin() + r * problem.k),
            "row " + std::to_string(r));
    }
  }
}

// Each of the 65536 halves and bfloat16 numbers, widened.
void conversions() {
  std::vector<uint16_t> bits(65536);
  for (int i = 0; i < 65536; ++i) bits[i] = static_cast<uint16_t>(i);
  const Buffer half = plain_rows({bits.data(), DType::f16, 256, 256, 256, 1});
  const Buffer brain = plain_rows({bits.data(), DType::bf16, 256, 256, 256, 1});
  for (int i = 0; i < 65536; ++i) {
    const int exponent = i >> 10 & 31, fraction = i & 1023;
    double expected =
        exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    if (exponent == 31) expected = fraction == 0 ? INFINITY : NAN;
    check_near(half.floats()[i], i >> 15 ? -expected : expected, 0, "half " + std::to_string(i));
    uint32_t wide;
    std::memcpy(&wide, &brain.floats()[i], 4);
    check(wide == static_cast<uint32_t>(i) << 16, "bfloat16 " + std::to_string(i));
  }
}

void exponent(const Kernels& kernels) {
  std::vector<float> inputs;
  for (double x = -110; x < 95; x += 0.00137) inputs.push_back(static_cast<float>(x));
  for (float x : {0.0f, -0.0f, -87.3365f, -87.33654f, -87.4f, 88.7228f, 88.72283f, 88.72284f, 88.8f,
                  1e30f, -1e30f, 1e-30f}) {
    inputs.push_back(x);
  }
  std::vector<float> values = inputs;
  kernels.exponent(values.data(), std::ssize(values));
  double worst = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const double expected = std::exp(double{inputs[i]});
    if (expected < std::numeric_limits<float>::min()) {
      check_near(values[i], 0, 1.2e-38, "exp(" + std::to_string(inputs[i]) + ")");
      if (inputs[i] < -87.34f)
        check(values[i] == 0, "exp underflow at " + std::to_string(inputs[i]));
      continue;
    }
    const auto rounded = static_cast<float>(expected);
    if (std::isinf(rounded)) {
      check(std::isinf(values[i]), "exp overflow at " + std::to_string(inputs[i]));
      continue;
    }
    const double ulp = std::nextafter(rounded, INFINITY) - rounded;
    if (inputs[i] > -87.336f) worst = std::max(worst, std::abs(values[i] - expected) / ulp);
  }
  std::printf("%s: exp off by at most %.2f ulp\n", kernels.name, worst);
  check(worst <= 2, "exp is more than 2 ulp off");
  float special[] = {-INFINITY, INFINITY, NAN, -NAN};
  kernels.exponent(special, 4);
  check(
      special[0] == 0 && std::isinf(special[1]) && std::isnan(special[2]) && std::isnan(special[3]),
      "exp of specials");
}

void activations(const Kernels& kernels) {
  std::vector<float> inputs;
  for (double x = -40; x < 40; x += 0.00173) inputs.push_back(static_cast<float>(x));
  for (float x : {-1e4f, 1e4f, -1e20f, 1e20f, 1e-20f, -1e-20f, 0.0f}) inputs.push_back(x);
  for (int kind = 0; kind < 4; ++kind) {
    std::vector<float> values = inputs;
    kernels.activate(static_cast<ActivationKind>(kind), values.data(), std::ssize(values));
    double worst = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const double expected = activation(static_cast<ActivationKind>(kind), inputs[i]);
      const double error = std::abs(values[i] - expected);
      worst = std::max(worst, std::min(error, error / std::abs(expected)));
      check_near(values[i], expected, 1e-7 + 2.5e-7 * std::abs(expected),
                 "activation " + std::to_string(kind) + " of " + std::to_string(inputs[i]));
    }
    float nan = NAN;
    kernels.activate(static_cast<ActivationKind>(kind), &nan, 1);
    check(std::isnan(nan), "activation " + std::to_string(kind) + " of NaN");
    std::printf("%s: activation %d off by at most %.2g, absolute or relative\n", kernels.name, kind,
                worst);
  }
}

void norms(const Kernels& kernels) {
  for (int64_t n : {1, 2, 3, 7, 8, 9, 31, 64, 65, 100, 127, 128, 129, 191, 768, 1000, 4096}) {
    for (const bool with_bias : {false, true}) {
      std::vector<float> x = normal(n), weight = normal(n), bias = normal(n), y(n + 1, kFence);
      for (float& value : x) value += 30;  // a mean that a one-pass variance would drown in
      const float* b = with_bias ? bias.data() : nullptr;
      double mean = 0, variance = 0, squares = 0;
      for (float value : x) mean += value / static_cast<double>(n);
      for (float value : x) variance += (value - mean) * (value - mean) / n;
      for (float value : x) squares += double{value} * value / n;
      kernels.layer_norm(x.data(), y.data(), n, weight.data(), b, 1e-5f);
      // The mean itself can't be better than float32: an error of 30 * 2^-24 in each centred value.
      for (int64_t i = 0; i < n; ++i) {
        const double expected =
            (x[i] - mean) / std::sqrt(variance + 1e-5) * weight[i] + (with_bias ? bias[i] : 0.0);
        check_near(y[i], expected,
                   (n == 1 ? 1e-3 : 4e-6 / std::sqrt(variance)) * std::abs(weight[i]) + 1e-6,
                   "layer norm of " + std::to_string(n));
      }
      kernels.rms_norm(x.data(), y.data(), n, weight.data(), b, 1e-5f);
      for (int64_t i = 0; i < n; ++i) {
        const double expected =
            x[i] / std::sqrt(squares + 1e-5) * weight[i] + (with_bias ? bias[i] : 0.0);
        check_near(y[i], expected, 4e-7 * (std::abs(expected) + 3),
                   "rms norm of " + std::to_string(n));
      }
      check(y[n] == kFence, "norm: fence");
    }
  }
}

}  // namespace

int main() {
  conversions();
  for (const std::string& isa : available_isas()) {
    const Kernels& kernels = kernels_for(isa);
    products(kernels);
    rows_do_not_depend_on_company(kernels);
    column_ranges(kernels);
    packed_rows(kernels);
    exponent(kernels);
    activations(kernels);
    norms(kernels);
  }
  return report("kernels_test");
}
