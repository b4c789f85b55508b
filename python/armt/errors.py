"""Exceptions of the package, each under the built-in that a Python user expects.

``InvalidArgument``, ``CheckpointError`` and ``StateError`` are ValueErrors, ``DeviceError`` is a
RuntimeError, ``OutOfMemory`` a MemoryError. After any of them engine and sessions are as before.
"""

from armt._core import CheckpointError, DeviceError, InvalidArgument, OutOfMemory, StateError

__all__ = ["CheckpointError", "DeviceError", "InvalidArgument", "OutOfMemory", "StateError"]
