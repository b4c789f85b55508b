"""The store in a folder that processes, or machines, share.

One file a session, named by a hash of its id: a line of JSON (format, id, version, length, CRC-32),
then the data. A file is replaced as a whole, so readers need no lock; writers of the same session
take turns by a lock on one of 64 lock files. The folder's file system must have POSIX locks between
all who write: local disks and NFS 4 do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from armt.errors import InvalidArgument, StateError
from armt.scale.store import SessionMissing, Stored, VersionConflict, check_id

FORMAT = "armt-session-1"
SUFFIX = ".armt-session"
LOCKS = 64
LONGEST_HEADER = 4096
WAIT = 0.002
UNFINISHED = ".write-"
ABANDONED = 3600.0
"""Seconds after which an unfinished file is nobody's."""


class FolderStore:
    """States in a folder. Can be pickled: another process then works on the same folder."""

    def __init__(
        self, path: str | os.PathLike[str], *, durable: bool = True, lock_timeout: float = 30.0
    ) -> None:
        """``durable=False`` leaves out fsync: faster, but a power cut may lose the last writes.

        Where the file system fails, every method raises its OSError; the folder then holds either
        the old version or the new one, whole.
        A writer that does not get its turn within ``lock_timeout`` seconds raises StateError.
        """
        self._path = Path(os.path.abspath(path))
        self._durable = durable
        self._lock_timeout = lock_timeout
        try:
            (self._path / "locks").mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgument(f"store: {self._path}: {error.strerror}") from error
        self._tidy()

    @property
    def path(self) -> Path:
        """The folder."""
        return self._path

    def version(self, session_id: str) -> int:
        """See StateStore."""
        try:
            with self._file(session_id).open("rb") as file:
                return int(self._header(file, session_id)["version"])
        except FileNotFoundError:
            return 0

    def get(self, session_id: str) -> Stored:
        """See StateStore. StateError if the file is damaged."""
        try:
            with self._file(session_id).open("rb") as file:
                header = self._header(file, session_id)
                data = file.read()
        except FileNotFoundError:
            raise SessionMissing(session_id) from None
        if len(data) != header["bytes"] or zlib.crc32(data) != header["crc"]:
            raise StateError(
                f"session {session_id}: {self._file(session_id).name} is damaged: found "
                f"{len(data)} bytes, expected {header['bytes']} with CRC {header['crc']:08x}"
            )
        return Stored(int(header["version"]), data)

    def put(self, session_id: str, data: bytes, *, expected: int) -> int:
        """See StateStore."""
        target = self._file(session_id)
        header = {
            "format": FORMAT,
            "id": session_id,
            "version": expected + 1,
            "bytes": len(data),
            "crc": zlib.crc32(data),
        }
        found = self.version(session_id)
        if found != expected:  # spares the writing where it is in vain
            raise VersionConflict(session_id, found=found, expected=expected)
        with tempfile.NamedTemporaryFile(prefix=UNFINISHED, dir=self._path, delete=False) as file:
            try:
                file.write(json.dumps(header).encode() + b"\n")
                file.write(data)
                file.flush()
                if self._durable:
                    os.fsync(file.fileno())
                with self._locked(target):
                    found = self.version(session_id)
                    if found != expected:
                        raise VersionConflict(session_id, found=found, expected=expected)
                    os.replace(file.name, target)
                    if self._durable:
                        self._sync()
            finally:
                Path(file.name).unlink(missing_ok=True)
        return expected + 1

    def delete(self, session_id: str) -> bool:
        """See StateStore."""
        target = self._file(session_id)
        with self._locked(target):
            try:
                target.unlink()
            except FileNotFoundError:
                return False
        return True

    def ids(self) -> list[str]:
        """See StateStore. Files that are no session's are left out."""
        found = []
        for path in self._path.glob(f"*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError, StateError), path.open("rb") as file:
                found.append(str(self._header(file, None)["id"]))
        return sorted(found)

    def _file(self, session_id: str) -> Path:
        name = hashlib.sha256(check_id(session_id).encode()).hexdigest()
        return self._path / f"{name}{SUFFIX}"

    def _header(self, file: IO[bytes], session_id: str | None) -> dict[str, Any]:
        """The first line, checked; the file then stands at the data."""
        try:
            found: Any = json.loads(file.readline(LONGEST_HEADER))
        except (ValueError, RecursionError):
            found = None
        if not _is_header(found) or found["id"] != (session_id or found["id"]):
            raise StateError(
                f"{getattr(file, 'name', 'session file')}: found no header of {FORMAT}"
                + (f" for session {session_id}" if session_id else "")
                + "; it is damaged or of another program"
            )
        header: dict[str, Any] = found
        return header

    @contextlib.contextmanager
    def _locked(self, target: Path) -> Iterator[None]:
        """The turn to write ``target``; freed by the system if this process dies."""
        import fcntl

        lock = self._path / "locks" / f"{int(target.name[:2], 16) % LOCKS:02d}"
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            end = time.monotonic() + self._lock_timeout
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise StateError(
                            f"store: {lock}: another process has held this lock for "
                            f"{self._lock_timeout:g} s; is it stopped?"
                        ) from None
                    time.sleep(WAIT)
            yield
        finally:
            os.close(handle)

    def _tidy(self) -> None:
        """Removes what writers that were killed have left."""
        for path in self._path.glob(f"{UNFINISHED}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()

    def _sync(self) -> None:
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_header(found: Any) -> bool:
    kinds = {"format": str, "id": str, "version": int, "bytes": int, "crc": int}
    return (
        isinstance(found, dict)
        and all(type(found.get(name)) is kind for name, kind in kinds.items())
        and found["format"] == FORMAT
    )
