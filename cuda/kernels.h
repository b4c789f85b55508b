// Launches of kernels that host files call.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "armt/config.h"
#include "meta.h"

namespace armt::cuda {

// out = act(gate) * up, rows of `up` are [gate, up].
void launch_gate(DType dtype, ActivationKind kind, const Batch& batch, const View& up, const View& out,
                 cudaStream_t stream);
// rows = act(rows)
void launch_activate(DType dtype, ActivationKind kind, const Batch& batch, const View& rows, cudaStream_t stream);

// Whether this build has machine code for the current device.
bool runs_here();

}  // namespace armt::cuda
