"""File operations of Python code that fail on demand: the n-th one, alone or with all that follow.

What the compiled module does with files is not seen here; ``tests/faults`` makes that fail.
"""

from __future__ import annotations

import errno
import gc
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CALLS: tuple[tuple[Any, str], ...] = (
    (io, "open"),  # what Path.open and os.fdopen call
    (os, "open"),
    (os, "fstat"),
    (os, "fsync"),
    (os, "mkdir"),
    (os, "rename"),
    (os, "replace"),
    (os, "rmdir"),
    (os, "scandir"),
    (os, "sendfile"),
    (os, "unlink"),
)
METHODS = ("read", "readline", "write", "flush")
ERRORS: dict[str, Callable[[], BaseException]] = {
    "disk full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "input/output": lambda: OSError(errno.EIO, "Input/output error"),
    "no memory": lambda: MemoryError("injected"),
}


class Faults:
    """Counts file operations; those from the ``first``-th to the ``last``-th fail."""

    def __init__(self, error: Callable[[], BaseException] | None, first: int, last: int) -> None:
        self._error = error
        self._first = first
        self._last = last
        self.names: list[str] = []

    def point(self, name: str) -> None:
        self.names.append(name)
        if self._error is not None and self._first <= len(self.names) <= self._last:
            raise self._error()


class FaultyFile:
    """A file whose methods can fail; everything else is the file's own."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file = file
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)
        if name not in METHODS:
            return found

        def method(*arguments: Any) -> Any:
            self._faults.point(f"file.{name}")
            return found(*arguments)

        return method

    def __enter__(self) -> FaultyFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


@contextmanager
def failing(
    error: Callable[[], BaseException] | None = None, first: int = 0, last: int = 0
) -> Iterator[Faults]:
    """File operations between ``first`` and ``last``, counted from 1, raise; the others work."""
    faults = Faults(error, first, last)

    def faulty(name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            faults.point(name)
            done = real(*arguments, **options)
            return FaultyFile(done, faults) if name == "open" else done

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            shown = "open" if module is io else f"os.{name}"
            patch.setattr(module, name, faulty(shown, getattr(module, name)))
        patch.setattr("builtins.open", io.open)
        patch.setattr(shutil, "open", io.open, raising=False)
        yield faults


def points(work: Callable[[], object]) -> list[str]:
    """The file operations of ``work``, which must succeed."""
    with failing() as faults:
        work()
    return faults.names


def descriptors() -> int:
    """Open files of this process."""
    return len(os.listdir("/proc/self/fd"))


def closed(opened: int) -> bool:
    """Whether no more files are open than ``opened``."""
    if descriptors() > opened:  # what is still to be collected may hold some
        gc.collect()
    return descriptors() <= opened
