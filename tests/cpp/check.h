// The little that these programs need of a test framework.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

inline int failures = 0;

inline void check(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  if (failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

inline void check_near(double found, double expected, double tolerance, const std::string& what) {
  const bool same = (std::isnan(found) && std::isnan(expected)) || found == expected;
  check(same || std::abs(found - expected) <= tolerance,
        what + ": found " + std::to_string(found) + ", expected " + std::to_string(expected) +
            ", off by " + std::to_string(std::abs(found - expected) / tolerance) + " tolerances");
}

inline int report(const char* program) {
  std::printf("%s: %s\n", program,
              failures == 0 ? "passed" : (std::to_string(failures) + " failures").c_str());
  return failures == 0 ? 0 : 1;
}
