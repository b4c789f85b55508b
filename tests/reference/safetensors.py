"""A minimal safetensors reader and writer: 8 bytes of header length, JSON header, raw data."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Array, as_float64

NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def to_bfloat16_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Round to nearest even, as the upper half of the float32 bits."""
    bits = np.asarray(values, dtype="<f4").view("<u4")
    rounded: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded


def from_bfloat16_bits(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 numbers with these upper halves."""
    return (bits.astype("<u4") << 16).view("<f4")


def round_to(values: Array, dtype: str) -> Array:
    """The float64 values of what a file of this type stores."""
    if dtype == "BF16":
        return as_float64(from_bfloat16_bits(to_bfloat16_bits(values)))
    return as_float64(values.astype(NUMPY_TYPES[dtype]))


def read_safetensors(path: Path) -> dict[str, Array]:
    """All tensors of a file, as float64."""
    data = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in NUMPY_TYPES:
            raise ValueError(
                f"{path.name}: {name} has type {entry['dtype']}, expected one of {[*NUMPY_TYPES]}"
            )
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        raw = np.frombuffer(data[begin:end], dtype=NUMPY_TYPES[entry["dtype"]])
        raw = raw.reshape(entry["shape"])
        tensors[name] = as_float64(from_bfloat16_bits(raw) if entry["dtype"] == "BF16" else raw)
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]], *, dtype: str) -> None:
    """Stores all tensors with one element type of NUMPY_TYPES."""
    header, blobs, offset = {}, [], 0
    for name, values in sorted(tensors.items()):
        array = np.asarray(values)
        stored = to_bfloat16_bits(array) if dtype == "BF16" else array.astype(NUMPY_TYPES[dtype])
        blob = np.ascontiguousarray(stored).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
