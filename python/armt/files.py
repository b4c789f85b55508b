"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(target: Path, mode: int = 0o666) -> Iterator[Path]:
    """A path to write to; it becomes ``target`` only when all went well, and is on disk then.
    ``mode`` as for os.open, before the umask. FileNotFoundError where there is no such folder."""
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: the folder {target.parent} does not exist")
    prefix = f".{target.name}."
    with tempfile.NamedTemporaryFile(prefix=prefix, dir=target.parent, delete=False) as file:
        path = Path(file.name)
    try:
        yield path
        os.chmod(path, mode & ~_umask())
        with path.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(path, target)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
