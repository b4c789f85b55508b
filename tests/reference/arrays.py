"""Array types and the reshapes that attention and memory share."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Ints: TypeAlias = npt.NDArray[np.int64]


def as_float64(values: npt.NDArray[Any]) -> Array:
    """The same numbers in float64."""
    return np.asarray(values, dtype=np.float64)


def split_heads(x: Array, heads: int) -> Array:
    """[B, R, heads * n] -> [B, heads, R, n]: contiguous pieces."""
    batch, rows, width = x.shape
    split: Array = x.reshape(batch, rows, heads, width // heads).transpose(0, 2, 1, 3)
    return split


def merge_heads(x: Array) -> Array:
    """[B, heads, R, n] -> [B, R, heads * n]."""
    batch, heads, rows, width = x.shape
    merged: Array = x.transpose(0, 2, 1, 3).reshape(batch, rows, heads * width)
    return merged
