"""bAbI stories: published files, or the first task made on the spot."""

from __future__ import annotations

import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

from armt.demo import grammar
from armt.errors import InvalidArgument

NUMBERED = re.compile(r"(\d+) +(.*)")
SLOT = re.compile(r"\{(\w+)\}")
TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")


@dataclass(frozen=True)
class Problem:
    """Facts in order, and a question about them."""

    facts: tuple[str, ...]
    question: str
    answer: str


def read_problems(path: str | os.PathLike[str]) -> list[Problem]:
    """Every question of a bAbI file, with all facts of its story that stand before it."""
    problems: list[Problem] = []
    facts: list[str] = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        found = NUMBERED.fullmatch(line.rstrip("\n"))
        if found is None:
            if line.strip():
                raise InvalidArgument(
                    f"{path}, line {number}: found {line[:40]!r}, expected a number and a sentence"
                )
            continue
        if found[1] == "1":
            facts = []
        question, *rest = found[2].split("\t")
        if rest:
            problems.append(Problem(tuple(facts), question.strip(), rest[0].strip()))
        else:
            facts.append(question.strip())
    if not problems:
        raise InvalidArgument(f"{path}: found no question, expected a bAbI file")
    return problems


def find_file(path: str | os.PathLike[str], task: str) -> Path:
    """``path`` itself, or the test file of ``task`` in the folder ``path``."""
    place = Path(path)
    if not place.is_dir():
        if not place.is_file():
            raise InvalidArgument(f"{place}: no such file or folder, expected bAbI data")
        return place
    found = sorted(place.glob(f"{task}_*test.txt"))
    if len(found) != 1:
        names = ", ".join(f.name for f in found) or "none"
        raise InvalidArgument(f"{place}: found {names}, expected one file {task}_*test.txt")
    return found[0]


def make_problems(count: int, seed: int = 0, *, moves: int = 8) -> list[Problem]:
    """Problems of the first task, by our own rules: people go to places; where is one of them?"""
    rng = random.Random(seed)
    return [_make_problem(rng, rng.randint(2, moves)) for _ in range(count)]


def _make_problem(rng: random.Random, moves: int) -> Problem:
    where: dict[str, str] = {}
    facts = []
    for _ in range(moves):
        person = rng.choice(grammar.PEOPLE)
        place = rng.choice([p for p in grammar.PLACES if p != where.get(person)])
        where[person] = place
        verb = rng.choice(grammar.VERBS)
        facts.append(grammar.FACT.format(person=person, verb=verb, place=place))
    asked = rng.choice(sorted(where))
    question = grammar.QUESTION.format(person=asked).strip()
    return Problem(tuple(facts), question, where[asked])


def make_sentences(count: int, seed: int = 0) -> list[str]:
    """Book-like sentences from the demo's grammar, which say nothing about the people."""
    rng = random.Random(seed)

    def phrase(slot: re.Match[str]) -> str:
        text = rng.choice(grammar.PHRASES[slot[1].lower()])
        return text[0].upper() + text[1:] if slot[1][0].isupper() else text

    return [SLOT.sub(phrase, rng.choice(grammar.SENTENCES)) for _ in range(count)]
