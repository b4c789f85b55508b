"""bAbI stories: published files, or our own (armt.tasks.stories), as the same items."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from pathlib import Path

from armt.demo import grammar
from armt.errors import InvalidArgument
from armt.tasks.stories import (
    TASKS,
    Item,
    check_task,
    generate,
    generate_many,
    generate_story,
)

__all__ = [
    "TASKS",
    "Item",
    "check_task",
    "find_file",
    "generate",
    "generate_many",
    "generate_story",
    "make_sentences",
    "read_items",
    "sentence_maker",
]

NUMBERED = re.compile(r"(\d+) +(.*)")
SLOT = re.compile(r"\{(\w+)\}")


def read_items(path: str | os.PathLike[str]) -> list[Item]:
    """Every question of a bAbI file, with all sentences of its story that stand before it."""
    items: list[Item] = []
    sentences: list[str] = []
    at: dict[str, int] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: {error}; expected a bAbI file") from error
    for number, line in enumerate(lines, 1):
        found = NUMBERED.fullmatch(line.rstrip("\n"))
        if found is None:
            if line.strip():
                raise InvalidArgument(
                    f"{path}, line {number}: found {line[:40]!r}, expected a number and a sentence"
                )
            continue
        if found[1] == "1":
            sentences, at = [], {}
        text, *rest = found[2].split("\t")
        if rest:
            supporting = _supporting(rest[1] if len(rest) > 1 else "", at, f"{path}, line {number}")
            items.append(Item(tuple(sentences), text.strip(), rest[0].strip(), supporting))
        else:
            at[found[1]] = len(sentences)
            sentences.append(text.strip())
    if not items:
        raise InvalidArgument(f"{path}: found no question, expected a bAbI file")
    return items


def _supporting(numbers: str, at: dict[str, int], where: str) -> tuple[int, ...]:
    """Line numbers of a story as indices of its sentences."""
    unknown = [number for number in numbers.split() if number not in at]
    if unknown:
        raise InvalidArgument(
            f"{where}: found supporting line {unknown[0]}, expected one of the story's sentences"
        )
    return tuple(at[number] for number in numbers.split())


def find_file(path: str | os.PathLike[str], task: str, *, split: str = "test") -> Path:
    """``path`` itself, or the file of ``task`` in the folder ``path``."""
    place = Path(path)
    if not place.is_dir():
        if not place.is_file():
            raise InvalidArgument(f"{place}: no such file or folder, expected bAbI data")
        return place
    found = sorted(place.glob(f"{task}_*{split}.txt"))
    if len(found) != 1:
        names = ", ".join(f.name for f in found) or "none"
        raise InvalidArgument(f"{place}: found {names}, expected one file {task}_*{split}.txt")
    return found[0]


def sentence_maker(seed: int = 0) -> Callable[[], str]:
    """Makes book-like sentences from the demo's grammar, which say nothing about the people of the
    stories; the same seed makes the same ones."""
    rng = random.Random(seed)

    def phrase(slot: re.Match[str]) -> str:
        text = rng.choice(grammar.PHRASES[slot[1].lower()])
        return text[0].upper() + text[1:] if slot[1][0].isupper() else text

    return lambda: SLOT.sub(phrase, rng.choice(grammar.SENTENCES))


def make_sentences(count: int = 20_000, seed: int = 0) -> list[str]:
    """``count`` sentences of :func:`sentence_maker`; by default as many as make a book."""
    make = sentence_maker(seed)
    return [make() for _ in range(count)]
