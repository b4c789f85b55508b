"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(target: Path, mode: int = 0o666) -> Iterator[Path]:
    """A path to write to; it becomes ``target`` only when all went well, and is on disk then.
    ``mode`` as for os.open, before the umask. FileNotFoundError where there is no such folder."""
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: the folder {target.parent} does not exist")
    path = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)):
            pass
        yield path
        with path.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(path, target)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
