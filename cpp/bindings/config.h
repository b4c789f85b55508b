// Python dictionaries to the engine's configuration.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "armt/config.h"
#include "backend.h"

namespace armt::bindings {

// Keys are the field names of DecoderConfig and MemoryConfig; enumerations are lower-case strings. InvalidArgument
// names unknown keys and values.
ModelConfig config_from(const pybind11::dict& decoder, const pybind11::dict& memory);

DType dtype_from(const std::string& name);
std::string dtype_name(DType dtype);
Matrix matrix_from(const std::string& name);
Vector vector_from(const std::string& name);

}  // namespace armt::bindings
