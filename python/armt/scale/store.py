"""A store of session states that many processes share: bytes with a version, compare-and-set."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

from armt.errors import InvalidArgument, StateError

LONGEST_ID = 256


class VersionConflict(StateError):
    """Somebody else changed the session first; nothing was written."""

    def __init__(self, session_id: str, *, found: int, expected: int) -> None:
        super().__init__(
            f"session {session_id}: found version {found}, expected {expected}: it was changed "
            "meanwhile; read it again and repeat the change"
        )
        self.session_id = session_id
        self.found = found
        self.expected = expected

    def __reduce__(self) -> tuple[object, ...]:
        return _conflict, (self.session_id, self.found, self.expected)


def _conflict(session_id: str, found: int, expected: int) -> VersionConflict:
    return VersionConflict(session_id, found=found, expected=expected)


class SessionMissing(StateError):
    """The store holds no session of that id."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"session {session_id}: there is no such session in the store")
        self.session_id = session_id

    def __reduce__(self) -> tuple[object, ...]:
        return SessionMissing, (self.session_id,)


@dataclass(frozen=True)
class Stored:
    """What the store holds for one session."""

    version: int
    """1 after the first write, one more after each later one."""
    data: bytes


class StateStore(Protocol):
    """What a store must do. Every method may be called from many threads and processes at once.

    A session that does not exist has version 0. An id that was deleted must not be used again:
    versions would start over, and a writer from before could not be told apart.
    """

    def version(self, session_id: str) -> int:
        """The version that is stored now; 0 if there is none."""
        ...

    def get(self, session_id: str) -> Stored:
        """The newest data; SessionMissing if there is none."""
        ...

    def put(self, session_id: str, data: bytes, *, expected: int) -> int:
        """Writes ``data`` if the version stored is ``expected`` (0: none); the new version.

        Raises VersionConflict otherwise. All or nothing, and at most one of several writers that
        expect the same version succeeds.
        """
        ...

    def delete(self, session_id: str) -> bool:
        """Forgets a session; False if there was none."""
        ...

    def ids(self) -> list[str]:
        """Ids of all sessions, sorted."""
        ...


def check_id(session_id: str) -> str:
    """``session_id`` if it can be one: 1 .. 256 printable ASCII characters."""
    if not isinstance(session_id, str) or not 1 <= len(session_id) <= LONGEST_ID:
        raise InvalidArgument(
            f"session id: found {session_id!r:.80}, expected a text of 1 .. {LONGEST_ID} characters"
        )
    if not (session_id.isascii() and session_id.isprintable()):
        raise InvalidArgument(f"session id: found {session_id!r:.80}, expected printable ASCII")
    return session_id


class MemoryStore:
    """States in this process; for tests, and as the inside of a store that is reached by calls."""

    def __init__(self) -> None:
        self._held: dict[str, Stored] = {}
        self._lock = threading.Lock()

    def version(self, session_id: str) -> int:
        """See StateStore."""
        with self._lock:
            return self._version(check_id(session_id))

    def get(self, session_id: str) -> Stored:
        """See StateStore."""
        with self._lock:
            found = self._held.get(check_id(session_id))
        if found is None:
            raise SessionMissing(session_id)
        return found

    def put(self, session_id: str, data: bytes, *, expected: int) -> int:
        """See StateStore."""
        kept = bytes(data)
        with self._lock:
            found = self._version(check_id(session_id))
            if found != expected:
                raise VersionConflict(session_id, found=found, expected=expected)
            self._held[session_id] = Stored(expected + 1, kept)
        return expected + 1

    def delete(self, session_id: str) -> bool:
        """See StateStore."""
        with self._lock:
            return self._held.pop(check_id(session_id), None) is not None

    def ids(self) -> list[str]:
        """See StateStore."""
        with self._lock:
            return sorted(self._held)

    def _version(self, session_id: str) -> int:
        found = self._held.get(session_id)
        return 0 if found is None else found.version
