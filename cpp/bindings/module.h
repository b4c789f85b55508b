// One register function for each binding file.
#pragma once

#include <pybind11/pybind11.h>

namespace armt::bindings {

void bind_dlpack(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_session(pybind11::module_& m);
void bind_state(pybind11::module_& m);
void bind_safetensors(pybind11::module_& m);
void bind_testing(pybind11::module_& m);

}  // namespace armt::bindings
