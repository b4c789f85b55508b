"""Token ids from whatever the caller has: lists, NumPy, or anything with ``__dlpack__``.

A tensor in host memory is read in place. One on the engine's own GPU is fetched in the order of its
stream (DLPack's ``stream`` argument); one on any other device is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from armt import _core
from armt.errors import InvalidArgument

IdArray: TypeAlias = npt.NDArray[np.integer[Any]]
TokenIds: TypeAlias = "Sequence[int] | npt.NDArray[np.integer[Any]] | Any"

_CUDA_DEVICES = (2, 13)  # DLPack's kinds: memory of a GPU, managed memory


def on_gpu(values: Any) -> bool:
    """Whether ``values`` lie in a GPU's memory."""
    device = getattr(values, "__dlpack_device__", None)
    return device is not None and int(device()[0]) in _CUDA_DEVICES


def fetched(values: Any, name: str, engine: _core.Engine | None) -> npt.NDArray[Any]:
    """Integers or booleans on the engine's GPU, in host memory; InvalidArgument for other GPUs."""
    device = f"cuda:{int(values.__dlpack_device__()[1])}"
    expected = "host memory" if engine is None else f"host memory or {engine.device}"
    if engine is None or engine.device != device:
        raise InvalidArgument(
            f"{name}: found a tensor on {device}, expected one in {expected}; move it there"
        )
    return engine.read_dlpack(values.__dlpack__(stream=engine.stream))


def as_array(
    values: TokenIds, *, name: str = "token ids", engine: _core.Engine | None = None
) -> IdArray:
    """``values`` as an integer array of any rank, without a copy where none is needed.

    Raises InvalidArgument for other types (floats, booleans, text, ragged lists).
    """
    if isinstance(values, (str, bytes)):
        raise InvalidArgument(f"{name}: found text, expected integers; encode it with a tokenizer")
    if isinstance(values, np.ndarray):
        array = values
    elif hasattr(values, "__dlpack__"):
        array = _from_dlpack(values, name, engine)
    else:
        array = _from_iterable(values, name)
    if array.size == 0:
        raise InvalidArgument(f"{name}: the input is empty, expected at least one token")
    if array.dtype.kind not in "iu":
        raise InvalidArgument(f"{name}: found dtype {array.dtype}, expected an integer type")
    return array


def as_ids(
    values: TokenIds, *, name: str = "token ids", engine: _core.Engine | None = None
) -> IdArray:
    """``values`` as an integer array [tokens]; ``engine`` reads tensors on its own GPU."""
    array = as_array(values, name=name, engine=engine)
    if array.ndim != 1:
        raise InvalidArgument(f"{name}: found shape {array.shape}, expected one dimension [tokens]")
    return array


def _from_dlpack(values: Any, name: str, engine: _core.Engine | None) -> npt.NDArray[Any]:
    if on_gpu(values):
        return fetched(values, name, engine)
    try:
        return np.from_dlpack(values)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{name}: the array cannot be read from host memory ({error}); move it to the CPU first"
        ) from error


def _from_iterable(values: Any, name: str) -> npt.NDArray[Any]:
    if not isinstance(values, Iterable):
        raise InvalidArgument(f"{name}: found {type(values).__name__}, expected integers")
    items = values if isinstance(values, Sequence) else list(values)
    try:
        return np.asarray(items)
    except (ValueError, OverflowError) as error:
        raise InvalidArgument(f"{name}: found rows of unequal length, expected integers") from error
