"""Associative retrieval: pairs of key and value, one pair a segment, then a key is asked for.

*remember*: every key once. *rewrite*: keys come again and the newest value counts. A pair is
written (key symbols, least significant first), SEP, value, EOS; a question (key symbols), GEN.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from armt.engine import Engine
from armt.errors import InvalidArgument
from armt.tasks.reading import read_all, shifted
from armt.tasks.scores import Score

Ids = npt.NDArray[np.int32]
Kind = Literal["remember", "rewrite"]


@dataclass(frozen=True)
class Layout:
    """How a model was taught to read pairs: the object ``retrieval`` of its config.json."""

    alphabet: int = 16
    """Symbols are 0 .. alphabet - 1, in keys and as values."""
    key_symbols: int = 2
    sep: int = 100
    gen: int = 101
    eos: int = 102
    filler: int = 103

    @classmethod
    def of(cls, folder: Path) -> Layout:
        """The layout that a checkpoint folder names; defaults where it has none."""
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found = config.get("retrieval", {})
        return cls(**{name: int(found[name]) for name in cls.__dataclass_fields__ if name in found})

    @property
    def segment(self) -> int:
        """Tokens of a pair."""
        return self.key_symbols + 3

    @property
    def keys(self) -> int:
        """Number of different keys."""
        return int(self.alphabet**self.key_symbols)

    def check(self, engine: Engine) -> None:
        """InvalidArgument where the engine's model cannot have been taught this layout."""
        if engine.segment_size != self.segment:
            raise InvalidArgument(
                f"retrieval: found a segment of {engine.segment_size} tokens, expected "
                f"{self.segment}: keys of {self.key_symbols} symbols and 3 tokens; is this model "
                "trained for retrieval?"
            )
        largest = max(self.alphabet - 1, self.sep, self.gen, self.eos, self.filler)
        if largest >= engine.vocab_size:
            raise InvalidArgument(
                f"retrieval: found a vocabulary of {engine.vocab_size}, expected more than "
                f"{largest}; give the layout in config.json under retrieval"
            )

    def digits(self, keys: Ids) -> Ids:
        """[n] key numbers as [n, key_symbols] symbols, least significant first."""
        powers = self.alphabet ** np.arange(self.key_symbols)
        return (keys[:, None] // powers % self.alphabet).astype(np.int32)

    def pairs(self, keys: Ids, values: Ids) -> Ids:
        """[n * segment] token ids of n pairs."""
        rows = np.empty((len(keys), self.segment), np.int32)
        rows[:, : self.key_symbols] = self.digits(keys)
        rows[:, self.key_symbols] = self.sep
        rows[:, self.key_symbols + 1] = values
        rows[:, self.key_symbols + 2] = self.eos
        return rows.reshape(-1)

    def question(self, key: int) -> Ids:
        """[key_symbols + 1] token ids after which the model answers."""
        return np.append(self.digits(np.array([key], np.int32))[0], np.int32(self.gen))


@dataclass(frozen=True)
class Sample:
    """Pairs in order, and the one that is asked for."""

    keys: Ids
    values: Ids
    asked: int
    answer: int


def make_sample(
    kind: Kind, pairs: int, layout: Layout, rng: np.random.Generator, *, pool: int
) -> Sample:
    """A random sample; *rewrite* draws its keys from ``pool`` keys."""
    values = rng.integers(0, layout.alphabet, pairs).astype(np.int32)
    some = rng.choice(layout.keys, pairs if kind == "remember" else pool, replace=False)
    keys = (some if kind == "remember" else rng.choice(some, pairs)).astype(np.int32)
    asked = int(rng.choice(np.unique(keys)))
    newest = int(np.flatnonzero(keys == asked)[-1])
    return Sample(keys, values, asked, int(values[newest]))


def evaluate(
    engine: Engine,
    *,
    kind: Kind,
    pairs: int,
    samples: int,
    pool: int = 10,
    filler: int = 0,
    seed: int = 0,
    batch: int = 32,
    report: Callable[[int], Any] | None = None,
) -> Score:
    """Asks one question after each of ``samples`` samples; ``filler`` empty segments come between
    the pairs and the question. ``report`` is told the tokens read so far."""
    layout = Layout.of(engine.checkpoint.folder)
    layout.check(engine)
    _check(layout, kind, pairs, pool)
    rng = np.random.default_rng(seed)
    rows = [make_sample(kind, pairs, layout, rng, pool=pool) for _ in range(samples)]
    right = done = 0
    start = time.perf_counter()
    for first in range(0, samples, batch):
        part = rows[first : first + batch]
        streams = [_stream(layout, row, filler) for row in part]
        sessions = read_all(engine, streams, shifted(report, done))
        done += sum(session.tokens for session in sessions)
        asked = [(s, layout.question(r.asked)) for s, r in zip(sessions, part, strict=True)]
        outputs = engine.feed_many(asked, logits="last")
        for session, output, row in zip(sessions, outputs, part, strict=True):
            assert output.logits is not None
            right += int(output.logits.argmax()) == row.answer
            session.close()
    return Score(right, samples, done, time.perf_counter() - start)


def tokens_of(layout: Layout, pairs: int, filler: int) -> int:
    """Tokens that one sample reads before its question."""
    return (pairs + filler) * layout.segment


def capacity(pairs: int, accuracy: float, values: int) -> float:
    """Pairs that a memory must hold to be right so often by knowledge or luck: the paper's
    k = n (v a - 1) / (v - 1), for n pairs, v values, accuracy a."""
    return max(pairs * (values * accuracy - 1) / (values - 1), 0.0)


def _stream(layout: Layout, row: Sample, filler: int) -> Iterator[Ids]:
    yield layout.pairs(row.keys, row.values)
    whole, rest = divmod(filler, 1024)
    for count in [1024] * whole + ([rest] if rest else []):
        yield np.full(count * layout.segment, layout.filler, np.int32)


def _check(layout: Layout, kind: Kind, pairs: int, pool: int) -> None:
    if kind not in ("remember", "rewrite"):
        raise InvalidArgument(f"kind: found {kind!r}, expected remember or rewrite")
    needed = pairs if kind == "remember" else pool
    if not 1 <= needed <= layout.keys or pairs < 1:
        name = "pairs" if kind == "remember" else "keys"
        raise InvalidArgument(f"{name}: found {needed}, expected 1 .. {layout.keys}")
