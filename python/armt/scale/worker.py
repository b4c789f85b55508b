"""What one of several processes does with the sessions of a shared store.

Each change of a session is read, computed and written by compare-and-set, so that it does not
matter which process does it. With the state lie the answers of the last requests: a request that is
sent again, because the process that did it died before it could answer, is answered, not repeated.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from armt._core import State
from armt.engine import Engine
from armt.errors import StateError
from armt.scale.store import StateStore, VersionConflict
from armt.session import Session

Answer: TypeAlias = dict[str, Any]
REMEMBERED = 8
"""Requests of a session whose answers are kept for those who ask again."""


@dataclass
class Held:
    """A session as this process knows it; the store decides whether that is still so."""

    id: str
    version: int = 0
    session: Session | None = None
    recent: dict[str, Answer] = field(default_factory=dict)
    """Answers by request, oldest first."""
    lock: threading.Lock = field(default_factory=threading.Lock)


def pack(recent: dict[str, Answer], state: bytes) -> bytes:
    """What lies in the store: a line of JSON, then the state file's bytes."""
    return json.dumps(list(recent.items())).encode() + b"\n" + state


def unpack(data: bytes) -> tuple[dict[str, Answer], State]:
    """The reverse of :func:`pack`; StateError for anything else."""
    line, found, state = data.partition(b"\n")
    try:
        recent = dict(json.loads(line)) if found else None
    except (ValueError, TypeError, RecursionError):
        recent = None
    if recent is None:
        raise StateError("stored session: found no line of answers before the state")
    return recent, State.from_bytes(state)


class Worker:
    """An engine over the sessions of a store."""

    def __init__(self, engine: Engine, store: StateStore) -> None:
        self._engine = engine
        self._store = store

    def create(self, session_id: str) -> int:
        """A new empty session; its version. An id that exists already is left as it is."""
        data = pack({}, self._engine.session().state.to_bytes())
        try:
            return self._store.put(session_id, data, expected=0)
        except VersionConflict as conflict:
            return conflict.found

    def delete(self, session_id: str) -> bool:
        """Forgets a session; False if there was none."""
        return self._store.delete(session_id)

    def look(self, held: Held) -> Answer:
        """Version and sizes of a session."""
        with held.lock:
            return self._facts(self._refresh(held), held.version)

    def ask(self, held: Held, work: Callable[[Session], Answer]) -> Answer:
        """What ``work`` says about a fork of the session, which stays as it is."""
        with held.lock:
            branch = self._refresh(held).fork()
            version = held.version
        with branch:
            return work(branch) | {"version": version}

    def change(
        self,
        held: Held,
        request: str,
        work: Callable[[Session], Answer],
        *,
        if_version: int | None = None,
    ) -> Answer:
        """Does ``work`` on the session and stores the outcome, once for each ``request``.

        Where another process was faster the work is done again on top of its outcome, but with
        ``if_version`` VersionConflict is raised. After an error the session is as it was.
        """
        with held.lock:
            while True:
                session = self._refresh(held)
                if request in held.recent:
                    return held.recent[request]
                if if_version is not None and if_version != held.version:
                    raise VersionConflict(held.id, found=held.version, expected=if_version)
                branch = session.fork()
                answer = work(branch) | self._facts(branch, held.version + 1)
                recent = dict(list(held.recent.items())[1 - REMEMBERED :]) | {request: answer}
                data = pack(recent, branch.state.to_bytes())
                try:
                    held.version = self._store.put(held.id, data, expected=held.version)
                except VersionConflict:
                    continue
                held.session, held.recent = branch, recent
                return answer

    def _refresh(self, held: Held) -> Session:
        """The session of the newest version; SessionMissing if there is none."""
        if held.session is not None and self._store.version(held.id) == held.version:
            return held.session
        stored = self._store.get(held.id)
        held.recent, state = unpack(stored.data)
        held.session = self._engine.session(state=state)
        held.version = stored.version
        return held.session

    def _facts(self, session: Session, version: int) -> Answer:
        return {"version": version, "tokens": session.tokens, "segments": session.segments}
