"""Exceptions of the package, each under the built-in that a Python user expects.

``InvalidArgument``, ``CheckpointError`` and ``StateError`` are ValueErrors, ``DeviceError`` is a
RuntimeError, ``OutOfMemory`` a MemoryError, ``NonFiniteError`` (infinities or NaNs where numbers
were expected) a FloatingPointError. After any of them engine and sessions are as before.
"""

from armt._core import (
    CheckpointError,
    DeviceError,
    InvalidArgument,
    NonFiniteError,
    OutOfMemory,
    StateError,
)

__all__ = [
    "CheckpointError",
    "DeviceError",
    "InvalidArgument",
    "NonFiniteError",
    "OutOfMemory",
    "StateError",
]
