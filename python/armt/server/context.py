"""What every route works with, and small things that several of them do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from armt.server.answering import Wanted, fresh_seed
from armt.server.errors import ApiError
from armt.server.metrics import Metrics
from armt.server.model import Model
from armt.server.scheduler import Scheduler
from armt.server.schemas import SamplingFields
from armt.server.settings import Settings
from armt.server.store import Store

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """The parts of a running server."""

    settings: Settings
    model: Model
    scheduler: Scheduler
    store: Store
    metrics: Metrics

    def wanted(
        self, fields: SamplingFields, max_tokens: int | None, *, top: int = 0, keep: bool = False
    ) -> Wanted:
        """What a request asks for; a session that is kept goes on with its own draws."""
        limit = self.settings.max_tokens
        if max_tokens is not None and max_tokens > limit:
            raise ApiError(
                "invalid_request",
                f"max_tokens: found {max_tokens}, expected at most {limit}",
                param="max_tokens",
            )
        stops = fields.stops()
        if stops:
            self.model.need_tokenizer("stop")
        ends = frozenset() if fields.ignore_eos else self.model.eos_ids
        seed = fields.seed
        if seed is None and fields.temperature > 0 and not keep:
            seed = fresh_seed()
        return Wanted(
            max_tokens=limit if max_tokens is None else max_tokens,
            sampling=fields.sampling(),
            seed=seed,
            stops=stops,
            stop_ids=ends | frozenset(fields.stop_token_ids or ()),
            top=top,
            keep=keep,
        )


@dataclass(frozen=True)
class Caller:
    """Who asks, since when."""

    context: Context
    request: Request
    owner: str
    start: float

    @property
    def deadline(self) -> float:
        """When the answer must be done (time.monotonic)."""
        return self.start + self.context.settings.request_timeout

    def first_token(self) -> None:
        """Notes that the first token is there."""
        self.context.metrics.first_token.observe(time.monotonic() - self.start)

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """The result of ``work``, which is cancelled when the client goes away."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Gone
            return task.result()
        finally:
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


class Gone(Exception):
    """The client went away; there is nobody to answer."""


async def caller(request: Request) -> Caller:
    """Dependency of every route."""
    state = request.scope["state"]
    return Caller(request.app.state.context, request, state["owner"], state["start"])


Asking = Annotated[Caller, Depends(caller)]
