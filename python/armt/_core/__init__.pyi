"""
The compiled engine of armt.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing
import typing_extensions
from . import testing
__all__: list[str] = ['CheckpointError', 'DeviceArray', 'DeviceError', 'Engine', 'InvalidArgument', 'NonFiniteError', 'OutOfMemory', 'SafetensorsFile', 'SamplingParams', 'Session', 'State', 'StateError', 'choose', 'cuda_device_count', 'forward', 'run_many', 'run_on_device', 'testing', 'uniform']
class InvalidArgument(ValueError):
    pass
class CheckpointError(ValueError):
    pass
class StateError(ValueError):
    pass
class DeviceError(RuntimeError):
    pass
class NonFiniteError(FloatingPointError):
    pass
class OutOfMemory(MemoryError):
    pass
class SafetensorsFile:
    """
    A memory-mapped safetensors file, checked when it is opened.
    """
    def __init__(self, path: typing.Any) -> None:
        """
        Raises CheckpointError that lists every fault of the header.
        """
    def info(self, name: str) -> tuple[str, tuple]:
        """
        (dtype, shape) with dtype such as "float32" or "bfloat16".
        """
    def names(self) -> list:
        """
        Names of all tensors, in the order of the header.
        """
    def tensor(self, name: str) -> numpy.ndarray:
        """
        The tensor as a read-only array over the mapped file; bfloat16 as uint16.
        """
    @property
    def metadata(self) -> dict[str, str]:
        """
        The header's free text fields.
        """
class State:
    """
    All that passes from one call to the next, frozen. From a session it shares memory with it until that moves on; loaded it lies in host memory.
    """
    @staticmethod
    def from_bytes(data: typing.Any) -> State:
        """
        The reverse of to_bytes; StateError for anything that is not whole and unchanged.
        """
    @staticmethod
    def load(path: typing.Any) -> State:
        """
        Reads a state file; StateError for anything that is not whole and unchanged.
        """
    def __repr__(self) -> str:
        ...
    def memory(self, layer: typing.SupportsInt | typing.SupportsIndex) -> tuple:
        """
        (A, z): A [heads, features, values] and z [heads, features] float32, zeros before the first write. z is None in a model without a denominator; for RMT A is empty.
        """
    def recall(self, layer: typing.SupportsInt | typing.SupportsIndex, features: typing.Annotated[numpy.typing.ArrayLike, numpy.float32]) -> numpy.typing.NDArray[numpy.float32]:
        """
        [heads, values]: what the layer's memory holds for a key's features [heads, features]: A^T f / (z . f + 1e-5), or A^T f in a model without a denominator.
        """
    def save(self, path: typing.Any) -> None:
        """
        Writes a state file: the old file or the new one is there at any moment, never a torn one. Mode 0600; symbolic links and folders are refused.
        """
    def to_bytes(self) -> bytes:
        """
        The whole state in the documented state file format.
        """
    def write_statistics(self, layer: typing.SupportsInt | typing.SupportsIndex) -> typing.Any:
        """
        mean_gamma, min_gamma, max_gamma and mean_beta of the last write, or None before the first.
        """
    def written(self, layer: typing.SupportsInt | typing.SupportsIndex) -> bool:
        """
        Whether the layer's memory was ever written.
        """
    @property
    def facts(self) -> dict:
        """
        Settings and fingerprint of the model that the state belongs to, by name.
        """
    @property
    def layers(self) -> int:
        """
        Layers of the model.
        """
    @property
    def memory_tokens(self) -> typing.Any:
        """
        RMT: [memory tokens, d_model] carried from the last closed segment; else None.
        """
    @property
    def nbytes(self) -> int:
        """
        Bytes that the state holds, on its device or in host memory, shared or not.
        """
    @property
    def open_tokens(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [tokens] int32: ids of the open segment.
        """
    @property
    def segments(self) -> int:
        """
        Segments written to memory.
        """
    @property
    def tokens(self) -> int:
        """
        Tokens read, fed and generated.
        """
    @property
    def version(self) -> int:
        """
        Counts the calls that changed the stream.
        """
class Engine:
    """
    One model's weights on one device.
    """
    def __init__(self, *, decoder: dict, memory: dict, device: str = 'cpu', dtype: str = 'float32', threads: typing.SupportsInt | typing.SupportsIndex = 0, schedule: str = 'auto', isa: str = '', on_nonfinite: str = 'raise', prefill_dtype: str = 'same', memory_limit: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        ...
    def finish_loading(self) -> None:
        ...
    def load_matrix(self, slot: str, layer: typing.SupportsInt | typing.SupportsIndex, array: numpy.ndarray, dtype: str) -> None:
        ...
    def load_vector(self, slot: str, layer: typing.SupportsInt | typing.SupportsIndex, values: typing.Annotated[numpy.typing.ArrayLike, numpy.float32]) -> None:
        ...
    def read_dlpack(self, capsule: typing_extensions.CapsuleType) -> numpy.ndarray:
        """
        Integers in the memory of the engine's GPU as an array of NumPy; from __dlpack__(stream=engine.stream).
        """
    def stats(self) -> dict[str, typing.Any]:
        ...
    @property
    def association_bytes(self) -> int:
        ...
    @property
    def description(self) -> str:
        ...
    @property
    def device(self) -> str:
        ...
    @property
    def dtype(self) -> str:
        ...
    @property
    def prefill_dtype(self) -> str:
        ...
    @property
    def segment_size(self) -> int:
        ...
    @property
    def stream(self) -> int:
        ...
    @property
    def threads(self) -> int:
        ...
    @property
    def vocab_size(self) -> int:
        ...
class DeviceArray:
    """
    Float32 values in the memory of an engine's device.
    """
    def __array__(self, dtype: typing.Any = None, copy: typing.Any = None) -> numpy.typing.NDArray[numpy.float32]:
        ...
    def __dlpack__(self, *, stream: typing.Any = None, max_version: typing.Any = None, dl_device: typing.Any = None, copy: typing.Any = None) -> typing_extensions.CapsuleType:
        ...
    def __dlpack_device__(self) -> tuple[int, int]:
        ...
    @property
    def device(self) -> str:
        ...
    @property
    def shape(self) -> tuple:
        ...
class SamplingParams:
    def __init__(self, *, temperature: typing.SupportsFloat | typing.SupportsIndex = 0.0, top_k: typing.SupportsInt | typing.SupportsIndex = 0, top_p: typing.SupportsFloat | typing.SupportsIndex = 1.0, min_p: typing.SupportsFloat | typing.SupportsIndex = 0.0, repetition_penalty: typing.SupportsFloat | typing.SupportsIndex = 1.0) -> None:
        ...
class Session:
    """
    One stream over a shared engine.
    """
    @typing.overload
    def __init__(self, engine: Engine) -> None:
        ...
    @typing.overload
    def __init__(self, engine: Engine, state: State) -> None:
        ...
    def close(self, wipe: bool = False) -> None:
        ...
    def close_segment(self, progress: typing.Any = None) -> None:
        ...
    def fork(self) -> Session:
        ...
    def last_logits(self) -> numpy.typing.NDArray[numpy.float32]:
        ...
    def reset(self) -> None:
        ...
    def rollback(self, state: State) -> None:
        ...
    def score(self, tokens: numpy.ndarray, write: bool, progress: typing.Any = None) -> numpy.typing.NDArray[numpy.float64]:
        ...
    def set_seed(self, seed: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def snapshot(self) -> State:
        ...
    @property
    def closed(self) -> bool:
        ...
    @property
    def open_tokens(self) -> int:
        ...
    @property
    def segments(self) -> int:
        ...
    @property
    def tokens(self) -> int:
        ...
    @property
    def version(self) -> int:
        ...
def choose(sessions: collections.abc.Sequence[Session], params: collections.abc.Sequence[SamplingParams]) -> list[tuple[int, float]]:
    ...
def cuda_device_count() -> int:
    """
    CUDA devices that this build can use (0 without a driver, a GPU or the CUDA part).
    """
def forward(rows: collections.abc.Sequence[tuple[Session, numpy.ndarray]], cuts: collections.abc.Sequence[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]], attention: collections.abc.Sequence[bytes], logits: str, close_last: bool, windowed: bool, progress: typing.Any) -> list[numpy.typing.NDArray[numpy.float32] | None]:
    ...
def run_many(rows: collections.abc.Sequence[tuple[Session, numpy.ndarray]], logits: str, one_segment: bool, write: bool, grow: bool, progress: typing.Any) -> list[numpy.typing.NDArray[numpy.float32] | None]:
    ...
def run_on_device(rows: collections.abc.Sequence[tuple[Session, numpy.ndarray]], logits: str, one_segment: bool, write: bool, progress: typing.Any) -> list[DeviceArray]:
    ...
def uniform(seed: typing.SupportsInt | typing.SupportsIndex, index: typing.SupportsInt | typing.SupportsIndex) -> float:
    """
    Number `index` of the counter-based sequence `seed`, in [0, 1).
    """
