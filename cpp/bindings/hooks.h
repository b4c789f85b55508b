// What runs between segments of a long call: Ctrl-C and the caller's progress function.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>

#include "engine/engine.h"

namespace armt::bindings {

// `progress` is None or a callable that receives the tokens done so far. Both are looked at twenty times a second at
// most, so that short segments do not pay for them. Call without the GIL.
inline RunHooks make_hooks(const pybind11::object& progress) {
  using Clock = std::chrono::steady_clock;
  static constexpr auto kPause = std::chrono::milliseconds(50);
  RunHooks hooks;
  hooks.progress = [&progress, next = Clock::now() + kPause](int64_t tokens) mutable {
    if (Clock::now() < next) return;
    pybind11::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
    if (!progress.is_none()) progress(tokens);
    next = Clock::now() + kPause;
  };
  return hooks;
}

}  // namespace armt::bindings
