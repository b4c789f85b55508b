"""Questions to a session over HTTP: what is read, what is answered, and whether it stays."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from armt.server.answering import NOTHING, Choice, whole
from armt.server.context import Asking, Caller
from armt.server.errors import ApiError
from armt.server.events import event, stream
from armt.server.jobs import Ids, Token
from armt.server.schemas import AskBody
from armt.server.sessions import Version, shown
from armt.server.store import Entry
from armt.session import Session

router = APIRouter(prefix="/v1/sessions", tags=["Sessions"])


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
