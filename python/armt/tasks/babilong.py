"""BABILong: bAbI facts between the sentences of a book, the question at the end.

A sample of length L is book text with the facts in it, the question, and room for the answer, L
tokens in all; of length 0, the facts and the question alone. Facts keep their order and stand at
random places between sentences; the book begins at a random sentence and starts over at its end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from armt.errors import InvalidArgument
from armt.tasks.background import Book
from armt.tasks.comparing import compare
from armt.tasks.journal import Cell, Journal
from armt.tasks.reading import Reader, Report, answers_of, read_rows, shifted
from armt.tasks.scores import Score
from armt.tasks.stories import Item
from armt.text import TextSettings, Tokenizer

__all__ = ["Answer", "Book", "Maker", "Sample", "evaluate"]

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Sample:
    """One text to read, a piece at a time, and what is asked behind it."""

    item: Item
    start: Ids
    facts: tuple[Ids, ...]
    places: tuple[int, ...]
    """Before each fact, so many tokens of the book at least."""
    noise: int
    """Tokens of the book."""
    first: int
    """The book's sentence at the beginning."""
    prompt: Ids
    positions: list[int] = field(default_factory=list)
    """Tokens of the text before each fact; known when the text has been streamed."""

    def stream(self, book: Book) -> Iterator[Ids]:
        """The text without the question, in pieces; never more than one of them is in memory."""
        self.positions.clear()
        at = len(self.start)
        if at:
            yield self.start
        waiting = list(zip(self.places, self.facts, strict=True))
        done = 0
        parts = book.parts(self.first)
        while done < self.noise:
            ids, starts = next(parts)
            begin = 0
            while begin < len(ids) and done < self.noise:
                while waiting and waiting[0][0] <= done:
                    fact = waiting.pop(0)[1]
                    self.positions.append(at)
                    at += len(fact)
                    yield fact
                end = len(ids)
                if waiting:  # up to the first end of a sentence that is far enough
                    wanted = begin + waiting[0][0] - done
                    after = int(np.searchsorted(starts, wanted))
                    end = int(starts[min(after, len(starts) - 1)])
                end = min(end, begin + self.noise - done)
                yield ids[begin:end]
                done, at, begin = done + end - begin, at + end - begin, end
        for _, fact in waiting:
            self.positions.append(at)
            at += len(fact)
            yield fact

    @property
    def tokens(self) -> int:
        """Tokens of the sample, the question included."""
        return len(self.start) + sum(map(len, self.facts)) + self.noise + len(self.prompt)

    @property
    def fact_at(self) -> int:
        """Tokens before the last fact that the answer needs; -1 where it is not known."""
        return self.positions[max(self.item.supporting)] if self.item.supporting else -1


@dataclass
class Maker:
    """Makes samples of the items of one task, ``room`` tokens of each for the answer."""

    items: Sequence[Item]
    book: Book
    tokenizer: Tokenizer
    settings: TextSettings
    room: int
    seed: int = 0

    def __post_init__(self) -> None:
        self._known: dict[str, Ids] = {}
        self._order = np.random.default_rng(self.seed).permutation(len(self.items)).tolist()

    def samples(self, length: int, count: int) -> list[Sample]:
        """``count`` samples. The same seed asks the same items at every length, but for items with
        more facts than fit: those are passed over; InvalidArgument if none fits."""
        rows: list[Sample] = []
        too_long: InvalidArgument | None = None
        while len(rows) < count:
            before = len(rows)
            for index in self._order:
                try:
                    rows.append(self.sample(self.items[index], length, len(rows)))
                except InvalidArgument as error:
                    too_long = error
                if len(rows) == count:
                    break
            if len(rows) == before and too_long is not None:
                raise too_long
        if rows:
            self.book.require(max(row.noise for row in rows))
        return rows

    def sample(self, item: Item, length: int, number: int) -> Sample:
        """Sample ``number`` of its length; InvalidArgument if the facts do not fit."""
        start = self.tokenizer.start_ids
        facts = tuple(map(self._fact, item.sentences))
        prompt = self.tokenizer.encode(self.settings.prompt(item.question))
        needed = len(start) + sum(map(len, facts)) + len(prompt) + self.room
        if 0 < length < needed:
            raise InvalidArgument(
                f"length: found {length}, expected 0 or at least {needed}: so many tokens take the "
                "facts, the question and room for the answer"
            )
        noise = max(length - needed, 0)
        rng = np.random.default_rng([self.seed, length, number])
        places = np.sort(rng.integers(0, noise + 1, len(facts)))
        first = int(rng.integers(len(self.book)))
        return Sample(item, start, facts, tuple(map(int, places)), noise, first, prompt)

    def _fact(self, sentence: str) -> Ids:
        if sentence not in self._known:
            self._known[sentence] = self.tokenizer.encode_inside(sentence)
        return self._known[sentence]


@dataclass(frozen=True)
class Answer:
    """One sample's outcome."""

    index: int
    question: str
    expected: str
    answer: str
    right: bool
    """Exact match, but for case."""
    fact_at: int
    """Tokens before the last fact that the answer needs; -1 where the data does not say."""
    tokens: int
    """Tokens read, the question included."""
    seconds: float
    """Share of the time that its batch took."""


def evaluate(
    reader: Reader,
    maker: Maker,
    *,
    cell: Cell,
    length: int,
    samples: int,
    batch: int = 8,
    stop_ids: Sequence[int] = (),
    journal: Journal | None = None,
    other: Reader | None = None,
    report: Report | None = None,
) -> Score:
    """``samples`` samples of one length, those apart that ``journal`` holds already under ``cell``.

    ``other`` answers the same questions, to be compared. ``report`` is told the tokens read so far.
    """
    journal = Journal() if journal is None else journal
    rows = maker.samples(length, samples)
    done = 0
    for first in range(len(journal.of(cell)), samples, batch):
        part = rows[first : first + batch]
        start = time.perf_counter()
        read = read_rows(reader, [row.stream(maker.book) for row in part], shifted(report, done))
        prompts = [row.prompt for row in part]
        found = answers_of(reader, prompts, maker.room, stop_ids)
        seconds = (time.perf_counter() - start) / len(part)
        done += read
        lines: list[dict[str, Any]] = []
        for i, (row, ids) in enumerate(zip(part, found, strict=True)):
            text = maker.tokenizer.decode(ids).strip()
            answer = Answer(
                index=first + i,
                question=row.item.question,
                expected=row.item.answer,
                answer=text,
                right=text.casefold() == row.item.answer.casefold(),
                fact_at=row.fact_at,
                tokens=row.tokens,
                seconds=seconds,
            )
            lines.append(vars(answer).copy())
        if other is not None:
            read_rows(other, [row.stream(maker.book) for row in part])
            compared = compare(reader, other, prompts, found, maker.room, stop_ids)
            lines = [line | more for line, more in zip(lines, compared, strict=True)]
        journal.add(cell, lines)
    return Score.of(journal.of(cell)[:samples])
