"""Endless pairs of key and value, one a segment, for associative retrieval.

A row either *remembers*: some pairs, each key once, then nothing but filler; or *rewrites*: the
keys of a pool get new values for ever. Both until it begins anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from armt.tasks.retrieval import Layout
from armt.training.window import Window, as_numpy, random_state

REMEMBER, REWRITE = 0, 1


@dataclass(frozen=True)
class PairSettings:
    """What a stage of the training reads."""

    pairs: int = 5
    """Most pairs of a row that remembers."""
    pool: int = 5
    """Most keys of a row that rewrites."""
    rewrite: float = 0.5
    """Share of rows that rewrite."""
    filler: float = 0.1
    """Share of empty segments between the pairs."""
    fresh: tuple[float, ...] = (1.0,)
    """Chance to begin anew at a window; rows take the entries in turn."""
    hold: tuple[float, int] = (0.0, 1)
    """Chance that a window begins a stretch of filler, and its longest length in windows."""


class PairText:
    """The layout's token ids."""

    kinds = ("remember", "rewrite")

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.vocab_size = layout.filler + 1
        self.words: dict[str, int] = {}
        keys = np.arange(layout.keys, dtype=np.int32)
        pairs = layout.pairs(keys, np.zeros_like(keys))
        self.pairs: npt.NDArray[np.int32] = pairs.reshape(len(keys), layout.segment)
        """[keys, segment] ids of each key with the value 0."""
        self.value_at = layout.key_symbols + 1
        self.questions = np.stack([layout.question(int(key)) for key in keys])


class PairRow:
    """One row of a batch."""

    def __init__(self, settings: PairSettings, text: PairText, seed: int, number: int) -> None:
        self._settings, self._text = settings, text
        self._rng = np.random.default_rng([seed, number])
        self._chance = settings.fresh[number % len(settings.fresh)]
        self._begin()
        self._new = True

    def _begin(self) -> None:
        settings, rng = self._settings, self._rng
        self._kind = REWRITE if rng.random() < settings.rewrite else REMEMBER
        most = settings.pool if self._kind == REWRITE else settings.pairs
        low = 0.0 if self._kind == REWRITE else math.log(max(most / 4, 1))
        count = int(math.exp(low + rng.random() * (math.log(most + 0.99) - low)))
        self._keys: list[int] = rng.permutation(self._text.layout.keys)[:count].tolist()
        self._known: dict[int, int] = {}
        self._told: list[int] = []
        self._holding = 0

    def fill(self, window: Window, row: int) -> None:
        rng, text, settings = self._rng, self._text, self._settings
        if self._new or rng.random() < self._chance:
            self._begin()
            window.fresh[row] = 1
        self._new = False
        if not self._holding and rng.random() < settings.hold[0]:
            self._holding = 1 + int(math.exp(rng.random() * math.log(settings.hold[1])))
        quiet = self._holding > 0
        self._holding = max(self._holding - 1, 0)
        segments, asks = window.answers.shape[1:]
        empty: list[bool] = np.less(rng.random(segments), settings.filler).tolist()
        again = [int(i) for i in rng.integers(len(self._keys), size=(segments,))]
        values = [int(i) for i in rng.integers(text.layout.alphabet, size=(segments,))]
        asked = rng.random((segments, asks))
        window.last[row] = text.questions.shape[1] - 1
        window.kinds[row] = self._kind
        for segment in range(segments):
            if self._told:
                which = (asked[segment] * len(self._told)).astype(np.int64).tolist()
                keys = [self._told[i] for i in which]
                window.asks[row, segment] = text.questions[keys]
                window.answers[row, segment] = [self._known[key] for key in keys]
            key = -1 if quiet or empty[segment] else self._next_key(again[segment])
            window.quiet[row, segment] = key < 0
            if key < 0:
                window.tokens[row, segment] = text.layout.filler
                continue
            if key not in self._known:
                self._told.append(key)
            self._known[key] = values[segment]
            window.tokens[row, segment] = text.pairs[key]
            window.tokens[row, segment, text.value_at] = values[segment]

    def _next_key(self, again: int) -> int:
        """The key that is told next, -1 for none; ``again`` if it is one of all."""
        if self._kind == REWRITE:
            return self._keys[again]
        return self._keys[len(self._told)] if len(self._told) < len(self._keys) else -1

    def to_json(self) -> Any:
        known = [[key, self._known[key]] for key in self._told]
        return [random_state(self._rng), self._kind, self._keys, known, self._holding]

    def restore(self, found: Any) -> None:
        rng, self._kind, self._keys, known, self._holding = found
        self._rng, self._new = as_numpy(rng), False
        self._known = {int(key): int(value) for key, value in known}
        self._told = list(self._known)
