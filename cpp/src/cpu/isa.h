// Which kernels to run, chosen by what this processor can do.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace armt::cpu {

// "" = the best available; "baseline", "avx2", "avx512". Throws InvalidArgument for a name that is
// unknown or that this processor can't run.
const Kernels& kernels_for(const std::string& isa);
std::vector<std::string> available_isas();  // from the least to the best

}  // namespace armt::cpu
