"""Prompts into answers: read once, fork for each choice, generate."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from armt.server.errors import ApiError
from armt.server.jobs import Decode, FinishReason, Ids, Token, top_logprobs
from armt.server.model import Model
from armt.server.scheduler import Scheduler
from armt.server.words import Part, Words
from armt.session import Sampling, Session

NOTHING = np.zeros(0, np.int32)
LOGITS_BYTES = 16 << 20
"""Logits that are held at a time while a prompt is scored."""


@dataclass(frozen=True)
class Wanted:
    """How to answer, the same for every choice of a request."""

    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stops: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    top: int = 0
    keep: bool = False
    """Whether the session is kept, the answer in it."""


class Choice:
    """One answer in the making."""

    def __init__(self, model: Model, scheduler: Scheduler, wanted: Wanted, index: int = 0) -> None:
        self.index = index
        self.ids: list[int] = []
        """All generated tokens, the stop token included."""
        self._model = model
        self._scheduler = scheduler
        self._wanted = wanted
        self._words = Words(model.tokenizer, wanted.stops)
        self._job: Decode | None = None

    @property
    def finish(self) -> FinishReason:
        """Why it ended."""
        assert self._job is not None and self._job.finish is not None
        return self._job.finish

    @property
    def stopped_by(self) -> str | int | None:
        """The stop string or stop token that ended it."""
        if self._words.stopped is not None:
            return self._words.stopped
        ended = self.ids and self.ids[-1] in self._wanted.stop_ids
        return self.ids[-1] if ended else None

    async def parts(
        self,
        session: Session,
        prompt: Ids = NOTHING,
        *,
        eager: bool,
        first: Callable[[], None],
    ) -> AsyncGenerator[Part, None]:
        """Reads ``prompt`` into ``session`` and goes on from there.

        Yields what comes, token by token if ``eager``, else at the end.

        ``first`` is called when the first token is there. Closing the iterator ends the generation.
        """
        wanted = self._wanted
        if wanted.seed is not None:
            session._core.set_seed(wanted.seed + self.index)
        watcher = Words(self._model.tokenizer, wanted.stops).hit if wanted.stops else None
        self._job = self._scheduler.decode(
            Decode(
                session,
                wanted.max_tokens,
                wanted.sampling,
                wanted.stop_ids,
                stopped_by=watcher,
                top=wanted.top,
                keep=wanted.keep,
                eager=eager,
                prompt=prompt,
            )
        )
        try:
            async for token in self._job.tokens():
                if not self.ids:
                    first()
                self.ids.append(token.id)
                if token.id in wanted.stop_ids:
                    continue
                part = self._words.feed(token)
                if part.text or part.tokens:
                    yield part
            yield self._words.finish()
        finally:
            self._job.cancelled = True


@dataclass
class Answer:
    """A finished choice."""

    choice: Choice
    text: str = ""
    tokens: list[tuple[Token, int]] = field(default_factory=list)


async def whole(
    choice: Choice,
    session: Session,
    prompt: Ids = NOTHING,
    *,
    first: Callable[[], None],
    deadline: float,
) -> Answer:
    """The whole of a choice; ApiError ``request_timeout`` when it takes too long."""
    answer = Answer(choice)

    async def collect() -> None:
        async for part in choice.parts(session, prompt, eager=False, first=first):
            answer.text += part.text
            answer.tokens += part.tokens

    await within(collect(), deadline)
    return answer


async def within(work: object, deadline: float) -> None:
    """Awaits ``work`` until ``deadline`` (of time.monotonic); then ApiError request_timeout."""
    try:
        await asyncio.wait_for(work, max(deadline - time.monotonic(), 0.0))  # type: ignore[arg-type]
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise too_slow() from error


def too_slow() -> ApiError:
    """The request's time is up."""
    return ApiError("request_timeout", "the answer was not done in time; ask for fewer tokens")


def forks(session: Session, count: int) -> list[Session]:
    """``session`` and ``count - 1`` forks of it."""
    return [session, *(session.fork() for _ in range(count - 1))]


def fresh_seed() -> int:
    """For requests without a seed; small enough for one to be added for each choice."""
    return secrets.randbits(62)


async def score_prompt(
    model: Model, scheduler: Scheduler, session: Session, ids: Ids, top: int
) -> list[Token | None]:
    """Reads ``ids`` into ``session``; each with its logprob given all before it.

    The first is None if the session had read nothing.
    """
    rows = max(LOGITS_BYTES // (4 * model.engine.vocab_size), 1)
    found: list[Token | None] = []
    before = None if session.tokens == 0 else session.logits
    for i in range(0, len(ids), rows):
        piece = ids[i : i + rows]
        logits = await scheduler.read(session, piece, logits="all")
        assert logits is not None
        known = [before, *logits[:-1]]
        found += await asyncio.to_thread(_scored, known, piece, top)
        before = logits[-1].copy()
    return found


def _scored(known: Sequence[object], ids: Ids, top: int) -> list[Token | None]:
    found: list[Token | None] = []
    for logits, token in zip(known, ids.tolist(), strict=True):
        if not isinstance(logits, np.ndarray):
            found.append(None)
            continue
        values = logits.astype(np.float64)
        values -= values.max()
        logprob = float(values[token] - np.log(np.exp(values).sum()))
        found.append(Token(token, logprob, top_logprobs(logits, top)))
    return found
