"""What the engine's thread can be asked to do, and how answers come back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from armt import _core
from armt.session import FloatArray, Sampling, Session

Ids: TypeAlias = npt.NDArray[np.int32]
FinishReason: TypeAlias = Literal["length", "stop"]


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    logprob: float
    """Natural logarithm of the model's own probability."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at this place and their logprobs, where asked for."""


@dataclass(eq=False)
class Job:
    """Work on one session; until it is done nobody else touches that session."""

    session: Session
    cancelled: bool = field(default=False, init=False)
    """Set by whoever waits; the engine's thread drops the job at its next pass."""

    @property
    def unwanted(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.cancelled

    def failed(self, error: BaseException) -> None:
        """Tells whoever waits. In the event loop."""
        raise NotImplementedError


@dataclass(eq=False)
class Read(Job):
    """Reads tokens; with ``close`` it then writes the open segment to memory."""

    ids: Ids
    result: asyncio.Future[FloatArray | None] | None = None
    then: Decode | None = None
    """The generation that follows at once, and that is told of faults."""
    logits: Literal["none", "all"] = "none"
    close: bool = False
    read: int = field(default=0, init=False)

    @property
    def left(self) -> int:
        """Tokens that are not read yet."""
        return len(self.ids) - self.read

    @property
    def unwanted(self) -> bool:
        """See Job."""
        return self.cancelled or (self.then is not None and self.then.cancelled)

    def done(self, logits: FloatArray | None) -> None:
        """In the event loop."""
        if self.result is not None and not self.result.done():
            self.result.set_result(logits)

    def failed(self, error: BaseException) -> None:
        """In the event loop."""
        if self.then is not None:
            self.then.failed(error)
        if self.result is not None and not self.result.done():
            self.result.set_exception(error)


@dataclass(eq=False)
class Decode(Job):
    """Generates tokens until one of the ends is reached."""

    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    stopped_by: Callable[[int], bool] | None = None
    """Sees every token in the engine's thread; True ends the generation."""
    top: int = 0
    keep: bool = True
    """Whether the session is wanted afterwards: then the last token is read into it too."""
    eager: bool = True
    """Whether tokens are handed over one by one, or all at the end."""
    prompt: Ids = field(default_factory=lambda: np.zeros(0, np.int32))
    """What is read before."""

    params: _core.SamplingParams | None = field(default=None, init=False)
    made: int = field(default=0, init=False)
    held: list[Token] = field(default_factory=list, init=False)
    """Tokens not handed over yet; the engine thread's."""
    finish: FinishReason | None = field(default=None, init=False)
    _arrived: deque[Token] = field(default_factory=deque, init=False)
    _error: BaseException | None = field(default=None, init=False)
    _news: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    async def tokens(self) -> AsyncIterator[Token]:
        """The tokens as they come; ``finish`` is set behind the last one."""
        while True:
            while self._arrived:
                yield self._arrived.popleft()
            if self._error is not None:
                raise self._error
            if self.finish is not None:
                return
            self._news.clear()
            await self._news.wait()

    def ends_with(self, token: Token) -> FinishReason | None:
        """Takes note of a token; why it is the last one, if it is. In the engine's thread."""
        self.made += 1
        self.held.append(token)
        if token.id in self.stop_ids:
            return "stop"
        if self.stopped_by is not None and self.stopped_by(token.id):
            return "stop"
        return "length" if self.made >= self.max_tokens else None

    def came(self, tokens: list[Token], finish: FinishReason | None) -> None:
        """In the event loop."""
        self._arrived.extend(tokens)
        self.finish = finish
        self._news.set()

    def failed(self, error: BaseException) -> None:
        """In the event loop."""
        self._error = error
        self._news.set()


def top_logprobs(logits: FloatArray, count: int) -> tuple[tuple[int, float], ...]:
    """The ``count`` likeliest tokens of ``logits`` [vocab], likeliest first, lower ids first."""
    if count == 0:
        return ()
    count = min(count, len(logits))
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    edge = np.partition(values, -count)[-count]
    near = np.flatnonzero(values >= edge)
    best = near[np.argsort(-values[near], kind="stable")][:count]
    return tuple((int(i), float(values[i])) for i in best)
