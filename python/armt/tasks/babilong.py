"""BABILong: bAbI facts between the sentences of a book, the question at the end.

A sample of length L is book text with the facts in it, the question, and room for the answer, L
tokens in all; of length 0, the facts and the question alone. Facts keep their order and stand at
random places between sentences; the book begins at a random sentence and starts over at its end.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from armt.engine import Engine
from armt.errors import InvalidArgument
from armt.tasks.babi import Problem
from armt.tasks.reading import read_all, shifted
from armt.tasks.scores import Score
from armt.text import TextSettings, Tokenizer

Ids = npt.NDArray[np.int32]
SENTENCE_END = re.compile(r"""(?<=[.!?]["')])\s+|(?<=[.!?])\s+(?=["'(A-Z])|\n\s*\n""")
UNIT = {"": 1, "k": 1024, "m": 1024**2}


def parse_length(text: str) -> int:
    """ "32k" as 32,768; k = 1,024, M = 1,048,576."""
    found = re.fullmatch(r"(\d+)([kKmM]?)", text.strip())
    if found is None:
        raise InvalidArgument(f"length: found {text!r}, expected tokens such as 512, 32k or 1M")
    return int(found[1]) * UNIT[found[2].lower()]


def read_sentences(path: str | os.PathLike[str]) -> list[str]:
    """The sentences of a UTF-8 text file (also .xz or .gz), white space collapsed."""
    file = Path(path)
    if not file.is_file():
        raise InvalidArgument(f"{file}: no such file, expected a text")
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(file.suffix, open)
    try:
        with opener(file, "rt", encoding="utf-8-sig") as source:
            text = source.read()
    except (UnicodeDecodeError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InvalidArgument(f"{file}: {error}; expected UTF-8 text") from error
    sentences = [" ".join(part.split()) for part in SENTENCE_END.split(text)]
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise InvalidArgument(f"{file}: the text is empty, expected sentences")
    return sentences


class Book:
    """Sentences and, once used, their token ids."""

    def __init__(self, sentences: Sequence[str], tokenizer: Tokenizer) -> None:
        self._sentences = sentences
        self._tokenizer = tokenizer
        self._ids: dict[int, Ids] = {}

    def __len__(self) -> int:
        return len(self._sentences)

    def ids(self, index: int) -> Ids:
        """Ids of a sentence inside a text."""
        index %= len(self._sentences)
        if index not in self._ids:
            self._ids[index] = self._tokenizer.encode_inside(self._sentences[index])
        return self._ids[index]


@dataclass(frozen=True)
class Sample:
    """One text to read, a piece at a time, and what is asked behind it."""

    problem: Problem
    start: Ids
    facts: tuple[Ids, ...]
    places: tuple[int, ...]
    """Before each fact, so many tokens of the book at least."""
    noise: int
    """Tokens of the book."""
    first: int
    """The book's sentence at the beginning."""
    prompt: Ids

    def stream(self, book: Book) -> Iterator[Ids]:
        """The text without the question."""
        if len(self.start):
            yield self.start
        waiting = list(zip(self.places, self.facts, strict=True))
        done, index = 0, self.first
        while done < self.noise:
            while waiting and waiting[0][0] <= done:
                yield waiting.pop(0)[1]
            ids = book.ids(index)[: self.noise - done]
            yield ids
            done += len(ids)
            index += 1
        yield from (ids for _, ids in waiting)


def make_sample(
    problem: Problem,
    *,
    length: int,
    room: int,
    book: Book,
    tokenizer: Tokenizer,
    settings: TextSettings,
    rng: np.random.Generator,
) -> Sample:
    """A sample of ``length`` tokens, ``room`` of them for the answer."""
    start = tokenizer.start_ids
    facts = tuple(tokenizer.encode_inside(fact) for fact in problem.facts)
    prompt = tokenizer.encode(settings.prompt(problem.question))
    needed = len(start) + sum(map(len, facts)) + len(prompt) + room
    if 0 < length < needed:
        raise InvalidArgument(
            f"length: found {length}, expected 0 or at least {needed}: so many tokens take the "
            "facts, the question and room for the answer"
        )
    noise = max(length - needed, 0)
    places = np.sort(rng.integers(0, noise + 1, len(facts)))
    first = int(rng.integers(len(book)))
    return Sample(problem, start, facts, tuple(map(int, places)), noise, first, prompt)


@dataclass(frozen=True)
class Answer:
    """One sample's outcome."""

    length: int
    question: str
    expected: str
    answer: str

    @property
    def right(self) -> bool:
        """Exact match, but for case."""
        return self.answer.casefold() == self.expected.casefold()


def evaluate(
    engine: Engine,
    tokenizer: Tokenizer,
    settings: TextSettings,
    *,
    problems: Sequence[Problem],
    book: Book,
    length: int,
    samples: int,
    seed: int = 0,
    batch: int = 8,
    max_new_tokens: int = 16,
    report: Callable[[int], Any] | None = None,
) -> tuple[Score, list[Answer]]:
    """``samples`` samples of one length. The same seed asks the same problems at every length, but
    for problems with more facts than fit: those are passed over.

    ``report`` is told the tokens read so far.
    """
    order = np.random.default_rng(seed).permutation(len(problems))
    rng = np.random.default_rng([seed, length])

    def make(index: int) -> Sample:
        return make_sample(
            problems[index],
            length=length,
            room=max_new_tokens,
            book=book,
            tokenizer=tokenizer,
            settings=settings,
            rng=rng,
        )

    rows = _that_fit(make, order.tolist(), samples)
    answers: list[Answer] = []
    done = 0
    start = time.perf_counter()
    for first in range(0, samples, batch):
        part = rows[first : first + batch]
        streams = [row.stream(book) for row in part]
        sessions = read_all(engine, streams, shifted(report, done))
        engine.feed_many([(s, row.prompt) for s, row in zip(sessions, part, strict=True)])
        done += sum(session.tokens for session in sessions)
        stop = engine.checkpoint.eos_token_ids
        found = engine.generate_many(sessions, max_new_tokens, stop_ids=stop)
        for session, row, ids in zip(sessions, part, found, strict=True):
            text = tokenizer.decode(i for i in ids if i not in stop).strip()
            answers.append(Answer(length, row.problem.question, row.problem.answer, text))
            session.close()
    right = sum(answer.right for answer in answers)
    return Score(right, samples, done, time.perf_counter() - start), answers


def _that_fit(make: Callable[[int], Sample], order: Sequence[int], count: int) -> list[Sample]:
    """``count`` samples of the problems in ``order``, which start over; InvalidArgument if none
    fits its length."""
    rows: list[Sample] = []
    while len(rows) < count:
        before = len(rows)
        for index in order:
            try:
                rows.append(make(index))
            except InvalidArgument as error:
                too_long = error
            if len(rows) == count:
                break
        if len(rows) == before:
            raise too_long
    return rows
