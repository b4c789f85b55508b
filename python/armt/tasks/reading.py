"""Many streams read side by side, each by its own session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from armt.engine import Engine
from armt.session import Session

Ids = npt.NDArray[np.int32]
Report = Callable[[int], Any]
"""Is told the tokens read so far."""

SEGMENTS_A_CALL = 8
MOST_SEGMENTS = 512
"""Of one row in one call."""
TOKENS_A_CALL = 1 << 18
"""Of all rows together, where a reader says nothing else."""
EMPTY = np.zeros(0, np.int32)


class Reader(Protocol):
    """Some rows that read side by side, each with its own memory: all that a task needs.

    Implementations: :class:`EngineReader`, and PyTorch's in armt.training. One that can also tell
    the logits has ``ask_logits`` [rows, vocab], with the arguments of ``ask``.
    """

    @property
    def segment_size(self) -> int:
        """Tokens that make a sensible piece."""

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1."""

    def open(self, rows: int) -> None:
        """So many rows with empty memories; all from before are forgotten."""

    def feed(self, ids: Sequence[Ids]) -> None:
        """Reads ids [tokens] in each row; of any lengths, 0 included."""

    def ask(self, ids: Sequence[Ids]) -> npt.NDArray[np.int64]:
        """[rows]: the likeliest token behind ids [tokens >= 1] in each row, which stays as it
        was."""


class EngineReader:
    """Rows are sessions of the compiled engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._sessions: list[Session] = []
        self.tokens_a_call = (1 << 21) if engine.device.startswith("cuda") else (1 << 16)
        """Enough to fill the device, few enough for a bar to move."""

    @property
    def segment_size(self) -> int:
        """Tokens of a full segment."""
        return self.engine.segment_size

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1."""
        return self.engine.vocab_size

    def open(self, rows: int) -> None:
        """See :class:`Reader`."""
        self.close()
        self._sessions = [self.engine.session() for _ in range(rows)]

    def feed(self, ids: Sequence[Ids]) -> None:
        """See :class:`Reader`."""
        rows = [(s, i) for s, i in zip(self._sessions, ids, strict=True) if len(i)]
        if rows:
            self.engine.feed_many(rows)

    def ask(self, ids: Sequence[Ids]) -> npt.NDArray[np.int64]:
        """See :class:`Reader`."""
        best: npt.NDArray[np.int64] = self.ask_logits(ids).argmax(axis=1)
        return best

    def ask_logits(self, ids: Sequence[Ids]) -> npt.NDArray[np.float32]:
        """[rows, vocab]: the logits behind ids."""
        rows = list(zip(self._sessions, ids, strict=True))
        outputs = self.engine.feed_many(rows, logits="last", write=False)
        return np.stack([out.logits for out in outputs if out.logits is not None])

    def close(self) -> None:
        """Frees all rows."""
        for session in self._sessions:
            session.close()
        self._sessions = []


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


def read_rows(
    reader: Reader, streams: Sequence[Iterator[Ids]], report: Report | None = None
) -> int:
    """Opens a row for each stream and reads all of it, a piece at a time; the tokens read."""
    wanted = getattr(reader, "tokens_a_call", TOKENS_A_CALL)
    segments = wanted // (max(len(streams), 1) * reader.segment_size)
    count = min(max(segments, SEGMENTS_A_CALL), MOST_SEGMENTS) * reader.segment_size
    reader.open(len(streams))
    rest = [blocks(stream, count) for stream in streams]
    done = 0
    while True:
        pieces = [next(stream, EMPTY) for stream in rest]
        size = sum(map(len, pieces))
        if size == 0:
            return done
        reader.feed(pieces)
        done += size
        if report is not None:
            report(done)


def answers_of(
    reader: Reader, prompts: Sequence[Ids], longest: int, stop_ids: Sequence[int] = ()
) -> list[list[int]]:
    """The likeliest tokens behind each prompt, up to a stop token or ``longest``; no row keeps a
    trace of the question."""
    answers: list[list[int]] = [[] for _ in prompts]
    active = set(range(len(prompts)))
    for _ in range(longest):
        asked = [
            np.concatenate([prompt, np.array(answer, np.int32)])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        tokens = reader.ask(asked)
        for row in list(active):
            token = int(tokens[row])
            if token in stop_ids:
                active.discard(row)
            else:
                answers[row].append(token)
        if not active:
            break
    return answers
