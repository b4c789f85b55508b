"""Endless pairs of key and value, one a segment, for associative retrieval.

A row either *remembers*: some pairs, each key once, then nothing but filler; or *rewrites*: the
keys of a pool get new values for ever. Both until it begins anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

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


class PairRow:
    """One row of a batch."""

    def __init__(self, settings: PairSettings, text: PairText, seed: int, number: int) -> None:
        self._settings, self._layout = settings, text.layout
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
        self._keys: list[int] = rng.permutation(self._layout.keys)[:count].tolist()
        self._known: dict[int, int] = {}
        self._told: list[int] = []
        self._holding = 0

    def fill(self, window: Window, row: int) -> None:
        rng, layout = self._rng, self._layout
        if self._new or rng.random() < self._chance:
            self._begin()
            window.fresh[row] = 1
        self._new = False
        if not self._holding and rng.random() < self._settings.hold[0]:
            self._holding = 1 + int(math.exp(rng.random() * math.log(self._settings.hold[1])))
        quiet = self._holding > 0
        self._holding = max(self._holding - 1, 0)
        for segment in range(window.tokens.shape[1]):
            self._ask(window, row, segment)
            key = -1 if quiet else self._next_key()
            window.quiet[row, segment] = key < 0
            if key < 0:
                window.tokens[row, segment] = layout.filler
                continue
            value = int(rng.integers(layout.alphabet))
            if key not in self._known:
                self._told.append(key)
            self._known[key] = value
            pair = layout.pairs(np.array([key], np.int32), np.array([value], np.int32))
            window.tokens[row, segment] = pair

    def _next_key(self) -> int:
        """The key that is told next, -1 for none."""
        rng = self._rng
        if rng.random() < self._settings.filler:
            return -1
        if self._kind == REWRITE:
            return self._keys[rng.integers(len(self._keys))]
        return self._keys[len(self._told)] if len(self._told) < len(self._keys) else -1

    def _ask(self, window: Window, row: int, segment: int) -> None:
        if not self._told:
            return
        for slot in range(window.asks.shape[2]):
            which = int(self._rng.integers(len(self._told)))
            key = self._told[which]
            ids = self._layout.question(key).tolist()
            window.ask(row, segment, slot, ids, seen=0, answer=self._known[key], kind=self._kind)

    def to_json(self) -> Any:
        known = [[key, self._known[key]] for key in self._told]
        return [random_state(self._rng), self._kind, self._keys, known, self._holding]

    def restore(self, found: Any) -> None:
        rng, self._kind, self._keys, known, self._holding = found
        self._rng, self._new = as_numpy(rng), False
        self._known = {int(key): int(value) for key, value in known}
        self._told = list(self._known)
