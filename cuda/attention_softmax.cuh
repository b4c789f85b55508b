// A running softmax whose point of reference seldom moves: weights are 2^(scale score - shift), and a row's shift
// follows its highest score only when weights would pass 2^8. So most tiles need no exchange between threads and leave
// the output as it is. Whether a row's shift moves depends on this row's scores alone.
#pragma once

#include "attention_tiles.cuh"

namespace armt::cuda {

// Of a thread's two rows, with `dim` columns of the output.
template <int dim>
struct SteadySoftmax {
  static constexpr float kRise = 8.0f;
  float out[dim / 8][4] = {};
  float shift[2] = {0.0f, 0.0f}, limit[2] = {-INFINITY, -INFINITY};  // a score above the limit moves the shift
  float total[2] = {0.0f, 0.0f};

  // Scores become weights. By whole warps.
  __device__ void weigh(Scores& scores, float scale) {
    float high[2] = {scores[0][0], scores[0][2]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) high[i] = fmaxf(high[i], fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
    }
    if (__any_sync(0xffffffffu, high[0] > limit[0] || high[1] > limit[1])) rise(high, scale);
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[n][e] = power_of_two(scores[n][e] * scale - shift[e / 2]);
        total[e / 2] += scores[n][e];
      }
    }
  }

 private:
  __device__ void rise(float (&high)[2], float scale) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      high[i] = fmaxf(high[i], __shfl_xor_sync(0xffffffffu, high[i], 1));
      high[i] = fmaxf(high[i], __shfl_xor_sync(0xffffffffu, high[i], 2));
      float keep = 1.0f;
      if (high[i] > limit[i]) {
        const float before = shift[i];
        shift[i] = high[i] * scale;
        keep = limit[i] == -INFINITY ? 0.0f : power_of_two(before - shift[i]);
        limit[i] = high[i] + kRise / scale;
      }
      total[i] *= keep;
#pragma unroll
      for (int n = 0; n < dim / 8; ++n) {
        out[n][2 * i] *= keep;
        out[n][2 * i + 1] *= keep;
      }
    }
  }
};

}  // namespace armt::cuda
