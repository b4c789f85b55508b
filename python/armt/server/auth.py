"""API keys: who may ask, and whose session is whose."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from armt.errors import InvalidArgument

SHORTEST = 16
LARGEST_FILE = 1 << 20
EVERYBODY = ""
"""The owner of all sessions of a server without keys."""


def read_keys(path: Path) -> tuple[str, ...]:
    """One key a line; empty lines and lines that begin with # are left out."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise InvalidArgument(f"--api-keys-file: {path}: found more than {LARGEST_FILE} bytes")
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"--api-keys-file: {path}: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and line.strip()[0] != "#")
    if not keys:
        raise InvalidArgument(f"--api-keys-file: {path}: found no key, expected one a line")
    return keys


class Keys:
    """The keys of a server; only their digests are kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        found = list(keys)
        for i, key in enumerate(found):
            if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                raise InvalidArgument(
                    f"API key {i + 1}: expected at least {SHORTEST} printable ASCII characters "
                    "without spaces"
                )
        self._digests = [hashlib.sha256(key.encode()).hexdigest() for key in found]

    def __len__(self) -> int:
        return len(self._digests)

    def owner(self, authorization: bytes | None) -> str | None:
        """Who sends this Authorization header; None for nobody we know.

        Takes the same time for every wrong key.
        """
        if not self._digests:
            return EVERYBODY
        scheme, _, key = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).hexdigest()
        found = None
        for known in self._digests:
            if hmac.compare_digest(known, digest):
                found = known
        return found if scheme.lower() == b"bearer" else None
