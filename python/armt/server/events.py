"""Answers as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

from armt.server.answering import too_slow
from armt.server.context import Caller
from armt.server.errors import as_api_error

DONE = "data: [DONE]\n\n"
SILENCE = ": waiting\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(value: Any) -> str:
    """One event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Source:
    """Events as they come, each waited for only so long; what came together goes out together."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        self._events = events
        self._items: list[str] = []
        self._error: Exception | None = None
        self._ended = False
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.ensure_future(self._pump())

    async def next(self, patience: float) -> str | None:
        """The next events; None at the end, SILENCE if they take too long."""
        if not self._items and not self._ended:
            self._news.clear()
            timer = self._loop.call_later(patience, self._news.set)
            await self._news.wait()
            timer.cancel()
        if self._items:
            items, self._items = self._items, []
            return "".join(items)
        if self._error is not None:
            raise self._error
        return None if self._ended else SILENCE

    async def close(self) -> None:
        """Ends what produces the events."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._events.aclose()

    async def _pump(self) -> None:
        try:
            async for item in self._events:
                self._items.append(item)
                self._news.set()
        except Exception as error:
            self._error = error
        finally:
            self._ended = True
            self._news.set()


async def stream(
    asking: Caller, events: AsyncGenerator[str, None], *, last: str = DONE
) -> StreamingResponse:
    """Answers with ``events`` and ``last``.

    The first event is waited for, so that what is wrong with a request still gets its own status;
    a later error becomes an event. When the client goes away, ``events`` is closed.
    """
    source = Source(events)
    heartbeat = asking.context.settings.heartbeat
    try:
        first = await asking.unless_gone(source.next(heartbeat))
    except BaseException:
        await source.close()
        raise

    async def body() -> AsyncIterator[str]:
        item = first
        try:
            while item is not None:
                yield item
                left = asking.deadline - time.monotonic()
                if left <= 0:
                    raise too_slow()
                item = await source.next(min(heartbeat, left))
            yield last
        except Exception as error:
            shown = as_api_error(error)
            asking.context.metrics.errors.labels(shown.code).inc()
            yield event(shown.body())
        finally:
            await source.close()

    return StreamingResponse(body(), media_type="text/event-stream", headers=HEADERS)
