"""Text to token ids and back, as a stream: any amount of text in constant memory."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from armt.errors import InvalidArgument

Ids = npt.NDArray[np.int32]

CHUNK = 1 << 16
"""Characters read at a time."""
LONGEST_RUN = 1 << 20
"""Characters without a place to cut after which the text is cut anyway."""
REPLACEMENT = "\ufffd"
# A character that is cut short shows as at most this many replacement characters.
LONGEST_TAIL = 3
# Tokens that a streaming decoder looks at (twice as many in garbage), and how many it then keeps.
WINDOW = 32
CONTEXT = 8
EMPTY = np.zeros(0, np.int32)

# Between a visible character and a space, no pre-tokenizer in use joins anything; nor across a
# single line feed, seen from behind it, before a letter or digit.
BEFORE_SPACE = re.compile(r"(?<=\S)(?= )")
AFTER_LINE = re.compile(r"(?<=\S\n)(?=[^\W_])")


@dataclass(frozen=True)
class TextSettings:
    """How a model wants its text: the object ``text`` of its config.json."""

    prompt_format: str = "\n{question}\n"
    """What is read behind the text before the answer; ``{question}`` stands for the question."""
    collapse_white_space: bool = False
    """Whether line ends and runs of white space become single spaces, as in training."""

    @classmethod
    def of(cls, folder: Path) -> TextSettings:
        """The settings of a checkpoint folder; defaults where it has none."""
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found = config.get("text", {})
        settings = cls(**{name: found[name] for name in SETTINGS if name in found})
        settings.check(str(path))
        return settings

    def check(self, where: str) -> None:
        """InvalidArgument for a format without a place for the question."""
        if "{question}" not in self.prompt_format:
            raise InvalidArgument(
                f"{where}: prompt_format: found {self.prompt_format!r}, expected a text that "
                'contains "{question}"'
            )

    def prompt(self, question: str) -> str:
        """The text to read before answering ``question``."""
        return self.prompt_format.replace("{question}", question)

    def prepared(self, source: Iterable[str]) -> Iterator[str]:
        """A stream of text as the model wants it."""
        return collapse_white_space(source) if self.collapse_white_space else iter(source)


SETTINGS = tuple(TextSettings.__dataclass_fields__)


def collapse_white_space(source: Iterable[str]) -> Iterator[str]:
    """Each run of white space becomes one space; none at the end."""
    gap = ""
    for piece in source:
        words = piece.split()
        if not words:
            gap = " " if piece else gap
            continue
        yield (" " if piece[0].isspace() else gap) + " ".join(words)
        gap = " " if piece[-1].isspace() else ""


class Tokenizer:
    """A Hugging Face ``tokenizer.json``; needs the package ``tokenizers``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """``path`` is a tokenizer.json or the folder that holds one."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        self.path = file
        self._backend = _load(file)
        description = json.loads(self._backend.to_str())
        added = [str(token["content"]) for token in description.get("added_tokens", [])]
        self._spaced = [token for token in added if any(map(str.isspace, token))]
        self._only_lines = _joins_words(description)
        self._specials: tuple[list[int], list[int]] | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size())

    def token_id(self, token: str) -> int | None:
        """The id of one token as it stands in tokenizer.json."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def encode(self, text: str, *, specials: bool = False) -> Ids:
        """Token ids [tokens] of the whole of ``text``."""
        return np.array(self._ids(text, specials=specials), np.int32)

    def encode_stream(
        self, source: str | IO[str] | Iterable[str], *, specials: bool = False
    ) -> Iterator[Ids]:
        """Token ids [tokens] in pieces; joined, they are ``encode`` of the joined text.

        ``source`` is an open text file or an iterable of strings of any sizes. Memory is bounded:
        the text is cut where white space separates words. A run of more than 2**20 characters
        without such a place is cut after that many; only there may ids differ.
        """
        encoder = StreamEncoder(self, specials=specials)
        for piece in pieces(source):
            ids = encoder.feed(piece)
            if len(ids):
                yield ids
        ids = encoder.finish()
        if len(ids):
            yield ids

    def encode_inside(self, sentence: str) -> Ids:
        """Token ids [tokens] of ``sentence`` where it follows other text and a space."""
        return self._after(".", " " + sentence)

    def encode_many_inside(self, sentences: Sequence[str]) -> list[Ids]:
        """``encode_inside`` of each, on all cores."""
        before = self._ids(".")
        texts = [". " + sentence for sentence in sentences]
        found = self._backend.encode_batch(texts, add_special_tokens=False)
        return [
            np.array(encoding.ids[len(before) :], np.int32)
            if encoding.ids[: len(before)] == before
            else self.encode_inside(sentence)
            for encoding, sentence in zip(found, sentences, strict=True)
        ]

    @property
    def start_ids(self) -> Ids:
        """Token ids that are put before any text, such as a start-of-text token; often none."""
        return np.array(self._special_ids()[0], np.int32)

    def decode(self, ids: Iterable[int], *, specials: bool = False) -> str:
        """The text of ``ids``; special tokens are left out unless ``specials``."""
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=not specials)
        return text

    def decode_stream(self, ids: Iterable[int], *, specials: bool = False) -> Iterator[str]:
        """The text of ``ids`` in pieces, as early as whole characters are known."""
        decoder = StreamDecoder(self, specials=specials)
        for token in ids:
            if piece := decoder.feed(token):
                yield piece
        if piece := decoder.finish():
            yield piece

    def _ids(self, text: str, *, specials: bool = False) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=specials).ids
        return ids

    def _special_ids(self) -> tuple[list[int], list[int]]:
        """The special tokens put before and behind any text."""
        if self._specials is None:
            plain, full = self._ids("a"), self._ids("a", specials=True)
            places = range(len(full) - len(plain) + 1)
            start = next((i for i in places if full[i : i + len(plain)] == plain), 0)
            self._specials = full[:start], full[start + len(plain) :]
        return self._specials

    def _last_cut(self, text: str) -> int:
        """Where to cut ``text`` so that both sides have their own ids; 0 where it cannot be."""
        patterns = [AFTER_LINE] if self._only_lines else [BEFORE_SPACE, AFTER_LINE]
        unseen = max(map(len, self._spaced), default=1) - 1
        for cut in _backwards(text, patterns):
            if cut > len(text) - unseen or any(_spans(text, t, cut) for t in self._spaced):
                continue
            return cut
        return 0

    def _context(self, text: str) -> str:
        """The end of ``text`` that the next piece is encoded behind: its last word."""
        return text[max(self._last_cut(text), len(text) - CHUNK) :]

    def _after(self, context: str, text: str) -> Ids:
        """Ids of ``text`` where it follows ``context``: no start-of-text rule applies to it."""
        before = self._ids(context) if context else []
        ids = self._ids(context + text)
        if ids[: len(before)] != before:
            return self.encode(text)
        return np.array(ids[len(before) :], np.int32)


class StreamEncoder:
    """Text to token ids [tokens], piece by piece; joined, they are the ids of the whole."""

    def __init__(
        self, tokenizer: Tokenizer, *, specials: bool = False, chunk: int | None = None
    ) -> None:
        """``chunk``: characters that are encoded at a time."""
        self._tokenizer = tokenizer
        self._start, self._end = tokenizer._special_ids() if specials else ([], [])
        self._chunk = self._enough = CHUNK if chunk is None else chunk
        self._context, self._rest = "", ""

    def feed(self, piece: str) -> Ids:
        """The ids that became certain with ``piece``; often none."""
        self._rest += piece
        rest = self._rest
        if len(rest) < self._enough:
            return EMPTY
        cut = self._tokenizer._last_cut(rest) or (len(rest) if len(rest) >= LONGEST_RUN else 0)
        # A run without a place to cut is searched anew only when it is twice as long.
        self._enough = self._chunk if cut else min(2 * len(rest), LONGEST_RUN)
        return self._take(cut) if cut else EMPTY

    def finish(self) -> Ids:
        """What is left."""
        ids = self._take(len(self._rest)) if self._rest else EMPTY
        return np.concatenate([self._opening(), ids, np.array(self._end, np.int32)])

    def _take(self, cut: int) -> Ids:
        text, self._rest = self._rest[:cut], self._rest[cut:]
        ids = self._tokenizer._after(self._context, text)
        self._context = self._tokenizer._context(text)
        return np.concatenate([self._opening(), ids])

    def _opening(self) -> Ids:
        start, self._start = self._start, []
        return np.array(start, np.int32)


class StreamDecoder:
    """Token ids to text, one by one; a piece never ends within a character."""

    def __init__(self, tokenizer: Tokenizer, *, specials: bool = False) -> None:
        self._decode: Callable[[Sequence[int]], str] = lambda ids: tokenizer.decode(
            ids, specials=specials
        )
        self._window: list[int] = []
        self._shown = 0

    def feed(self, token: int) -> str:
        """The text that became certain with ``token``; often one word, sometimes nothing."""
        self._window.append(int(token))
        text = self._decode(self._window)
        tail = len(text) - len(text.rstrip(REPLACEMENT))
        piece = self._take(text, len(text) - tail)
        if len(self._window) >= 2 * WINDOW or (tail == 0 and len(self._window) >= WINDOW):
            piece += self._take(text, len(text) - min(tail, LONGEST_TAIL))
            self._forget(tail)
        return piece

    def finish(self) -> str:
        """What is left, with replacement characters where the last character is incomplete."""
        text = self._decode(self._window)
        piece = self._take(text, len(text))
        self._window, self._shown = [], 0
        return piece

    def _forget(self, tail: int) -> None:
        """Keeps the last few tokens, from the start of a character on, as context."""
        for count in range(CONTEXT, CONTEXT + 2 * LONGEST_TAIL):
            kept = self._window[-count:]
            text = self._decode(kept)
            if text and not text.startswith(REPLACEMENT):
                break
        self._window = kept
        self._shown = len(text) - min(tail, LONGEST_TAIL)

    def _take(self, text: str, end: int) -> str:
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece


def open_text(binary: BinaryIO) -> io.TextIOWrapper:
    """A binary stream as UTF-8 text, line ends unified as Python's text files do."""
    return io.TextIOWrapper(binary, encoding="utf-8-sig", newline=None)


def _load(file: Path) -> Any:
    if not file.is_file():
        raise InvalidArgument(
            f"{file}: no such file, expected a tokenizer.json; give token ids, or put the "
            "tokenizer.json of the checkpoint into its folder"
        )
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise InvalidArgument(
            'text needs the package "tokenizers", which is not installed: '
            'run pip install "armt[text]"'
        ) from error
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the package raises the bare class
        raise InvalidArgument(f"{file}: no valid tokenizer.json ({error})") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def pieces(source: str | IO[str] | Iterable[str]) -> Iterator[str]:
    """Strings of bounded size."""
    if isinstance(source, str):
        source = [source]
    read = getattr(source, "read", None)
    if read is None:
        for long in source:
            yield from (long[i : i + CHUNK] for i in range(0, len(long), CHUNK))
        return
    try:
        while text := read(CHUNK):
            yield text
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"text: found the byte {error.object[error.start]:#04x} ({error.reason}), expected "
            "UTF-8; convert the file, for example with iconv -t UTF-8"
        ) from error


def _backwards(text: str, patterns: Sequence[re.Pattern[str]]) -> Iterator[int]:
    """Positions behind the first character where a pattern matches, last ones first."""
    size = 256
    while True:
        start = max(len(text) - size, 0)
        cuts = {m.start() for p in patterns for m in p.finditer(text, start) if m.start() > 0}
        yield from sorted(cuts, reverse=True)
        if start == 0:
            return
        size *= 4


def _spans(text: str, token: str, cut: int) -> bool:
    """Whether an occurrence of ``token`` lies on both sides of ``cut``."""
    window = text[max(cut - len(token) + 1, 0) : cut + len(token) - 1]
    return token in window


def _joins_words(description: dict[str, Any]) -> bool:
    """Whether some token reaches from one word over a space into the next."""
    byte_level = '"ByteLevel"' in json.dumps(description.get("pre_tokenizer"))
    space = "\u0120" if byte_level else "\u2581 "
    white = "\u0120\u010a\u0109\u010d" if byte_level else "\u2581 \t\r\n"
    added = {token["content"] for token in description.get("added_tokens", [])}
    vocab = description["model"].get("vocab", {})
    words = vocab if isinstance(vocab, dict) else (entry[0] for entry in vocab)
    inside = re.compile(f"[^{white}][{space}]")
    return any(inside.search(word) for word in words if word not in added)
