"""Generated tokens as text: whole characters, up to a stop string, with logprobs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from armt.server.jobs import Token
from armt.text import StreamDecoder, Tokenizer


@dataclass
class Part:
    """What one step adds to an answer."""

    text: str = ""
    tokens: list[tuple[Token, int]] = field(default_factory=list)
    """The tokens that the text consists of, each with its place in the answer in characters."""


class Words:
    """Turns tokens into text; holds back what may be the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str] = ()) -> None:
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        self._stops = tuple(stops)
        self._held = ""
        self._shown = 0
        self._tokens: list[tuple[Token, int]] = []
        self.stopped: str | None = None
        """The stop string that ended the answer."""

    def feed(self, token: Token) -> Part:
        """What becomes certain with ``token``."""
        if self.stopped is not None:
            return Part()
        self._tokens.append((token, self._shown + len(self._held)))
        if self._decoder is None:
            return self._part(0)
        self._held += self._decoder.feed(token.id)
        return self._checked()

    def finish(self) -> Part:
        """What is left at the end."""
        if self.stopped is not None:
            return Part()
        if self._decoder is not None:
            self._held += self._decoder.finish()
        part = self._checked()
        rest = self._part(len(self._held), all_tokens=self.stopped is None)
        return Part(part.text + rest.text, part.tokens + rest.tokens)

    def hit(self, token_id: int) -> bool:
        """:meth:`feed` for a watcher that only wants to know whether the answer ends."""
        self.feed(Token(token_id, 0.0))
        self._tokens.clear()
        return self.stopped is not None

    def _checked(self) -> Part:
        found = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if found:
            place, self.stopped = min(found, key=lambda pair: pair[0])
            part = self._part(place)
            self._held = ""
            self._tokens = []
            return part
        return self._part(len(self._held) - self._risk())

    def _risk(self) -> int:
        """Characters at the end that may turn out to begin a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _part(self, end: int, *, all_tokens: bool = False) -> Part:
        text, self._held = self._held[:end], self._held[end:]
        self._shown += len(text)
        whole = all_tokens or (self._decoder is None) or not self._held
        ready = [pair for pair in self._tokens if whole or pair[1] < self._shown]
        self._tokens = self._tokens[len(ready) :]
        return Part(text, ready)
