"""Sessions over HTTP: memories that are fed, asked, forked, saved and loaded."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from armt._core import State
from armt.server.answering import NOTHING, Choice, whole
from armt.server.context import Asking, Caller, Gone
from armt.server.errors import ApiError
from armt.server.events import event, stream
from armt.server.jobs import Ids, Token
from armt.server.model import TextFeed
from armt.server.problems import from_validation
from armt.server.schemas import AskBody, FeedBody, NewSession
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
        handle, path = tempfile.mkstemp(prefix="upload-", dir=context.store.scratch())
        try:
            with os.fdopen(handle, "wb") as file:
                async for data in arriving(request):
                    await asyncio.to_thread(file.write, data)
            state = await asyncio.to_thread(State.load, path)
            change.session = context.model.engine.session(state=state)
        finally:
            os.unlink(path)
    return shown(entry)


# ------------------------------------------------------------------------- reading


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


async def text_ids(asking: Caller, request: Request, *, fresh: bool) -> AsyncIterator[Ids]:
    """The ids of a text as it arrives."""
    encoder = TextFeed(asking.context.model, specials=fresh)
    async for data in arriving(request):
        async for ids in encoder.feed(data):
            yield ids
    yield encoder.finish()


async def binary_ids(asking: Caller, request: Request) -> AsyncIterator[Ids]:
    """Token ids as 32-bit little-endian integers."""
    rest = b""
    async for data in arriving(request):
        data = rest + data
        whole_bytes = len(data) // 4 * 4
        rest = data[whole_bytes:]
        yield asking.context.model.check_ids(
            np.frombuffer(data[:whole_bytes], np.dtype("<i4")), param="body"
        )
    if rest:
        raise ApiError("invalid_token", "body: expected four bytes for each token", param="body")


async def json_ids(asking: Caller, request: Request, *, fresh: bool) -> AsyncIterator[Ids]:
    """Of a JSON body."""
    model = asking.context.model
    try:
        body = FeedBody.model_validate(json.loads(b"".join([p async for p in arriving(request)])))
    except ValidationError as error:
        raise from_validation(error.errors(include_input=False, include_url=False)) from error
    except (ValueError, RecursionError) as error:
        raise ApiError("invalid_json", "body: no valid JSON") from error
    if (body.text is None) == (body.tokens is None):
        raise ApiError("invalid_request", "body: expected either text or tokens")
    if body.text is None:
        yield model.check_ids(body.tokens, param="tokens")
        return
    encoder = TextFeed(model, specials=fresh, param="text")
    async for ids in encoder.feed(check_utf8(body.text)):
        yield ids
    yield encoder.finish()


def check_utf8(text: str) -> bytes:
    """``text`` as bytes; ApiError for half characters."""
    from armt.server.model import check_text

    return check_text(text, "text").encode("utf-8")


async def arriving(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes."""
    try:
        async for data in request.stream():
            if data:
                yield data
    except ClientDisconnect as error:
        raise Gone from error


def need_type(request: Request, *kinds: str) -> str:
    """The body's media type; ApiError where it is none of ``kinds``."""
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found not in kinds:
        raise ApiError(
            "unsupported_media_type",
            f"Content-Type: found {found[:100]!r}, expected {' or '.join(kinds)}",
        )
    return found


# -------------------------------------------------------------------------- asking


@router.post("/{session_id}/ask", response_model=None)
async def ask(
    session_id: str, body: AskBody, asking: Asking, if_version: Version = None
) -> dict[str, Any] | Response:
    """Answers from the session's memory.

    ``question`` is put into the model's own form, ``prompt`` and ``tokens`` are read as they are;
    without any of them the stream is continued. With ``write`` question and answer stay in the
    session, all or nothing; otherwise it is as before.
    """
    context = asking.context
    entry = context.store.find(asking.owner, session_id)
    ids = await question_ids(asking, body, entry)
    run = Asked(body, asking, entry, ids, if_version)
    if body.stream:
        return await stream(asking, run.events())
    return await asking.unless_gone(run.answer())


async def question_ids(asking: Caller, body: AskBody, entry: Entry) -> Ids:
    """What is read before the answer; may be empty."""
    model = asking.context.model
    given = [name for name in ("question", "prompt", "tokens") if getattr(body, name) is not None]
    if len(given) > 1:
        raise ApiError(
            "invalid_request", f"{' and '.join(given)}: expected one of them", param=given[1]
        )
    fresh = entry.tokens == 0
    if body.question is not None:
        text = model.text.prompt(body.question)
        ids = await model.encode(text, param="question", specials=fresh)
    elif body.prompt is not None:
        ids = await model.encode(body.prompt, param="prompt", specials=fresh)
    elif body.tokens is not None:
        ids = model.check_ids(body.tokens, param="tokens")
    else:
        ids = NOTHING
    if fresh and len(ids) == 0:
        raise ApiError("empty_input", "the session has read nothing yet; feed or ask something")
    return ids


class Asked:
    """One request."""

    def __init__(
        self, body: AskBody, asking: Caller, entry: Entry, ids: Ids, version: int | None
    ) -> None:
        self._body = body
        self._asking = asking
        self._entry = entry
        self._ids = ids
        self._version = version
        context = asking.context
        self._wanted = context.wanted(
            body, body.max_tokens, top=body.logprobs or 0, keep=body.write
        )
        self._choice = Choice(context.model, context.scheduler, self._wanted)

    async def answer(self) -> dict[str, Any]:
        """The whole answer."""
        asking = self._asking
        async with self._session() as session:
            await self._make_room(session)
            answer = await whole(
                self._choice,
                session,
                self._ids,
                first=asking.first_token,
                deadline=asking.deadline,
            )
        tokens = [token for token, _ in answer.tokens]
        return {
            "object": "answer",
            **self._part(answer.text, self._choice.ids, tokens),
            **self._end(),
        }

    async def events(self) -> AsyncGenerator[str, None]:
        """The answer as events."""
        sent = 0
        head = {"object": "answer.chunk"}
        async with self._session() as session:
            await self._make_room(session)
            first = self._asking.first_token
            parts = self._choice.parts(session, self._ids, eager=True, first=first)
            async with aclosing(parts):
                async for part in parts:
                    new = self._choice.ids[sent:]
                    sent = len(self._choice.ids)
                    tokens = [token for token, _ in part.tokens]
                    yield event({**head, **self._part(part.text, new, tokens)})
        yield event({**head, **self._part("", self._choice.ids[sent:], []), **self._end()})

    def _session(self) -> AbstractAsyncContextManager[Session]:
        return self._kept() if self._body.write else self._asking.context.store.reading(self._entry)

    @asynccontextmanager
    async def _kept(self) -> AsyncIterator[Session]:
        store = self._asking.context.store
        async with store.writing(self._entry, version=self._version) as change:
            yield change.session

    async def _make_room(self, session: Session) -> None:
        """Closes the open segment if a question that fits into a segment would be torn in two."""
        size = session.engine.segment_size
        fits = self._body.question is not None and len(self._ids) <= size
        if fits and size < session.open_tokens + len(self._ids):
            await self._asking.context.scheduler.read(session, NOTHING, close=True)

    def _part(self, text: str, ids: list[int], tokens: list[Token]) -> dict[str, Any]:
        model = self._asking.context.model
        part: dict[str, Any] = {"text": text, "token_ids": ids}
        if self._body.logprobs is not None:
            part["logprobs"] = [
                {
                    "token_id": token.id,
                    "token": model.decode([token.id]),
                    "logprob": token.logprob,
                    "top": [
                        {"token_id": i, "token": model.decode([i]), "logprob": value}
                        for i, value in token.top
                    ],
                }
                for token in tokens
            ]
        return part

    def _end(self) -> dict[str, Any]:
        read, made = len(self._ids), len(self._choice.ids)
        return {
            "finish_reason": self._choice.finish,
            "usage": {"prompt_tokens": read, "completion_tokens": made},
            "session": shown(self._entry),
        }


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
