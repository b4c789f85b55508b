// Choosing the next token. The same logits, settings, seed and count give the same token on every CPU; a GPU chooses
// another where a draw falls within 1e-9 of the border of two tokens.
#pragma once

#include <cstdint>
#include <span>

#include "engine/stream.h"

namespace armt {

struct SamplingParams {
  double temperature = 0.0;         // 0: the token with the greatest logit (the lowest id among equals)
  int64_t top_k = 0;                // 0: off
  double top_p = 1.0;               // 1: off; in (0, 1]
  double min_p = 0.0;               // 0: off; in [0, 1]
  double repetition_penalty = 1.0;  // 1: off; above 0. Over the tokens of the open and of the previous segment

  void validate() const;  // InvalidArgument
};

// `logits` [vocab]; `seen` are the ids that the repetition penalty applies to. Advances `sampler` by one draw unless
// temperature is 0.
Choice choose_token(std::span<const float> logits, const SamplingParams& params, std::span<const int32_t> seen,
                    SamplerState& sampler);

// The next draw as a backend makes it, which knows no repetition penalty.
Draw draw_of(const SamplingParams& params, const SamplerState& sampler);

// Uniform number in [0, 1) number `index` of the sequence `seed`: a 64-bit mix of the two (a counter-based generator).
double uniform(uint64_t seed, uint64_t index);

// log softmax(logits)[token], in double.
double log_probability(std::span<const float> logits, int32_t token);

}  // namespace armt
