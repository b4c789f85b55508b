"""The model that is served: its engine, its text, its limits."""

from __future__ import annotations

import asyncio
import codecs
import io
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np

from armt.engine import Engine
from armt.server.chat import ChatTemplate
from armt.server.errors import ApiError
from armt.server.jobs import Ids
from armt.text import Ids as TextIds
from armt.text import StreamEncoder, TextSettings, Tokenizer

UNIT = 8192
"""Characters that are encoded without letting others run."""


class Model:
    """An engine and what belongs to it; the same for every request."""

    def __init__(self, engine: Engine, *, name: str = "") -> None:
        checkpoint = engine.checkpoint
        self.engine = engine
        self.name = name or checkpoint.folder.name or "model"
        self.created = int(time.time())
        self.eos_ids = frozenset(checkpoint.eos_token_ids)
        self.tokenizer = None if checkpoint.tokenizer is None else Tokenizer(checkpoint.tokenizer)
        self.text = TextSettings.of(checkpoint.folder)
        self.chat = ChatTemplate.of(checkpoint.folder)

    def check_name(self, name: str | None) -> None:
        """ApiError if a request names another model."""
        if name is not None and name != self.name:
            raise ApiError(
                "model_not_found",
                f"model: found {name[:200]!r}, expected {self.name!r}, the one that is served",
                param="model",
            )

    def need_tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer; ApiError where the model has none."""
        if self.tokenizer is None:
            raise ApiError(
                "no_tokenizer",
                f"{param}: found text, but the model has no tokenizer.json; send token ids",
                param=param,
            )
        return self.tokenizer

    async def encode(self, text: str, *, param: str, specials: bool = False) -> Ids:
        """Token ids [tokens] of ``text``; other requests run meanwhile."""
        encoder = StreamEncoder(self.need_tokenizer(param), specials=specials, chunk=UNIT)
        found: list[TextIds] = []
        for piece in units(check_text(text, param)):
            found.append(encoder.feed(piece))
            if len(text) > UNIT:
                await asyncio.sleep(0)
        return self.check_ids(np.concatenate([*found, encoder.finish()]), param=param)

    def check_ids(self, values: Any, *, param: str) -> Ids:
        """Token ids [tokens] int32 from JSON or an array; ApiError for anything else."""
        try:
            ids = np.asarray(values)
        except (ValueError, OverflowError, TypeError):
            ids = np.zeros(0, np.float64)
        if isinstance(values, list) and not values:
            ids = np.zeros(0, np.int32)
        # NumPy takes true for 1 where it stands between numbers.
        mixed = isinstance(values, list) and any(isinstance(value, bool) for value in values)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or mixed:
            raise ApiError(
                "invalid_token", f"{param}: expected a list of integers, token ids", param=param
            )
        outside = (ids < 0) | (ids >= self.engine.vocab_size)
        if outside.any():
            place = int(np.flatnonzero(outside)[0])
            raise ApiError(
                "invalid_token",
                f"{param}: found the id {ids[place]} at position {place}, expected "
                f"0 .. {self.engine.vocab_size - 1}",
                param=param,
            )
        return ids.astype(np.int32)

    def decode(self, ids: Any) -> str:
        """The text of token ids, special tokens included; empty without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(ids, specials=True)


class TextFeed:
    """A stream of bytes, UTF-8, as token ids in constant memory, as ``armt run`` reads a file."""

    def __init__(self, model: Model, *, specials: bool, param: str = "body") -> None:
        self._model = model
        self._param = param
        self._encoder = StreamEncoder(model.need_tokenizer(param), specials=specials, chunk=UNIT)
        characters = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = io.IncrementalNewlineDecoder(characters, translate=True)
        self._space = ""

    async def feed(self, data: bytes) -> AsyncIterator[Ids]:
        """The ids that become certain with ``data``; ApiError where it is no UTF-8."""
        for i in range(0, len(data), UNIT):
            yield self._ids(self._encoder.feed(self._prepared(self._decoded(data[i : i + UNIT]))))
            await asyncio.sleep(0)

    def finish(self) -> Ids:
        """What is left at the end."""
        rest = self._prepared(self._decoded(b"", final=True))
        if not self._model.text.collapse_white_space:
            rest += self._space
        return self._ids(np.concatenate([self._encoder.feed(rest), self._encoder.finish()]))

    def _decoded(self, data: bytes, *, final: bool = False) -> str:
        try:
            return str(self._text.decode(data, final=final))
        except UnicodeDecodeError as error:
            raise ApiError(
                "invalid_text",
                f"{self._param}: found bytes that are no UTF-8 ({error.reason})",
                param=self._param,
            ) from error

    def _prepared(self, text: str) -> str:
        """As the model wants it; white space at the end waits for what follows."""
        if not self._model.text.collapse_white_space:
            return text
        text = self._space + text
        words = text.rstrip()
        self._space = text[len(words) :][:1]
        return "".join(self._model.text.prepared([words]))

    def _ids(self, ids: Ids) -> Ids:
        return self._model.check_ids(ids, param=self._param)


def units(text: str) -> Iterator[str]:
    """``text`` in pieces that are encoded at a time."""
    return (text[i : i + UNIT] for i in range(0, len(text), UNIT))


def check_text(text: str, param: str) -> str:
    """``text``; ApiError if it holds half a character (a lone surrogate from JSON)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ApiError(
            "invalid_text",
            f"{param}: found half a surrogate pair at position {error.start}, expected Unicode",
            param=param,
        ) from error
    return text
