"""Sessions over HTTP: memories that are fed, forked, saved and loaded. Asking: questions.py."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from armt._core import State
from armt.server.answering import NOTHING
from armt.server.bodies import arriving, binary_ids, json_ids, need_type, text_ids
from armt.server.context import Asking, Caller
from armt.server.errors import ApiError
from armt.server.jobs import Ids
from armt.server.schemas import FeedBody, NewSession
from armt.server.store import Entry
from armt.session import Session

router = APIRouter(prefix="/v1/sessions", tags=["Sessions"])

BLOCK = 16
"""Segments that are handed to the engine at a time while a feed arrives."""
UPLOAD = "application/octet-stream"
Version = Annotated[int | None, Query(ge=0, description="Refuse if the session is not at it.")]


@router.post("", status_code=201, response_model=None)
async def create(asking: Asking, body: NewSession | None = None) -> dict[str, Any]:
    """A new session with an empty memory."""
    session = None
    if body is not None and body.seed is not None:
        session = asking.context.model.engine.session(seed=body.seed)
    return shown(await asking.context.store.create(asking.owner, session))


@router.get("", response_model=None)
async def listed(
    asking: Asking,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """The caller's sessions, oldest first; ``after`` is the last id of the page before."""
    entries = asking.context.store.owned(asking.owner)
    if after is not None:
        places = [i for i, entry in enumerate(entries) if entry.id == after]
        entries = entries[places[0] + 1 :] if places else []
    page = entries[:limit]
    return {
        "object": "list",
        "data": [shown(entry) for entry in page],
        "has_more": len(entries) > limit,
    }


@router.get("/{session_id}", response_model=None)
async def one(session_id: str, asking: Asking) -> dict[str, Any]:
    """What the server knows about a session without touching its state."""
    return shown(asking.context.store.find(asking.owner, session_id))


@router.delete("/{session_id}", response_model=None)
async def delete(session_id: str, asking: Asking) -> dict[str, Any]:
    """Forgets a session and its file."""
    store = asking.context.store
    await store.delete(store.find(asking.owner, session_id))
    return {"id": session_id, "object": "session", "deleted": True}


@router.get("/{session_id}/memory", response_model=None)
async def memory(session_id: str, asking: Asking) -> dict[str, Any]:
    """How full each layer's memory is: norms, mass of the keys, and what the last write did."""
    store = asking.context.store
    async with store.reading(store.find(asking.owner, session_id)) as session:
        layers = await asyncio.to_thread(norms, session.state)
        return {"object": "memory", "tokens": session.tokens, "layers": layers}


def norms(state: State) -> list[dict[str, Any]]:
    """One object for each layer of a state."""
    found = []
    for layer in range(state.layers):
        values, mass = state.memory(layer)
        found.append(
            {
                "layer": layer,
                "written": state.written(layer),
                "norm": float(np.linalg.norm(values)),
                "head_norms": [float(np.linalg.norm(head)) for head in values],
                "key_mass": None if mass is None else float(np.abs(mass).sum()),
                "last_write": state.write_statistics(layer),
            }
        )
    return found


@router.post("/{session_id}/fork", status_code=201, response_model=None)
async def fork(session_id: str, asking: Asking) -> dict[str, Any]:
    """A second session that goes on from here; the memory is shared until one of them changes."""
    store = asking.context.store
    async with store.reading(store.find(asking.owner, session_id)) as session:
        return shown(await store.create(asking.owner, session))


@router.get("/{session_id}/save", response_model=None, operation_id="download")
@router.post("/{session_id}/save", response_model=None, operation_id="save")
async def save(session_id: str, asking: Asking) -> Response:
    """The state file as a download; the session stays as it is."""
    store = asking.context.store
    entry = store.find(asking.owner, session_id)
    async with store.reading(entry) as session:
        data = await asyncio.to_thread(session.state.to_bytes)
    headers = {
        "Content-Disposition": 'attachment; filename="session.armt-state"',
        "ETag": f'"{entry.version}"',
    }
    return Response(data, media_type=UPLOAD, headers=headers)


@router.post("/{session_id}/load", response_model=None)
async def load(
    session_id: str, asking: Asking, request: Request, if_version: Version = None
) -> dict[str, Any]:
    """Replaces the session's state by an uploaded state file (application/octet-stream)."""
    context = asking.context
    entry = context.store.find(asking.owner, session_id)
    need_type(request, UPLOAD)
    async with context.store.writing(entry, version=if_version) as change:
        with tempfile.NamedTemporaryFile(prefix="upload-", dir=context.store.scratch()) as file:
            async for data in arriving(request):
                await asyncio.to_thread(file.write, data)
            await asyncio.to_thread(file.flush)
            state = await asyncio.to_thread(State.load, file.name)
        change.session = context.model.engine.session(state=state)
    return shown(entry)


@router.post(
    "/{session_id}/feed",
    response_model=None,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "text/plain": {"schema": {"type": "string"}},
                UPLOAD: {"schema": {"type": "string", "format": "binary"}},
                "application/json": {"schema": FeedBody.model_json_schema()},
            },
        }
    },
)
async def feed(
    session_id: str,
    asking: Asking,
    request: Request,
    close_segment: bool = False,
    if_version: Version = None,
) -> dict[str, Any]:
    """Reads a body of any size into the session, as it arrives, in constant memory.

    text/plain is UTF-8 text, application/octet-stream token ids as 32-bit little-endian integers,
    application/json an object with ``text`` or ``tokens``. All or nothing: if the body is cut
    short or refused, the session is as before.
    """
    context, start = asking.context, time.monotonic()
    entry = context.store.find(asking.owner, session_id)
    kind = need_type(request, "text/plain", UPLOAD, "application/json")
    async with context.store.writing(entry, version=if_version) as change:
        before = change.session.tokens
        if kind == "application/json":
            source = json_ids(asking, request, fresh=before == 0)
        elif kind == "text/plain":
            source = text_ids(asking, request, fresh=before == 0)
        else:
            source = binary_ids(asking, request)
        await read_all(asking, change.session, source)
        read = change.session.tokens - before
        if read == 0:
            raise ApiError("empty_input", "body: expected at least one token", param="body")
        if close_segment:
            await context.scheduler.read(change.session, NOTHING, close=True)
    seconds = time.monotonic() - start
    return {
        "object": "feed",
        "tokens": read,
        "seconds": seconds,
        "tokens_per_second": read / seconds,
        "session": shown(entry),
    }


async def read_all(asking: Caller, session: Session, source: AsyncIterator[Ids]) -> None:
    """Reads ``source`` into ``session``; the next block is encoded while one is read."""
    scheduler, size = asking.context.scheduler, BLOCK * session.engine.segment_size
    held: list[Ids] = []
    reading: asyncio.Task[Any] | None = None
    try:
        async for ids in source:
            held.append(ids)
            if sum(map(len, held)) < size:
                continue
            if reading is not None:
                await reading
            reading = asyncio.ensure_future(scheduler.read(session, np.concatenate(held)))
            held = []
        if reading is not None:
            await reading
        rest = np.concatenate([NOTHING, *held])
        if len(rest):
            await scheduler.read(session, rest)
    finally:
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


def shown(entry: Entry) -> dict[str, Any]:
    """A session as JSON."""
    return {
        "id": entry.id,
        "object": "session",
        "created": entry.created,
        "version": entry.version,
        "tokens": entry.tokens,
        "segments": entry.segments,
        "open_tokens": entry.open_tokens,
        "in_memory": entry.session is not None,
        "busy": entry.writing,
    }
