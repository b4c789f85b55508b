"""The application: parts put together, started and stopped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI

import armt
from armt.engine import Engine
from armt.server import chats, completions, llama, problems, questions, sessions, status
from armt.server.auth import Keys
from armt.server.context import Context
from armt.server.guard import Guard
from armt.server.metrics import Metrics
from armt.server.model import Model
from armt.server.scheduler import Scheduler
from armt.server.settings import Settings
from armt.server.store import Store

log = logging.getLogger("armt.server")


def create_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """An ASGI application that serves ``engine``; run it in one process with one event loop.

    Raises InvalidArgument for impossible settings.
    """
    settings = settings or Settings()
    keys = Keys(settings.api_keys)
    scheduler = Scheduler(engine, max_batch=settings.max_batch, pause=settings.decode_pause)
    store = Store(engine, settings)
    metrics = Metrics(scheduler, store)
    model = Model(engine, name=settings.model_name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        store.open()
        scheduler.start()
        sweeper = asyncio.ensure_future(sweep(store, settings.idle_seconds))
        try:
            yield
        finally:
            sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await sweeper
            await scheduler.stop()
            saved = await store.close()
            log.info("stopped", extra={"fields": {"sessions_saved": saved}})

    app = FastAPI(
        title="armt",
        version=armt.__version__,
        description="Recurrent associative memory over HTTP.",
        lifespan=lifespan,
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.context = Context(settings, model, scheduler, store, metrics)
    for part in (status, completions, chats, llama, sessions, questions):
        app.include_router(part.router)
    problems.install(app, metrics)
    app.add_middleware(Guard, settings=settings, keys=keys, metrics=metrics)
    return app


async def sweep(store: Store, idle_seconds: float) -> None:
    """Moves idle sessions to disk, for ever."""
    while True:
        await asyncio.sleep(min(max(idle_seconds / 4, 0.05), 10.0))
        try:
            await store.sweep()
        except Exception:
            log.exception("looking for idle sessions failed")
