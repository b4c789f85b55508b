"""What an operator of the server may set, checked once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from armt.errors import InvalidArgument

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Limits and places; times in seconds, sizes in bytes."""

    model_name: str = ""
    """The id under ``/v1/models``; empty: the name of the model's folder."""
    api_keys: tuple[str, ...] = ()
    """Who may use the server; empty: everybody, and all share their sessions."""
    session_dir: Path | None = None
    """Where idle sessions lie; None: a temporary folder that is removed at the end."""

    max_requests: int = 256
    """Requests that are worked on or wait at the same time; more are refused with 503."""
    max_requests_per_key: int = 128
    """The same for one API key; more are refused with 429."""
    max_batch: int = 128
    """Sessions that run in one pass of the engine."""
    max_choices: int = 128
    """Prompts times ``n`` of one request."""
    max_tokens: int = 4096
    """Longest answer that a request may ask for."""
    max_body_bytes: int = 8 * MIB
    """Largest JSON body; streamed feeds are not limited by it."""
    max_buffered_bytes: int = 256 * MIB
    """JSON bodies of all requests together."""
    max_feed_bytes: int = 0
    """Largest streamed feed; 0: any size."""
    max_state_bytes: int = 1024 * MIB
    """Largest state file that may be uploaded."""

    max_sessions: int = 20_000
    """Sessions in memory and on disk."""
    max_sessions_per_key: int = 20_000
    max_live_sessions: int = 256
    """Sessions in memory; the one that was idle longest goes to disk first."""
    idle_seconds: float = 300.0
    """A session that was not used for so long goes to disk."""
    session_ttl: float = 0.0
    """A session that was not used for so long is deleted; 0: never."""

    read_timeout: float = 30.0
    """Longest silence of a client in the middle of its body."""
    body_timeout: float = 120.0
    """Longest time for a whole JSON body."""
    write_timeout: float = 60.0
    """Longest time that a client may leave its answer unread."""
    request_timeout: float = 600.0
    """Longest time for an answer."""
    shutdown_timeout: float = 30.0
    """What running requests get to finish when the server is told to stop."""
    decode_pause: float = 0.05
    """About how long reading may keep those waiting who are being answered."""
    heartbeat: float = 15.0
    """A streamed answer sends a comment after so much silence, for proxies."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            least = 0 if field.name in ZERO_IS_OFF else 1 if isinstance(value, int) else 1e-3
            if not least <= value < 2**53:
                raise InvalidArgument(f"{field.name}: found {value}, expected {least} or more")


ZERO_IS_OFF = ("max_feed_bytes", "session_ttl")
