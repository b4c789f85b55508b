"""Element types of weights. bfloat16 travels as uint16, the upper halves of float32 numbers."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Float32: TypeAlias = npt.NDArray[np.float32]

FLOATS = ("float64", "float32", "bfloat16", "float16")
"""Types that a stored weight may have."""
KEPT = ("float32", "bfloat16", "float16")
"""Types that are handed on as they are; others become float32."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def to_float32(array: Array, dtype: str) -> Float32:
    """The same values as float32, without a copy if they are float32 already."""
    if dtype == "bfloat16":
        wide: Float32 = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return wide
    return np.asarray(array, dtype=np.float32)


def from_float32(values: Float32, dtype: str) -> Array:
    """``values`` rounded to the nearest ``dtype``, ties to even."""
    if dtype != "bfloat16":
        return np.asarray(values, dtype=dtype)
    bits = np.ascontiguousarray(values).view(np.uint32)
    # A carry out of a NaN's mantissa would make it an infinity or flip its sign.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    result: Array = np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
    return result


def convert(array: Array, dtype: str, wanted: str) -> Array:
    """``array`` as ``wanted``, one of KEPT."""
    if dtype == wanted:
        return array
    return from_float32(to_float32(array, dtype), wanted)
