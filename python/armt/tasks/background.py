"""Book text in which facts are hidden: sentences, and their token ids as they are needed."""

from __future__ import annotations

import gzip
import lzma
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from armt.errors import InvalidArgument
from armt.text import Tokenizer

Ids = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]
SENTENCE_END = re.compile(r"""(?<=[.!?]["')])\s+|(?<=[.!?])\s+(?=["'(A-Z])|\n\s*\n""")
SHORTEST = 1 << 16
"""Tokens from which on a text may start over inside one sample."""
SENTENCES_A_BLOCK = 256


def read_sentences(path: str | os.PathLike[str]) -> list[str]:
    """The sentences of a UTF-8 text file (also .xz or .gz), white space collapsed."""
    file = Path(path)
    if not file.is_file():
        raise InvalidArgument(f"{file}: no such file, expected a text")
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(file.suffix, open)
    try:
        with opener(file, "rt", encoding="utf-8-sig") as source:
            text = source.read()
    except (UnicodeDecodeError, lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise InvalidArgument(f"{file}: {error}; expected UTF-8 text") from error
    sentences = [" ".join(part.split()) for part in SENTENCE_END.split(text)]
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise InvalidArgument(f"{file}: the text is empty, expected sentences")
    return sentences


class Book:
    """Sentences as token ids; blocks of them are encoded when they are first needed."""

    def __init__(self, sentences: Sequence[str], tokenizer: Tokenizer) -> None:
        self._sentences = sentences
        self._tokenizer = tokenizer
        self._blocks: dict[int, tuple[Ids, Offsets]] = {}

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self._sentences)

    def require(self, tokens: int) -> None:
        """InvalidArgument if the text is too short to hide something in ``tokens`` tokens of it."""
        needed, found = min(tokens, SHORTEST), 0
        for number in range(-(-len(self) // SENTENCES_A_BLOCK)):
            if found >= needed:
                return
            found += len(self._block(number)[0])
        if found < needed:
            raise InvalidArgument(
                f"book: found {found:,} tokens of text, expected at least {needed:,} for samples "
                f"of this length (from {SHORTEST:,} tokens on a text may start over)"
            )

    def parts(self, first: int) -> Iterator[tuple[Ids, Offsets]]:
        """The text from sentence ``first`` on, without an end: ids [tokens], and where among them
        its sentences begin [sentences], followed by the number of tokens."""
        number, skipped = divmod(first % len(self), SENTENCES_A_BLOCK)
        while True:
            ids, starts = self._block(number)
            begin = int(starts[skipped])
            yield ids[begin:], starts[skipped:] - begin
            number = (number + 1) % -(-len(self) // SENTENCES_A_BLOCK)
            skipped = 0

    def _block(self, number: int) -> tuple[Ids, Offsets]:
        if number not in self._blocks:
            first = number * SENTENCES_A_BLOCK
            parts = self._tokenizer.encode_many_inside(
                self._sentences[first : first + SENTENCES_A_BLOCK]
            )
            starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
            self._blocks[number] = np.concatenate(parts), starts
        return self._blocks[number]
