"""Writing a safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from armt.checkpoint.arrays import ITEM_BYTES, Array

STORED_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DATA_ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """One tensor to be written; ``read`` gives its values, bfloat16 as uint16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Array]


def write_tensors(path: Path, entries: Iterable[Entry], form: str) -> None:
    """Writes ``path``, and waits for the disk; one tensor at a time is in memory.

    ``form`` goes into the metadata under "format". Wide elements come first, so that every tensor
    is aligned to its own element size.
    """
    order = sorted(entries, key=lambda entry: -ITEM_BYTES[entry.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": form}}
    offset = 0
    for entry in order:
        end = offset + int(np.prod(entry.shape, dtype=np.int64)) * ITEM_BYTES[entry.dtype]
        header[entry.name] = {
            "dtype": STORED_TYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in order:
            file.write(np.ascontiguousarray(entry.read()).data)
        file.flush()
        os.fsync(file.fileno())
