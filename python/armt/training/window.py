"""What one step reads: some segments of every row, and questions about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
NO_ANSWER = -1


@dataclass(frozen=True)
class Window:
    """B rows of S segments of T tokens, with Q questions of at most t tokens a segment."""

    tokens: Ids
    """[B, S, T]"""
    asks: Ids
    """[B, S, Q, t]"""
    seen: Ids
    """[B, S, Q] tokens of the segment before each question."""
    last: Ids
    """[B, S, Q] index of its last token."""
    answers: Ids
    """[B, S, Q] the answer's token, or -1 for a place without a question."""
    kinds: Ids
    """[B, S, Q] the kind of question, for accuracies apart."""
    quiet: Ids
    """[B, S] 1 where nothing worth remembering begins or ends."""
    fresh: Ids
    """[B] 1 where the row begins anew, with an empty memory."""

    @classmethod
    def empty(cls, rows: int, segments: int, length: int, asks: int, longest: int) -> Window:
        """All zero, and no questions."""

        def zeros(*shape: int) -> Ids:
            return np.zeros(shape, np.int32)

        return cls(
            tokens=zeros(rows, segments, length),
            asks=zeros(rows, segments, asks, longest),
            seen=zeros(rows, segments, asks),
            last=zeros(rows, segments, asks),
            answers=np.full((rows, segments, asks), NO_ANSWER, np.int32),
            kinds=zeros(rows, segments, asks),
            quiet=zeros(rows, segments),
            fresh=zeros(rows),
        )

    def arrays(self) -> dict[str, Ids]:
        """All fields by name."""
        return dict(self.__dict__)

    def rows(self, first: int, last: int) -> Window:
        """Views of some rows."""
        return Window(**{name: values[first:last] for name, values in self.arrays().items()})

    def ask(self, row: int, segment: int, slot: int, ids: Sequence[int], **facts: int) -> None:
        """Puts a question; ``facts`` are ``seen``, ``answer`` and ``kind``."""
        self.asks[row, segment, slot, : len(ids)] = ids
        self.last[row, segment, slot] = len(ids) - 1
        self.seen[row, segment, slot] = facts["seen"]
        self.answers[row, segment, slot] = facts["answer"]
        self.kinds[row, segment, slot] = facts["kind"]


class Row(Protocol):
    """One endless story. It writes the next window's part of it, and can be kept as JSON."""

    def fill(self, window: Window, row: int) -> None:
        """Writes its part of the window."""
        ...

    def to_json(self) -> Any:
        """Where it stands."""
        ...

    def restore(self, found: Any) -> None:
        """Goes on where another stood."""
        ...


class Rows:
    """The rows of a batch, each with a random stream of its own, so that it does not matter how
    they are spread over processes."""

    def __init__(
        self, make: Callable[[int], Row], numbers: Sequence[int], blank: Callable[[int], Window]
    ) -> None:
        self._rows = [make(number) for number in numbers]
        self._blank = blank

    def next(self) -> Window:
        """The next window of all rows."""
        window = self._blank(len(self._rows))
        for i, row in enumerate(self._rows):
            row.fill(window, i)
        return window

    def state(self) -> str:
        """Where the rows stand, as JSON."""
        return json.dumps([row.to_json() for row in self._rows])

    def restore(self, found: str) -> None:
        """Goes on where others stood."""
        for row, state in zip(self._rows, json.loads(found), strict=True):
            row.restore(state)


def random_state(rng: np.random.Generator) -> Any:
    """Of numpy's default generator, as JSON."""
    return rng.bit_generator.state


def as_numpy(found: Any) -> np.random.Generator:
    """The reverse of :func:`random_state`."""
    rng = np.random.default_rng()
    rng.bit_generator.state = found
    return rng
