#include "cpu/isa.h"

#include "armt/error.h"

namespace armt::cpu {

namespace baseline {
extern const Kernels kKernels;
}
#ifdef ARMT_X86
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

namespace {

// From the least to the best.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found{&baseline::kKernels};
#ifdef ARMT_X86
  // Each processor with these has the rest of x86-64-v3 (f16c, lzcnt, movbe) too.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v3) found.push_back(&avx2::kKernels);
  if (v4) found.push_back(&avx512::kKernels);
#endif
  return found;
}

}  // namespace

const Kernels& kernels_for(const std::string& isa) {
  const auto found = available();
  if (isa.empty()) return *found.back();
  std::string names;
  for (const Kernels* kernels : found) {
    if (isa == kernels->name) return *kernels;
    names += names.empty() ? kernels->name : std::string(", ") + kernels->name;
  }
  throw InvalidArgument("isa: found '" + isa + "', expected one that this processor can run: " + names +
                        "; leave it empty to take the best");
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
  return names;
}

}  // namespace armt::cpu
