// The exchange of arrays with other libraries by DLPack: token ids in, logits out, both on the engine's device.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/engine.h"

namespace armt::bindings {

// Float32 [shape], row-major, in device memory of an engine, complete when a caller gets it.
class DeviceArray {
 public:
  DeviceArray(std::shared_ptr<Engine> engine, std::vector<int64_t> shape);
  DeviceArray(const DeviceArray&) = default;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray();

  const std::vector<int64_t>& shape() const { return shape_; }
  Engine& engine() const { return *engine_; }
  Block& block() const { return *block_; }

 private:
  std::shared_ptr<Engine> engine_;  // outlives the block
  BlockRef block_;
  std::vector<int64_t> shape_;
};

// A DLPack device: (type, number).
std::pair<int32_t, int32_t> dlpack_device(const Engine& engine);

// Integers that another library has put on the engine's GPU, in host memory. The capsule comes from
// __dlpack__(stream=stream_handle()), so that the engine's stream runs after what made them.
pybind11::array read_dlpack(const Engine& engine, const pybind11::capsule& capsule);

}  // namespace armt::bindings
