"""Endless BABILong: facts of a bAbI world between the sentences of a book, questions anywhere.

A row is one stream of text that is cut into windows. It holds a story of one kind until it begins
anew; stretches without facts, short and very long, alternate with dense ones.
"""

from __future__ import annotations

import functools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from armt.errors import InvalidArgument
from armt.tasks.stories import GIVERS, OBJECTS, PEOPLE, PLACES
from armt.text import TextSettings, Tokenizer
from armt.training.window import Window
from armt.training.worlds import KINDS, SHARES, new_tale, restore_rng, rng_to_json

FACT, SENTENCE = 7.5, 25.0
"""Tokens of a fact and of a sentence of the book, about; the density of facts follows from them."""
PER = 512
LONGEST = 10
"""Tokens of a question and its answer."""
ENDS = 0.05
"""Share of questions that come with their answer; the end of the text is to follow."""
KEPT = ("eos_token_id", "pad_token_id", "text")
"""What config.json says about texts."""
NAMES = tuple(dict.fromkeys((*PEOPLE, *GIVERS, *OBJECTS, *PLACES)))
FOLK = re.compile("|".join((*PEOPLE, *GIVERS)))
STRANGERS = (
    *("He", "She", "They", "I", "We", "Nobody", "Tom", "Elizabeth", "The captain", "The old man"),
    *("His wife", "My uncle", "Her mother", "Two of them", "A gentleman", "The doctor"),
)
"""Whose deeds are nobody's business."""
ACTS = re.compile(
    r"\b([A-Z][a-z]{2,}) (?:said|went|came|looked|took|turned|asked|replied|answered|stood|sat)\b"
)
"""Somebody in a book."""
OFTEN = 5
"""Acts that make somebody known."""


@dataclass(frozen=True)
class StorySettings:
    """What a stage of the training reads."""

    worlds: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(SHARES, 1.0))
    """Shares of the kinds of stories."""
    fresh: tuple[float, ...] = (1.0,)
    """Chance to begin anew at a window; rows take the entries in turn."""
    quiet: float = 0.2
    """Share of windows without a fact."""
    density: tuple[float, float] = (1.0, 40.0)
    """Facts in 512 tokens of the other windows, evenly spread over their logarithm."""
    hold: tuple[float, int] = (0.0, 1)
    """Chance that a stretch without facts begins, and its longest length in windows."""
    inside: float = 0.75
    """Share of questions that stand somewhere in a segment; the others stand at its beginning."""
    decoys: float = 0.0
    """Share of the book's sentences that look like a fact and are none."""
    namesakes: float = 0.0
    """Share of the book's sentences in which its people have the name of one from the stories."""

    def __post_init__(self) -> None:
        unknown = set(self.worlds) - set(SHARES)
        if unknown or not self.worlds:
            raise InvalidArgument(
                f"worlds: found {sorted(self.worlds)}, expected some of {', '.join(SHARES)}"
            )


class Text:
    """Token ids of facts, questions, answers and the sentences of a book."""

    kinds = (*KINDS, "end")

    def __init__(self, model: Path, sentences: Sequence[str]) -> None:
        """``model`` is a checkpoint folder with tokenizer.json and the form of a question."""
        self.folder = model
        self._tokenizer = Tokenizer(model / "tokenizer.json")
        self._settings = TextSettings.of(model)
        self.vocab_size = self._tokenizer.vocab_size
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        self.config = {name: config[name] for name in KEPT if name in config}
        self.config["text"] = dict(config.get("text", {})) | {"answer_tokens": 2}
        self.end = int(config.get("eos_token_id", 0))
        self._sentences = sentences
        self._facts: dict[str, list[int]] = {}
        self._questions: dict[str, list[int]] = {}
        parts = self._tokenizer.encode_many_inside(sentences)
        self.ends = np.cumsum([len(part) for part in parts])
        self.book: npt.NDArray[np.uint16] = np.concatenate(parts).astype(np.uint16)
        self.words = {word: self._single(word) for word in NAMES}

    def _single(self, word: str) -> int:
        ids = self._tokenizer.encode_inside(word)
        if len(ids) != 1:
            raise InvalidArgument(f"tokenizer: found {len(ids)} tokens for {word!r}, expected one")
        return int(ids[0])

    def sentence(self, index: int) -> list[int]:
        """Ids of a sentence of the book; the book starts over at its end."""
        index %= len(self.ends)
        found: list[int] = self.book[
            self.ends[index - 1] if index else 0 : self.ends[index]
        ].tolist()
        return found

    def namesake(self, rng: random.Random) -> list[int]:
        """Ids of a sentence about the book's people, with a name from the stories; of any sentence
        where the book has few people."""
        while True:
            sentence = rng.choice(self._sentences)
            if self._people is None or self._people.search(sentence):
                break
        name = rng.choice((*PEOPLE, *GIVERS))
        told = self._people.sub(name, sentence) if self._people else sentence
        return [int(i) for i in self._tokenizer.encode_inside(told)]

    @functools.cached_property
    def _people(self) -> re.Pattern[str] | None:
        """The names of the book's people; None where it has hardly any."""
        found = Counter(name for sentence in self._sentences for name in ACTS.findall(sentence))
        words = Counter(word for sentence in self._sentences for word in sentence.split())
        names = [n for n, count in found.items() if count >= OFTEN and words[n.lower()] < count]
        if not names:
            return None
        people = re.compile(rf"\b(?:{'|'.join(names)})\b")
        few = len(self._sentences) // 1000
        return people if sum(words[name] for name in names) > few else None

    def fact(self, text: str) -> list[int]:
        """Ids of a fact inside a text."""
        if text not in self._facts:
            self._facts[text] = [int(i) for i in self._tokenizer.encode_inside(text)]
        return self._facts[text]

    def question(self, text: str) -> list[int]:
        """Ids of a question in the form that the checkpoint knows."""
        if text not in self._questions:
            ids = [int(i) for i in self._tokenizer.encode(self._settings.prompt(text))]
            if len(ids) >= LONGEST:
                raise InvalidArgument(
                    f"question: found {len(ids)} tokens in {text!r}, fewer than {LONGEST}"
                )
            self._questions[text] = ids
        return self._questions[text]


class StoryRow:
    """One row of a batch."""

    def __init__(self, settings: StorySettings, text: Text, seed: int, number: int) -> None:
        self._settings, self._text = settings, text
        self._rng = random.Random(f"{seed} {number}")
        self._chance = settings.fresh[number % len(settings.fresh)]
        self._begin()
        self._new = True

    def _begin(self) -> None:
        """A new story over an empty memory."""
        shares = self._settings.worlds
        self._kind = self._rng.choices(list(shares), list(shares.values()))[0]
        self._tale = new_tale(self._kind, self._rng)
        self._sentence = self._rng.randrange(len(self._text.ends))
        self._left: list[int] = []
        self._left_fact = False
        self._holding = 0

    def fill(self, window: Window, row: int) -> None:
        if self._new or self._rng.random() < self._chance:
            self._begin()
            window.fresh[row] = 1
        self._new = False
        segments, length = window.tokens.shape[1:]
        size = segments * length
        share = self._share()
        places = self._places(window, segments, length)
        window.quiet[row] = 1
        pieces = [self._left]
        done = len(self._left)
        if self._left_fact:
            self._mark(window, row, 0, done, length)
            self._ask(window, row, places, done, behind=True)
        self._left_fact = False
        while done < size:
            fact = self._rng.random() < share
            if fact:
                piece = self._text.fact(self._tale.tell())
                self._mark(window, row, done, done + len(piece), length)
            else:
                piece = self._noise()
            pieces.append(piece)
            done += len(piece)
            self._ask(window, row, places, done, behind=fact)
            self._left_fact = fact
        flat = np.fromiter((i for piece in pieces for i in piece), np.int32, done)
        window.tokens[row] = flat[:size].reshape(segments, length)
        self._left = flat[size:].tolist()

    def _noise(self) -> list[int]:
        """The book's next sentence; instead of some, what a stranger does, one with a name from the
        stories in it, or what a namesake does: very long books hold such things too."""
        rng = self._rng
        if self._settings.namesakes > 0 and rng.random() < self._settings.namesakes:
            return self._text.namesake(rng)
        decoy = self._settings.decoys > 0 and rng.random() < self._settings.decoys
        if decoy and rng.random() < 0.5:
            tale = new_tale(rng.choice(("qa1", "qa3", "qa5")), rng)
            told = [tale.tell() for _ in range(rng.randint(1, 8))][-1]
            return self._text.fact(FOLK.sub(lambda _: rng.choice(STRANGERS), told))
        piece = self._text.sentence(self._sentence)
        self._sentence += 1
        for _ in range(rng.randint(1, 2) if decoy else 0):
            piece[rng.randrange(len(piece))] = self._text.words[rng.choice(NAMES)]
        return piece

    def _share(self) -> float:
        """How many of this window's pieces are facts."""
        settings, rng = self._settings, self._rng
        if self._holding:
            self._holding -= 1
            return 0.0
        if rng.random() < settings.hold[0]:
            self._holding = int(math.exp(rng.random() * math.log(settings.hold[1])))
        if rng.random() < settings.quiet:
            return 0.0
        low, high = (math.log(x) for x in settings.density)
        per = math.exp(low + (high - low) * rng.random()) / PER
        return min(SENTENCE * per / max(1 + (SENTENCE - FACT) * per, 1e-9), 1.0)

    def _places(self, window: Window, segments: int, length: int) -> list[tuple[int, int, int]]:
        """Where questions stand: place in the window, segment, slot; the first one last."""
        rng, found = self._rng, []
        room = length - window.asks.shape[3]
        for segment in range(segments):
            for slot in range(window.asks.shape[2]):
                at = int(rng.random() * (room + 1)) if rng.random() < self._settings.inside else 0
                found.append((segment * length + at, segment, slot))
        return sorted(found, reverse=True)

    def _ask(
        self,
        window: Window,
        row: int,
        places: list[tuple[int, int, int]],
        end: int,
        *,
        behind: bool,
    ) -> None:
        """Questions at the places up to ``end``; all of them there, ``behind`` what was told."""
        length = window.tokens.shape[2]
        room = length - window.asks.shape[3]
        while places and places[-1][0] <= end:
            at, segment, slot = places.pop()
            seen = (end if behind else at) - segment * length
            asked = self._tale.ask() if seen <= room else None
            if asked is None:
                continue
            question, answer, kind = asked
            ids, word = self._text.question(question), self._text.words[answer]
            if self._rng.random() < ENDS:  # what follows the answer
                ids, word, kind = [*ids, word], self._text.end, len(KINDS)
            window.ask(row, segment, slot, ids, seen=seen, answer=word, kind=kind)

    @staticmethod
    def _mark(window: Window, row: int, first: int, end: int, length: int) -> None:
        """Segments that a fact touches are not quiet."""
        window.quiet[row, first // length : (end - 1) // length + 1] = 0

    def to_json(self) -> Any:
        return {
            "rng": rng_to_json(self._rng),
            "kind": self._kind,
            "tale": self._tale.to_json(),
            "sentence": self._sentence,
            "left": [self._left, self._left_fact],
            "holding": self._holding,
        }

    def restore(self, found: Any) -> None:
        self._new = False
        self._kind, self._sentence = found["kind"], found["sentence"]
        self._tale = new_tale(self._kind, self._rng)
        self._tale.restore(found["tale"])
        self._left, self._left_fact = found["left"]
        self._holding = found["holding"]
        restore_rng(self._rng, found["rng"])
