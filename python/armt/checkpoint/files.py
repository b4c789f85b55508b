"""Reading small JSON files and names of files, both of which may be hostile."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from armt.errors import CheckpointError

MAX_JSON_BYTES = 64_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Refuses duplicate keys, NaN and anything but a regular file."""
    try:
        found = json.loads(
            _read_bytes(path),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
        )
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{path}: not a valid JSON file: {reason}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: found {type(found).__name__}, expected a JSON object")
    return found


def _read_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=_open_now) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: expected a regular file")
            if status.st_size > MAX_JSON_BYTES:
                raise CheckpointError(
                    f"{path}: found {status.st_size} bytes, expected at most {MAX_JSON_BYTES}"
                )
            return file.read(MAX_JSON_BYTES + 1)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened or read: {error}") from error


def _open_now(path: str, flags: int) -> int:
    """Of a named pipe too: it would wait for a writer otherwise."""
    return os.open(path, flags | os.O_NONBLOCK)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} stands there twice")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"found {name}, expected a number")


def inner_path(folder: Path, name: Any, *, where: str) -> Path:
    """``folder / name`` for a name read from a file, which must not lead out of the folder.

    The check is on the name alone: caches of downloaded models are full of honest symbolic links.
    """
    if isinstance(name, str):
        pure = PurePosixPath(name)
        plain = pure.name != "" and not any(c in name for c in "\\\0")
        if plain and not pure.is_absolute() and ".." not in pure.parts:
            return folder / pure
    raise CheckpointError(
        f"{where}: found the file name {name!r}, expected one inside {folder}"
        " (no absolute path, no '..')"
    )
