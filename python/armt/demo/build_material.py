"""Writes material.json: the demo's sentences with their token ids, so that it needs no tokenizer.

A byte-level BPE tokenizer cuts text before white space first, so the ids of phrases that begin with
a space can be joined. This script checks that on every fact, every question and many sentences.

    python -m armt.demo.build_material  # needs "tokenizers"; after new words or a new model
"""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

from armt.demo import grammar
from armt.demo.story import model_digest
from armt.models import DEFAULT, resolve
from armt.text import TextSettings

FOLDER = Path(__file__).parent
SLOT = re.compile(r'\s?("?\{\w+\})')


class Builder:
    """Collects the phrases that the sentences use, in the spelling each place needs."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.phrases: dict[str, list[tuple[str, list[int]]]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids of ``text`` inside a text: the tokenizer puts a space before a text's start."""
        before, both = (
            self._tokenizer.encode(part, add_special_tokens=False).ids for part in ("a", "a" + text)
        )
        found: list[int] = both[len(before) :]
        return found

    def phrase(self, text: str) -> tuple[str, list[int]]:
        """A phrase and its ids."""
        return text, self.ids(text)

    def sentence(self, pattern: str) -> list[Any]:
        """``pattern`` as a list of slot names and fixed phrases."""
        parts: list[Any] = []
        for piece in SLOT.split(" " + pattern):
            if "{" in piece:
                parts.append(self._slot(piece))
            elif piece:
                parts.append(self.phrase(piece))
        return parts

    def _slot(self, spelling: str) -> str:
        """The name of a slot; its phrases are stored at first use."""
        key = spelling.replace("{", "").replace("}", "")
        name = key.lstrip('"')
        if key not in self.phrases:
            start = ' "' if key.startswith('"') else " "
            texts = grammar.PHRASES[name.lower()]
            if name[0].isupper():
                texts = [text[0].upper() + text[1:] for text in texts]
            self.phrases[key] = [self.phrase(start + text) for text in texts]
        return key


def check_joins(builder: Builder, sentences: list[list[Any]], *, draws: int = 3000) -> None:
    """Ids of joined phrases must be the ids of the joined text."""
    rng = random.Random(1)
    text = ""
    ids: list[int] = []
    for _ in range(draws):
        for part in rng.choice(sentences):
            more, more_ids = rng.choice(builder.phrases[part]) if isinstance(part, str) else part
            text += more
            ids += more_ids
    if builder.ids(text) != ids:
        raise SystemExit("grammar: the ids of joined phrases differ from those of the joined text")


def facts(builder: Builder) -> list[dict[str, Any]]:
    """All fact sentences."""
    return [
        {"person": person, "place": place, "text": text, "ids": builder.ids(text)}
        for person, verb, place in itertools.product(grammar.PEOPLE, grammar.VERBS, grammar.PLACES)
        for text in [" " + grammar.FACT.format(person=person, verb=verb, place=place)]
    ]


def answers(builder: Builder) -> dict[str, int]:
    """The single token of each place."""
    found = {place: builder.ids(" " + place) for place in grammar.PLACES}
    if any(len(ids) != 1 for ids in found.values()):
        raise SystemExit(f"grammar: found {found}, expected one token for each place")
    return {place: ids[0] for place, ids in found.items()}


def build() -> dict[str, Any]:
    """Everything that material.json holds."""
    from tokenizers import Tokenizer

    model = resolve(DEFAULT)
    builder = Builder(Tokenizer.from_file(str(model / "tokenizer.json")))
    settings = TextSettings.of(model)
    sentences = [builder.sentence(pattern) for pattern in grammar.SENTENCES]
    check_joins(builder, sentences)
    questions = {
        person: {
            "text": grammar.QUESTION.format(person=person),
            "ids": builder.ids(settings.prompt(grammar.QUESTION.format(person=person))),
        }
        for person in grammar.PEOPLE
    }
    return {
        "model": model_digest(model),
        "facts": facts(builder),
        "questions": questions,
        "answers": answers(builder),
        "sentences": sentences,
        "phrases": builder.phrases,
    }


if __name__ == "__main__":
    target = FOLDER / "material.json"
    target.write_text(json.dumps(build(), separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"wrote {target} ({target.stat().st_size:,} bytes)")
