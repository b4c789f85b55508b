#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "armt/error.h"

namespace armt {
namespace {

struct Candidate {
  int32_t token;
  double value;  // logit, later probability
};

// exp by range reduction and a Taylor polynomial: only additions and products, so that no two platforms differ (library
// versions of exp do).
double portable_exp(double x) {
  if (x < -700.0) return 0.0;
  constexpr double kLog2e = 1.4426950408889634, kLn2High = 0.693147180369123816490,
                   kLn2Low = 1.90821492927058770002e-10;
  const double n = std::floor(x * kLog2e + 0.5);
  const double r = (x - n * kLn2High) - n * kLn2Low;  // |r| <= ln 2 / 2
  double sum = 1.0;
  for (int i = 14; i >= 1; --i) sum = 1.0 + sum * r / i;
  return std::ldexp(sum, static_cast<int>(n));
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

void keep_top_k(std::vector<Candidate>& sorted, int64_t k) {
  if (k > 0 && k < std::ssize(sorted)) sorted.resize(k);
}

void to_probabilities(std::vector<Candidate>& candidates, double temperature, double greatest_logit) {
  double sum = 0;
  for (Candidate& c : candidates) {
    c.value = portable_exp((c.value - greatest_logit) / temperature);
    sum += c.value;
  }
  for (Candidate& c : candidates) c.value /= sum;
}

void keep_top_p(std::vector<Candidate>& sorted, double p) {
  if (p >= 1.0) return;
  double sum = 0;
  for (size_t i = 0; i < sorted.size(); ++i) {
    sum += sorted[i].value;
    if (sum < p) continue;
    sorted.resize(i + 1);
    return;
  }
}

void keep_min_p(std::vector<Candidate>& sorted, double p) {
  const double least = p * sorted.front().value;
  std::erase_if(sorted, [least](const Candidate& c) { return c.value < least; });
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

Choice choose_token(std::span<const float> logits, const SamplingParams& params, std::span<const int32_t> seen,
                    SamplerState& sampler) {
  std::vector<double> values(logits.begin(), logits.end());
  if (params.repetition_penalty != 1.0) penalise(values, seen, params.repetition_penalty);
  if (params.temperature == 0.0) {
    const int32_t token = greatest(values);
    return {token, log_probability(logits, token)};
  }

  std::vector<Candidate> candidates;
  candidates.reserve(values.size());
  for (size_t i = 0; i < values.size(); ++i) candidates.push_back({static_cast<int32_t>(i), values[i]});
  const double top = values[greatest(values)];
  if (params.top_k > 0 || params.top_p < 1.0 || params.min_p > 0.0) {
    std::stable_sort(candidates.begin(), candidates.end(),
                     [](const Candidate& a, const Candidate& b) { return a.value > b.value; });
    keep_top_k(candidates, params.top_k);
    to_probabilities(candidates, params.temperature, top);
    keep_top_p(candidates, params.top_p);
    keep_min_p(candidates, params.min_p);
  } else {
    to_probabilities(candidates, params.temperature, top);
  }
  const int32_t token = draw(candidates, uniform(sampler.seed, sampler.drawn++));
  return {token, log_probability(logits, token)};
}

}  // namespace armt
