"""Many streams read side by side, each by its own session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from armt.engine import Engine
from armt.session import Session

Ids = npt.NDArray[np.int32]
Report = Callable[[int], Any]
"""Is told the tokens read so far."""

SEGMENTS_A_CALL = 8


def blocks(stream: Iterator[Ids], count: int) -> Iterator[Ids]:
    """The ids of ``stream`` in blocks of ``count``; the last one may be shorter."""
    held: list[Ids] = []
    size = 0
    for ids in stream:
        held.append(ids)
        size += len(ids)
        if size < count:
            continue
        joined = np.concatenate(held)
        for start in range(0, size - count + 1, count):
            yield joined[start : start + count]
        held = [joined[size - size % count :]]
        size %= count
    if size:
        yield np.concatenate(held)


def read_all(
    engine: Engine, streams: Sequence[Iterator[Ids]], report: Report | None = None
) -> list[Session]:
    """A session for each stream of ids, all of it read; the sessions are the caller's to close."""
    count = SEGMENTS_A_CALL * engine.segment_size
    active = [(engine.session(), blocks(stream, count)) for stream in streams]
    sessions = [session for session, _ in active]
    done = 0
    while active:
        heads = [(session, rest, next(rest, None)) for session, rest in active]
        rows = [(session, ids) for session, _, ids in heads if ids is not None]
        active = [(session, rest) for session, rest, ids in heads if ids is not None]
        if not rows:
            break
        before, done = done, done + sum(len(ids) for _, ids in rows)
        engine.feed_many(rows, progress=shifted(report, before))
    return sessions


def shifted(report: Report | None, before: int) -> Report | None:
    """``report`` for what is read after ``before`` tokens."""
    return None if report is None else lambda n: report(before + n)
