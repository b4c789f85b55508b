"""Small files of the session folder: records beside the states, and a lock."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from armt.errors import InvalidArgument
from armt.files import whole_file

FIELDS: Mapping[str, type] = {
    "id": str,
    "owner": str,
    "created": int,
    "version": int,
    "tokens": int,
    "segments": int,
    "open_tokens": int,
}
LARGEST = 1 << 16


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Replaces ``path`` as a whole; mode 0600."""
    with whole_file(path, mode=0o600) as file:
        file.write_text(json.dumps(record), encoding="utf-8")


def read_record(path: Path) -> dict[str, Any] | None:
    """A record with all its fields; None for anything else."""
    try:
        if path.is_symlink() or path.stat().st_size > LARGEST:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or set(found) != set(FIELDS):
        return None
    if any(type(found[name]) is not kind for name, kind in FIELDS.items()):
        return None
    return found


class FolderLock:
    """Keeps a second server out of a session folder, as long as this process lives."""

    def __init__(self, folder: Path) -> None:
        """InvalidArgument if another process holds it."""
        import fcntl

        self._handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._handle)
            raise InvalidArgument(
                f"--session-dir: {folder}: another server uses this folder; give each its own"
            ) from error

    def release(self) -> None:
        """Lets others in."""
        os.close(self._handle)
