#include "engine/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "armt/error.h"

namespace armt {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kImpossible = 1e-300;  // weights below are of logits that were cut off, or as good as

struct Candidate {
  int32_t token;
  double value;  // logit, later weight
};

// The likelier one first; of equals the lower id.
bool before(const Candidate& a, const Candidate& b) {
  return a.value != b.value ? a.value > b.value : a.token < b.token;
}

// Those of at least `least`, in the order of their ids.
std::vector<Candidate> candidates_of(const std::vector<double>& values, double least) {
  std::vector<Candidate> candidates;
  candidates.reserve(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] >= least) candidates.push_back({static_cast<int32_t>(i), values[i]});
  }
  return candidates;
}

// exp of each x <= 0 by range reduction and a Taylor polynomial: only additions, products and bits, so that no two
// platforms differ (library versions of exp do) and the loop becomes vector code. The relative error is below 1e-15.
void exponentials(std::span<double> xs) {
  constexpr double kLog2e = 1.4426950408889634, kLn2High = 0.693147180369123816490,
                   kLn2Low = 1.90821492927058770002e-10, kRound = 0x1.8p52;
  for (double& x : xs) {
    const double bounded = x < -700.0 ? -700.0 : x;
    const double shifted = bounded * kLog2e + kRound;  // its last bits hold the nearest whole number
    const double n = shifted - kRound;
    const double r = (bounded - n * kLn2High) - n * kLn2Low;  // |r| <= ln 2 / 2
    double sum = 1.0 / 6227020800.0;
    sum = 1.0 / 479001600.0 + r * sum;
    sum = 1.0 / 39916800.0 + r * sum;
    sum = 1.0 / 3628800.0 + r * sum;
    sum = 1.0 / 362880.0 + r * sum;
    sum = 1.0 / 40320.0 + r * sum;
    sum = 1.0 / 5040.0 + r * sum;
    sum = 1.0 / 720.0 + r * sum;
    sum = 1.0 / 120.0 + r * sum;
    sum = 1.0 / 24.0 + r * sum;
    sum = 1.0 / 6.0 + r * sum;
    sum = 0.5 + r * sum;
    sum = 1.0 + r * sum;
    sum = 1.0 + r * sum;
    x = sum * std::bit_cast<double>((std::bit_cast<uint64_t>(shifted) + 1023) << 52);
  }
}

void penalise(std::vector<double>& logits, std::span<const int32_t> seen, double penalty) {
  std::vector<int32_t> unique(seen.begin(), seen.end());
  std::sort(unique.begin(), unique.end());
  unique.erase(std::unique(unique.begin(), unique.end()), unique.end());
  for (const int32_t token : unique) {
    double& value = logits[token];
    value = value > 0 ? value / penalty : value * penalty;
  }
}

int32_t greatest(const std::vector<double>& logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// All but the k likeliest become impossible.
void keep_top_k(std::vector<double>& logits, int64_t k) {
  if (k == 0 || k >= std::ssize(logits)) return;
  std::vector<Candidate> candidates = candidates_of(logits, -kInfinity);
  std::nth_element(candidates.begin(), candidates.begin() + k, candidates.end(), before);
  for (auto c = candidates.begin() + k; c != candidates.end(); ++c) logits[c->token] = -kInfinity;
}

// exp((logit - greatest) / temperature), 1 for the greatest even if it is infinite.
void to_weights(std::vector<double>& logits, double temperature, double greatest_logit) {
  for (double& logit : logits) logit = logit == greatest_logit ? 0.0 : (logit - greatest_logit) / temperature;
  exponentials(logits);
}

// The fewest of the likeliest whose weights reach `least`, the likeliest first. Few of many are wanted as a rule, so no
// more than those are put in order.
void keep_top_p(std::vector<Candidate>& candidates, double least) {
  double sum = 0;
  size_t sorted = 0;
  for (size_t wanted = 64; sorted < candidates.size(); wanted *= 8) {
    const size_t end = std::min(wanted, candidates.size());
    const auto first = candidates.begin() + static_cast<std::ptrdiff_t>(sorted);
    const auto last = candidates.begin() + static_cast<std::ptrdiff_t>(end);
    if (last != candidates.end()) std::nth_element(first, last, candidates.end(), before);
    std::sort(first, last, before);
    for (; sorted < end; ++sorted) {
      sum += candidates[sorted].value;
      if (sum < least) continue;
      candidates.resize(sorted + 1);
      return;
    }
  }
}

int32_t draw(const std::vector<Candidate>& candidates, double u) {
  double total = 0;
  for (const Candidate& c : candidates) total += c.value;
  double sum = 0;
  for (const Candidate& c : candidates) {
    sum += c.value;
    if (u * total < sum) return c.token;
  }
  return candidates.back().token;
}

void require(bool holds, const char* name, double found, const char* expected) {
  if (holds) return;
  throw InvalidArgument(std::string(name) + ": found " + std::to_string(found) + ", expected " + expected);
}

}  // namespace

void SamplingParams::validate() const {
  require(temperature >= 0 && std::isfinite(temperature), "temperature", temperature, "a number of 0 or more");
  require(top_k >= 0, "top_k", static_cast<double>(top_k), "0 (off) or more");
  require(top_p > 0 && top_p <= 1, "top_p", top_p, "a number in (0, 1]");
  require(min_p >= 0 && min_p <= 1, "min_p", min_p, "a number in [0, 1]");
  require(repetition_penalty > 0 && std::isfinite(repetition_penalty), "repetition_penalty", repetition_penalty,
          "a number above 0");
}

double uniform(uint64_t seed, uint64_t index) {
  uint64_t x = seed ^ 0x5851f42d4c957f2dULL;
  for (const uint64_t word : {index, seed}) {
    x += 0x9e3779b97f4a7c15ULL * (word + 1);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    x ^= x >> 31;
  }
  return static_cast<double>(x >> 11) * 0x1.0p-53;
}

double log_probability(std::span<const float> logits, int32_t token) {
  const double greatest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float value : logits) sum += std::exp(static_cast<double>(value) - greatest);
  return static_cast<double>(logits[token]) - greatest - std::log(sum);
}

Draw draw_of(const SamplingParams& params, const SamplerState& sampler) {
  return {.temperature = params.temperature,
          .top_p = params.top_p,
          .min_p = params.min_p,
          .u = uniform(sampler.seed, sampler.drawn),
          .top_k = params.top_k};
}

Choice choose_token(std::span<const float> logits, const SamplingParams& params, std::span<const int32_t> seen,
                    SamplerState& sampler) {
  std::vector<double> values(logits.begin(), logits.end());
  if (params.repetition_penalty != 1.0) penalise(values, seen, params.repetition_penalty);
  if (params.temperature == 0.0) {
    const int32_t token = greatest(values);
    return {token, log_probability(logits, token)};
  }

  for (double& value : values) value = std::isnan(value) ? -kInfinity : value;  // an order needs numbers
  const double top = values[greatest(values)];
  keep_top_k(values, params.top_k);
  to_weights(values, params.temperature, top);
  const double total = std::accumulate(values.begin(), values.end(), 0.0);
  std::vector<Candidate> candidates =
      candidates_of(values, std::max(params.min_p, kImpossible));  // the likeliest has 1
  if (params.top_p < 1.0) keep_top_p(candidates, params.top_p * total);
  const int32_t token = draw(candidates, uniform(sampler.seed, sampler.drawn++));
  return {token, log_probability(logits, token)};
}

}  // namespace armt
