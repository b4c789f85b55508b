"""Sessions by opaque id: the ones in use in memory, the idle ones as state files."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from armt._core import State
from armt.engine import Engine
from armt.errors import InvalidArgument, StateError
from armt.server.errors import ApiError
from armt.server.files import FolderLock, read_record, write_record
from armt.server.settings import Settings
from armt.session import Session

log = logging.getLogger("armt.server")

ID = re.compile(r"sess_[0-9a-f]{32}")
FILE = re.compile(r"[0-9a-f]{32}")


@dataclass(eq=False)
class Entry:
    """One session of a client, in memory, on disk, or both."""

    id: str
    owner: str
    created: int
    used: float
    version: int = 0
    """Counts the requests that changed it."""
    tokens: int = 0
    segments: int = 0
    open_tokens: int = 0
    session: Session | None = None
    file: str | None = None
    """Name of its files in the folder, without what stands behind the point."""
    changed: bool = False
    """Whether it differs from its file."""
    pins: int = 0
    writing: bool = False
    deleted: bool = False
    moving: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the state moves between memory and disk."""

    def note(self) -> None:
        """Takes the numbers that are shown from the session."""
        assert self.session is not None
        self.tokens = self.session.tokens
        self.segments = self.session.segments
        self.open_tokens = self.session.open_tokens


@dataclass
class Change:
    """A change of a session that is under way."""

    session: Session
    """What the session becomes; may be exchanged."""


class Store:
    """All sessions. Everything here runs in the event loop; files are written in threads."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._entries: dict[str, Entry] = {}
        self._live: OrderedDict[str, Entry] = OrderedDict()
        self._counts: dict[str, int] = {}
        self._folder: Path | None = None
        self._lock: FolderLock | None = None
        self.evicted = 0
        self.restored = 0

    # -------------------------------------------------------------- start and end

    def open(self) -> None:
        """Finds the sessions of an earlier run; opening twice is fine.

        Raises InvalidArgument if the folder cannot be used or another server uses it.
        """
        if self._folder is not None:
            return
        wanted = self._settings.session_dir
        if wanted is None:
            self._folder = Path(tempfile.mkdtemp(prefix="armt-sessions-"))
            return
        lock = None
        try:
            wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = FolderLock(wanted)
            found = self._found(wanted)
        except BaseException as error:
            if lock is not None:
                lock.release()
            if isinstance(error, OSError):
                raise InvalidArgument(f"--session-dir: {wanted}: {error.strerror}") from error
            raise
        self._lock, self._folder = lock, wanted
        for entry in found:
            self._enter(entry)

    def _found(self, folder: Path) -> list[Entry]:
        """The sessions that a folder holds."""
        found = []
        for path in folder.glob("*.json"):
            record = read_record(path) if FILE.fullmatch(path.stem) else None
            if record is None or not ID.fullmatch(str(record.get("id"))):
                log.warning("a file in the session folder is no session's; it is left alone")
                continue
            found.append(Entry(file=path.stem, used=time.time(), **record))
        return found

    async def close(self) -> int:
        """Saves what is live, or removes the temporary folder; how many were saved."""
        saved = 0
        if self._folder is None:
            return saved
        if self._settings.session_dir is None:
            shutil.rmtree(self._folder, ignore_errors=True)
        else:
            for entry in list(self._live.values()):
                if entry.changed and await self._save(entry):
                    saved += 1
        if self._lock is not None:
            self._lock.release()
        self._live.clear()
        self._folder = None
        return saved

    # ----------------------------------------------------------------- entries

    @property
    def live(self) -> int:
        """Sessions in memory."""
        return len(self._live)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, owner: str, session_id: str) -> Entry:
        """The session of that owner; ApiError for anybody else's and for ids that do not exist."""
        entry = self._entries.get(session_id)
        if entry is None or entry.owner != owner:
            raise ApiError("session_not_found", "there is no such session", param="session_id")
        return entry

    def owned(self, owner: str) -> list[Entry]:
        """All sessions of an owner, oldest first."""
        return [entry for entry in self._entries.values() if entry.owner == owner]

    async def create(self, owner: str, session: Session | None = None) -> Entry:
        """A new entry, empty or with ``session``; ApiError where there are too many."""
        settings = self._settings
        if len(self._entries) >= settings.max_sessions:
            raise ApiError("too_many_sessions", "the server holds no more sessions; try later")
        if self._counts.get(owner, 0) >= settings.max_sessions_per_key:
            raise ApiError(
                "too_many_sessions",
                f"found {settings.max_sessions_per_key} sessions, the most that one key may have; "
                "delete some",
            )
        now = time.time()
        entry = Entry(f"sess_{secrets.token_hex(16)}", owner, int(now), now)
        entry.session = self._engine.session() if session is None else session
        entry.changed = session is not None
        entry.note()
        self._enter(entry)
        await self._make_room(entry)
        return entry

    async def delete(self, entry: Entry) -> None:
        """Forgets a session and its files; what is running on it ends without being kept.

        Where the files cannot be removed it is still there, so that one can try again.
        """
        if entry.deleted:
            return
        entry.deleted = True
        self._leave(entry)
        async with entry.moving:
            try:
                if entry.file is not None:
                    await asyncio.to_thread(self._remove_files, entry.file)
            except BaseException:
                entry.deleted = False
                self._enter(entry)
                raise
            entry.session = None

    def _enter(self, entry: Entry) -> None:
        self._entries[entry.id] = entry
        self._counts[entry.owner] = self._counts.get(entry.owner, 0) + 1
        if entry.session is not None:
            self._live[entry.id] = entry

    def _leave(self, entry: Entry) -> None:
        self._entries.pop(entry.id, None)
        self._live.pop(entry.id, None)
        self._counts[entry.owner] -= 1
        if self._counts[entry.owner] == 0:
            del self._counts[entry.owner]

    @asynccontextmanager
    async def reading(self, entry: Entry) -> AsyncIterator[Session]:
        """A fork of the session as it is now, to do with what one likes."""
        async with self._pinned(entry) as session:
            yield session.fork()

    @asynccontextmanager
    async def writing(self, entry: Entry, *, version: int | None = None) -> AsyncIterator[Change]:
        """A fork that becomes the session if all goes well: a change is whole or not at all.

        ApiError while another request changes the session, and if ``version`` is not its version.
        """
        if entry.writing:
            raise ApiError(
                "session_busy", "another request is changing this session; wait for it, or fork"
            )
        if version is not None and version != entry.version:
            raise ApiError(
                "version_mismatch",
                f"if_version: found {version}, but the session is at version {entry.version}",
                param="if_version",
            )
        entry.writing = True
        try:
            async with self._pinned(entry) as session:
                change = Change(session.fork())
                yield change
                if entry.deleted:
                    raise ApiError("session_not_found", "the session was deleted meanwhile")
                entry.session = change.session
                entry.version += 1
                entry.changed = True
                entry.note()
        finally:
            entry.writing = False

    # ------------------------------------------------------------ memory and disk

    @asynccontextmanager
    async def _pinned(self, entry: Entry) -> AsyncIterator[Session]:
        """The session in memory, where it stays meanwhile."""
        entry.pins += 1
        try:
            session = await self._wake(entry)
            entry.used = time.time()
            yield session
        finally:
            entry.used = time.time()
            entry.pins -= 1

    async def _wake(self, entry: Entry) -> Session:
        async with entry.moving:
            if entry.deleted:
                raise ApiError("session_not_found", "there is no such session", param="session_id")
            if entry.session is None:
                entry.session = await asyncio.to_thread(self._restore, entry)
                entry.note()
                self.restored += 1
            session = entry.session
        self._live[entry.id] = entry
        self._live.move_to_end(entry.id)
        await self._make_room(entry)
        return session

    def _restore(self, entry: Entry) -> Session:
        """In a thread: reads an idle session back."""
        if entry.file is None:
            return self._engine.session()
        try:
            return self._engine.session(state=State.load(self._path(entry.file)))
        except (StateError, OSError) as error:
            log.error("a session's file cannot be read: %s", type(error).__name__)
            raise ApiError(
                "session_lost", "the session's file cannot be read; delete the session"
            ) from error

    async def _make_room(self, newcomer: Entry) -> None:
        """Moves the longest idle ones to disk while too many are in memory."""
        for entry in list(self._live.values()):
            if len(self._live) <= self._settings.max_live_sessions:
                return
            if entry is not newcomer:
                await self.evict(entry)

    async def evict(self, entry: Entry) -> bool:
        """Moves an idle session to disk; False if it is in use or cannot be written."""
        async with entry.moving:
            if entry.pins or entry.deleted or entry.session is None:
                return False
            if entry.changed and not await self._save(entry):
                return False
            if entry.pins:  # somebody came while the file was written
                return False
            entry.session = None
        self._live.pop(entry.id, None)
        self.evicted += 1
        return True

    async def sweep(self) -> None:
        """Evicts and deletes what was idle for too long."""
        now, settings = time.time(), self._settings
        for entry in list(self._live.values()):
            if now - entry.used > settings.idle_seconds:
                await self.evict(entry)
        if settings.session_ttl:
            for entry in list(self._entries.values()):
                if now - entry.used > settings.session_ttl and not entry.pins:
                    await self.delete(entry)

    async def _save(self, entry: Entry) -> bool:
        """Writes a live session's files; False, and a line in the log, if that fails."""
        assert entry.session is not None
        version, state = entry.version, entry.session.state
        name = entry.file or secrets.token_hex(16)
        record = {
            "id": entry.id,
            "owner": entry.owner,
            "created": entry.created,
            "version": version,
            "tokens": entry.tokens,
            "segments": entry.segments,
            "open_tokens": entry.open_tokens,
        }
        try:
            await asyncio.to_thread(self._write_files, name, state, record)
        except (OSError, StateError, MemoryError) as error:
            if entry.file is None:  # nobody would find what is there of them
                await asyncio.to_thread(self._tidy, name)
            log.error("a session cannot be written to disk: %s", error)
            return False
        entry.file = name
        entry.changed = entry.version != version
        return True

    def _write_files(self, name: str, state: State, record: dict[str, object]) -> None:
        state.save(self._path(name))
        write_record(self._path(name).with_suffix(".json"), record)

    def _remove_files(self, name: str) -> None:
        for path in (self._path(name).with_suffix(".json"), self._path(name)):
            path.unlink(missing_ok=True)

    def _tidy(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self._remove_files(name)

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.armt-state"

    def scratch(self) -> str:
        """The folder for uploads that are not yet checked."""
        assert self._folder is not None
        return os.fspath(self._folder)
