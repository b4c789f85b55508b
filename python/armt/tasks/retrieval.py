"""Associative retrieval: pairs of key and value, one pair a segment, then a key is asked for.

*remember*: every key once. *rewrite*: keys come again and the newest value counts. A pair is
written (key symbols, least significant first), SEP, value, EOS; a question (key symbols), GEN.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from armt.errors import InvalidArgument
from armt.tasks.comparing import compare
from armt.tasks.journal import Journal
from armt.tasks.reading import Reader, Report, read_rows, shifted
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

    def check(self, segment_size: int, vocab_size: int) -> None:
        """InvalidArgument where a model of these sizes cannot have been taught this layout."""
        if segment_size != self.segment:
            raise InvalidArgument(
                f"retrieval: found a segment of {segment_size} tokens, expected "
                f"{self.segment}: keys of {self.key_symbols} symbols and 3 tokens; is this model "
                "trained for retrieval?"
            )
        largest = max(self.alphabet - 1, self.sep, self.gen, self.eos, self.filler)
        if largest >= vocab_size:
            raise InvalidArgument(
                f"retrieval: found a vocabulary of {vocab_size}, expected more than "
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
class Trial:
    """What one group of samples reads and is asked."""

    kind: Kind
    pairs: int
    keys: int = 0
    """rewrite: so many different keys; remember: as many as pairs."""
    filler: int = 0
    """Empty segments between the pairs and the question."""

    def check(self, layout: Layout) -> None:
        """InvalidArgument where the layout has too few keys."""
        if self.kind not in ("remember", "rewrite"):
            raise InvalidArgument(f"kind: found {self.kind!r}, expected remember or rewrite")
        needed = self.pairs if self.kind == "remember" else self.keys
        if not 1 <= needed <= layout.keys or self.pairs < 1 or self.filler < 0:
            name = "pairs" if self.kind == "remember" else "keys"
            raise InvalidArgument(f"{name}: found {needed}, expected 1 .. {layout.keys}")

    def tokens(self, layout: Layout) -> int:
        """Tokens that one sample reads before its question."""
        return (self.pairs + self.filler) * layout.segment

    def cell(self) -> dict[str, Any]:
        """For files."""
        keys = {"keys": self.keys} if self.kind == "rewrite" else {}
        return {"kind": self.kind, "pairs": self.pairs} | keys | {"filler": self.filler}


@dataclass(frozen=True)
class Sample:
    """Pairs in order, and what is asked."""

    keys: Ids
    values: Ids
    asked: tuple[int, ...]
    """Keys, one a question."""
    answers: tuple[int, ...]
    """Their newest values."""
    written: tuple[int, ...]
    """The segments in which these were read."""


def make_sample(
    trial: Trial, layout: Layout, rng: np.random.Generator, questions: int = 1
) -> Sample:
    """A random sample; *rewrite* draws its keys from ``trial.keys`` keys."""
    pairs = trial.pairs
    values = rng.integers(0, layout.alphabet, pairs).astype(np.int32)
    pool = pairs if trial.kind == "remember" else trial.keys
    some = rng.choice(layout.keys, pool, replace=False)
    keys = (some if trial.kind == "remember" else rng.choice(some, pairs)).astype(np.int32)
    asked = rng.choice(np.unique(keys), questions)
    written = [int(np.flatnonzero(keys == key)[-1]) for key in asked]
    answers = tuple(int(values[at]) for at in written)
    return Sample(keys, values, tuple(map(int, asked)), answers, tuple(written))


REMEMBER = (1, 2, 5, 10, 20, 50, 100, 150, 200)
REWRITE = (50, 100, 200, 500, 1000, 2000, 5000)
KEYS = (10, 50)
FILLER = (0, 100, 1000, 10_000)
HELD = 50
"""Pairs held while filler is read."""


def curves(layout: Layout) -> list[Trial]:
    """All the curves: how many pairs are remembered, how often a value can be rewritten, how long
    pairs outlast filler. Sizes that need more keys than the layout has are left out."""
    trials = [Trial("remember", n) for n in REMEMBER if n <= layout.keys]
    trials += [Trial("rewrite", n, keys=k) for k in KEYS for n in REWRITE if k <= layout.keys]
    return trials + [Trial("remember", min(HELD, layout.keys), filler=n) for n in FILLER[1:]]


def evaluate(
    reader: Reader,
    layout: Layout,
    trial: Trial,
    *,
    samples: int,
    questions: int = 1,
    seed: int = 0,
    batch: int = 32,
    journal: Journal | None = None,
    other: Reader | None = None,
    report: Report | None = None,
) -> Score:
    """``samples`` samples, those apart that ``journal`` holds already; ``questions`` questions
    after each, of keys that were read. ``other`` answers the same ones, to be compared. ``report``
    is told the tokens read so far."""
    trial.check(layout)
    journal = Journal() if journal is None else journal
    cell = trial.cell() | {"questions": questions}
    done = 0
    for first in range(len(journal.of(cell)) // questions, samples, batch):
        count = min(batch, samples - first)
        rows = [
            make_sample(trial, layout, np.random.default_rng([seed, trial.pairs, i]), questions)
            for i in range(first, first + count)
        ]
        start = time.perf_counter()
        read = read_rows(
            reader, [_stream(layout, r, trial.filler) for r in rows], shifted(report, done)
        )
        asked = [[layout.question(row.asked[q]) for row in rows] for q in range(questions)]
        found = [reader.ask(prompts) for prompts in asked]
        seconds = (time.perf_counter() - start) / count
        done += read
        lines = [
            _line(layout, trial, row, [int(f[i]) for f in found]) for i, row in enumerate(rows)
        ]
        for row_lines in lines:
            row_lines[0] |= {"tokens": read // count, "seconds": seconds}
        if other is not None:
            read_rows(other, [_stream(layout, row, trial.filler) for row in rows])
            for q, prompts in enumerate(asked):
                answers = [[int(token)] for token in found[q]]
                more = compare(reader, other, prompts, answers, 1, ())
                for row_lines, extra in zip(lines, more, strict=True):
                    row_lines[q] |= extra
        journal.add(cell, [line for row_lines in lines for line in row_lines])
    return Score.of(journal.of(cell)[: samples * questions])


def _line(layout: Layout, trial: Trial, row: Sample, found: list[int]) -> list[dict[str, Any]]:
    """One answer for each question."""
    return [
        {
            "key": key,
            "expected": answer,
            "answer": token,
            "right": token == answer,
            "segments_ago": trial.pairs - written + trial.filler,
            "tokens": 0,
            "seconds": 0.0,
        }
        for key, answer, written, token in zip(
            row.asked, row.answers, row.written, found, strict=True
        )
    ]


def capacity(pairs: int, accuracy: float, values: int) -> float:
    """Pairs that a memory must hold to be right so often by knowledge or luck: the paper's
    k = n (v a - 1) / (v - 1), for n pairs, v values, accuracy a."""
    return max(pairs * (values * accuracy - 1) / (values - 1), 0.0)


def _stream(layout: Layout, row: Sample, filler: int) -> Iterator[Ids]:
    yield layout.pairs(row.keys, row.values)
    whole, rest = divmod(filler, 1024)
    for count in [1024] * whole + ([rest] if rest else []):
        yield np.full(count * layout.segment, layout.filler, np.int32)
