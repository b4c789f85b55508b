// Activations of the MLP.
#pragma once

#include "armt/config.h"

namespace armt::cuda {

__device__ inline float activated(ActivationKind kind, float x) {
  switch (kind) {
    case ActivationKind::silu:
      return __fdividef(x, 1.0f + __expf(-x));
    case ActivationKind::relu:
      return fmaxf(x, 0.0f);
    case ActivationKind::gelu_erf:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    default:
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  }
}

}  // namespace armt::cuda
