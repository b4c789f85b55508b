"""Sessions beyond one process: shared stores of states, and a Ray Serve application over one."""

from armt.scale.folder import FolderStore
from armt.scale.store import MemoryStore, SessionMissing, StateStore, Stored, VersionConflict

__all__ = [
    "FolderStore",
    "MemoryStore",
    "SessionMissing",
    "StateStore",
    "Stored",
    "VersionConflict",
]
