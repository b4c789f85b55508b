"""POST /v1/chat/completions, as OpenAI's clients send it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from armt.server.answering import NOTHING, Answer, Choice, forks, whole, within
from armt.server.chat import plain_form
from armt.server.completions import too_many
from armt.server.context import Asking, Caller, Context
from armt.server.errors import ApiError
from armt.server.events import event, stream
from armt.server.jobs import Ids, Token
from armt.server.merging import merged
from armt.server.model import Model
from armt.server.schemas import ChatBody
from armt.session import Session

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=None)
async def chat(body: ChatBody, asking: Asking) -> dict[str, Any] | Response:
    """Answers the last message.

    Messages become a prompt by the chat template of the model's folder. Without one: the contents
    of all messages but the last are a text, the last one, a user's, is the question about it.
    """
    context = asking.context
    context.model.check_name(body.model)
    body.refuse_unsupported()
    ids = await prompt_of(context, body)
    run = Chat(body, asking, ids)
    if body.stream:
        return await stream(asking, run.events())
    return await asking.unless_gone(run.answer())


async def prompt_of(context: Context, body: ChatBody) -> Ids:
    """The token ids of the messages."""
    model = context.model
    model.need_tokenizer("messages")
    messages = [message.plain() for message in body.messages]
    if model.chat is not None:
        # A template writes the special tokens itself.
        ids = await model.encode(model.chat.render(messages), param="messages")
    else:
        text = plain_form(messages, model.text.prompt_format)
        if model.text.collapse_white_space:
            text = "".join(model.text.prepared([text]))
        ids = await model.encode(text, param="messages", specials=True)
    if len(ids) == 0:
        raise ApiError("empty_input", "messages: expected at least one token", param="messages")
    return ids


class Chat:
    """One request."""

    def __init__(self, body: ChatBody, asking: Caller, ids: Ids) -> None:
        self._body = body
        self._asking = asking
        self._context = asking.context
        self._ids = ids
        self._n = body.n or 1
        if self._n > self._context.settings.max_choices:
            raise too_many(self._context)
        limit = body.max_completion_tokens or body.max_tokens
        self._wanted = self._context.wanted(body, limit, top=body.top_logprobs or 0)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": self._context.model.name,
        }

    async def answer(self) -> dict[str, Any]:
        """The whole answer."""
        work = asyncio.ensure_future(self._answers())
        await within(work, self._asking.deadline)
        answers = work.result()
        made = sum(len(answer.choice.ids) for answer in answers)
        return {
            **self._head,
            "choices": [self._choice(answer) for answer in answers],
            "usage": self._usage(made),
        }

    async def _answers(self) -> list[Answer]:
        first, deadline = self._asking.first_token, self._asking.deadline
        session, prompt = await self._read()
        return await asyncio.gather(
            *(
                whole(self._new_choice(i), fork, prompt, first=first, deadline=deadline)
                for i, fork in enumerate(forks(session, self._n))
            )
        )

    async def _read(self) -> tuple[Session, Ids]:
        """A session, and what its one choice must read; several choices share one reading."""
        session = self._context.model.engine.session()
        if self._n == 1:
            return session, self._ids
        await self._context.scheduler.read(session, self._ids)
        return session, NOTHING

    def _new_choice(self, index: int) -> Choice:
        return Choice(self._context.model, self._context.scheduler, self._wanted, index)

    def _choice(self, answer: Answer) -> dict[str, Any]:
        return {
            "index": answer.choice.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "token_ids": answer.choice.ids,
            "logprobs": self._logprobs([token for token, _ in answer.tokens]),
            "finish_reason": answer.choice.finish,
        }

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        model = self._context.model
        content = [
            {
                **shown(model, token.id, token.logprob),
                "top_logprobs": [shown(model, i, value) for i, value in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    async def events(self) -> AsyncGenerator[str, None]:
        """The answer as events."""
        made = [0]
        session, prompt = await self._read()
        parts = [
            self._choice_events(i, fork, prompt, made)
            for i, fork in enumerate(forks(session, self._n))
        ]
        async with aclosing(merged(parts)) as items:
            async for item in items:
                yield item
        options = self._body.stream_options
        if options is not None and options.include_usage:
            yield event({**self._head, "choices": [], "usage": self._usage(made[0])})

    async def _choice_events(
        self, index: int, session: Session, prompt: Ids, made: list[int]
    ) -> AsyncGenerator[str, None]:
        choice, sent = self._new_choice(index), 0
        yield self._chunk(index, {"role": "assistant", "content": ""}, [], None, None)
        parts = choice.parts(session, prompt, eager=True, first=self._asking.first_token)
        async with aclosing(parts):
            async for part in parts:
                logprobs = self._logprobs([token for token, _ in part.tokens])
                new = choice.ids[sent:]
                yield self._chunk(index, {"content": part.text}, new, logprobs, None)
                sent = len(choice.ids)
        made[0] += len(choice.ids)
        yield self._chunk(index, {}, choice.ids[sent:], None, choice.finish)

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        ids: list[int],
        logprobs: dict[str, Any] | None,
        finish: str | None,
    ) -> str:
        choice = {
            "index": index,
            "delta": delta,
            "token_ids": ids,
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        return event({**self._head, "choices": [choice]})

    def _usage(self, made: int) -> dict[str, int]:
        read = len(self._ids)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def shown(model: Model, token_id: int, logprob: float) -> dict[str, Any]:
    """A token with its logprob and bytes."""
    text = model.decode([token_id])
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}
