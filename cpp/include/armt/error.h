// The exceptions that reach a caller. Assertions are for our own bugs; these are for the user's input, a file or
// a device. A message says where, what was found, what was expected and what to do.
#pragma once

#include <stdexcept>
#include <string>

namespace armt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct InvalidArgument : Error {  // Python: ValueError
  using Error::Error;
};

struct CheckpointError : Error {  // Python: ValueError
  using Error::Error;
};

struct StateError : Error {  // Python: ValueError
  using Error::Error;
};

struct DeviceError : Error {  // Python: RuntimeError
  using Error::Error;
};

struct NonFinite : Error {  // Python: FloatingPointError
  using Error::Error;
};

struct OutOfMemory : Error {  // Python: MemoryError
  using Error::Error;
};

}  // namespace armt
