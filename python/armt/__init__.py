"""armt: inference for transformers with recurrent associative memory, in constant memory."""

from importlib.metadata import PackageNotFoundError, version

from armt._core import State
from armt.engine import Engine, ForwardOutput
from armt.errors import (
    CheckpointError,
    DeviceError,
    InvalidArgument,
    NonFiniteError,
    OutOfMemory,
    StateError,
)
from armt.session import Generation, Session, StepOutput

try:
    __version__ = version("armt")
except PackageNotFoundError:  # imported from a build folder
    __version__ = "0+unknown"

__all__ = [
    "CheckpointError",
    "DeviceError",
    "Engine",
    "ForwardOutput",
    "Generation",
    "InvalidArgument",
    "NonFiniteError",
    "OutOfMemory",
    "Session",
    "State",
    "StateError",
    "StepOutput",
    "__version__",
]
