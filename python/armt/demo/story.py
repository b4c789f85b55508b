"""A long stream of book-like prose with a few facts hidden in it, as token ids."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from armt.errors import CheckpointError
from armt.text import TextSettings

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Fact:
    """A sentence that says where somebody went."""

    person: str
    place: str
    text: str
    position: int
    """Tokens of the stream before this sentence."""
    end: int
    """Tokens of the stream up to its full stop."""
    before: str
    """The sentence that it stands behind."""


@cache
def material() -> dict[str, Any]:
    """What build_material.py wrote: phrases, facts and questions with their token ids."""
    text = files("armt.demo").joinpath("material.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def model_digest(model: Path) -> str:
    """Tells one way of writing questions and texts from another: tokenizer and prompt format."""
    found = hashlib.sha256((model / "tokenizer.json").read_bytes())
    found.update(TextSettings.of(model).prompt_format.encode())
    return found.hexdigest()[:16]


def check_material(model: Path) -> None:
    """CheckpointError if the material's token ids are not those of the model."""
    found, expected = model_digest(model), material()["model"]
    if found != expected:
        raise CheckpointError(
            f"{model}: found a tokenizer and prompt format of digest {found}, expected {expected}, "
            "those of the demo's material; run python -m armt.demo.build_material"
        )


def people() -> list[str]:
    """Everybody that a question can be about."""
    return list(material()["questions"])


def question(person: str) -> tuple[str, Ids]:
    """ "Where is <person>?" as text and as the ids after which the model answers."""
    found = material()["questions"][person]
    return found["text"], np.array(found["ids"], np.int32)


def answer_text(token: int) -> str:
    """The place that a token stands for."""
    names: dict[int, str] = {id_: place for place, id_ in material()["answers"].items()}
    return names.get(token, f"(token {token})")


@dataclass
class Story:
    """``tokens`` tokens of prose; at random places, somebody goes somewhere.

    Everybody has gone somewhere within the first sixth; the same seed gives the same story.
    """

    tokens: int
    moves: int
    seed: int = 0
    facts: list[Fact] = field(default_factory=list)
    """The facts told so far, in order."""

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._told = 0
        self._text = ""
        self._pending: list[int] = []
        self._schedule = self._plan()

    def read(self, count: int) -> Ids:
        """The next ``count`` tokens [count]; fewer at the end of the story."""
        count = min(count, self.tokens - self._told)
        while len(self._pending) < count:
            self._pending += self._sentence()
        chunk = np.array(self._pending[:count], np.int32)
        del self._pending[:count]
        self._told += count
        return chunk

    def chunks(self, size: int) -> Iterator[Ids]:
        """The rest of the story in pieces of ``size`` tokens."""
        while self._told < self.tokens:
            yield self.read(size)

    def last_fact(self, person: str) -> Fact | None:
        """The newest fact about ``person`` whose sentence has been read."""
        known = (f for f in reversed(self.facts) if f.person == person and f.end <= self._told)
        return next(known, None)

    def told_before(self, fact: Fact) -> int:
        """How many facts about the same person it has overwritten."""
        same = [f for f in self.facts if f.person == fact.person]
        return same.index(fact)

    def _plan(self) -> list[tuple[int, str]]:
        """(position, person) of every move, the first one last."""
        names = people()
        first = self._rng.sample(names, len(names))
        early = [self._rng.randrange(max(self.tokens // 6, 1)) for _ in first]
        later = [self._rng.randrange(max(self.tokens - 64, 1)) for _ in range(self.moves)]
        plan = list(zip(sorted(early), first, strict=True))
        plan += [(position, self._rng.choice(names)) for position in later]
        return sorted(plan, reverse=True)

    def _sentence(self) -> list[int]:
        position = self._told + len(self._pending)
        if self._schedule and self._schedule[-1][0] <= position:
            return self._fact(self._schedule.pop()[1], position)
        ids: list[int] = []
        self._text = ""
        book = material()
        for part in self._rng.choice(book["sentences"]):
            text, more = self._rng.choice(book["phrases"][part]) if isinstance(part, str) else part
            self._text += text
            ids += more
        return ids

    def _fact(self, person: str, position: int) -> list[int]:
        there = next((f.place for f in reversed(self.facts) if f.person == person), None)
        choices = [
            fact
            for fact in material()["facts"]
            if fact["person"] == person and fact["place"] != there
        ]
        chosen = self._rng.choice(choices)
        ids: list[int] = chosen["ids"]
        self.facts.append(
            Fact(
                person,
                chosen["place"],
                chosen["text"].strip(),
                position=position,
                end=position + len(ids),
                before=self._text.strip(),
            )
        )
        self._text = chosen["text"]
        return ids
