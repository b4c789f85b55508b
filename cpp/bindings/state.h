// A stream's state as a Python object: taken from a session, or read from bytes or a file.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "engine/host_state.h"
#include "engine/session.h"

namespace armt::bindings {

// Never changes, so any number of threads may use one.
class PyState {
 public:
  explicit PyState(Snapshot snapshot) : value_(std::move(snapshot)) {}
  explicit PyState(HostState state) : value_(std::move(state)) {}

  // For rollback: StateError for a state that was loaded.
  const Snapshot& snapshot() const;
  // To continue from on `engine`, sharing memory where the state lies on that engine already. Call
  // with the GIL, which long work gives up. StateError that names each fact that differs.
  StreamState stream(Engine& engine) const;

  // Calls use(const HostState&); a session's state is fetched from the device for it.
  template <class Use>
  auto with_host(const Use& use) const {
    if (const auto* host = std::get_if<HostState>(&value_)) return use(*host);
    return use(to_host(std::get<Snapshot>(value_)));
  }
  // Calls use(state) with the StreamState or HostState, for the members that both have.
  template <class Use>
  auto with_members(const Use& use) const {
    if (const auto* host = std::get_if<HostState>(&value_)) return use(*host);
    return use(std::get<Snapshot>(value_).state);
  }

  const ModelConfig& config() const;
  StateFacts facts() const;
  // InvalidArgument for a layer that is not there.
  LayerMemory memory(int64_t layer) const;
  bool memory_written(int64_t layer) const;
  std::vector<float> memory_tokens() const;  // [m, D] or empty
  int64_t bytes() const;                     // held, on the device or in host memory

 private:
  void check_layer(int64_t layer) const;

  std::variant<Snapshot, HostState> value_;
};

}  // namespace armt::bindings
