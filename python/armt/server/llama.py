"""POST /completion, as clients of llama.cpp's server send it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from armt.server.answering import Choice, whole
from armt.server.completions import parse_prompts
from armt.server.context import Asking, Caller
from armt.server.errors import ApiError
from armt.server.events import event, stream
from armt.server.jobs import Ids, Token
from armt.server.schemas import LlamaBody
from armt.session import Session

router = APIRouter(tags=["llama.cpp"])


@router.post("/completion", response_model=None)
async def completion(body: LlamaBody, asking: Asking) -> dict[str, Any] | Response:
    """Continues one prompt, a text or token ids; fields that are not listed are ignored."""
    prompts = await parse_prompts(asking.context, body.prompt)
    if len(prompts) != 1:
        raise ApiError("invalid_request", "prompt: expected one prompt", param="prompt")
    run = LlamaRun(body, asking, prompts[0])
    if body.stream:
        return await stream(asking, run.events(), last="")
    return await asking.unless_gone(run.answer())


class LlamaRun:
    """One request."""

    def __init__(self, body: LlamaBody, asking: Caller, ids: Ids) -> None:
        self._asking = asking
        self._body = body
        self._ids = ids
        context = asking.context
        limit = None if body.n_predict == -1 else body.n_predict
        self._wanted = context.wanted(body.sampling_fields(), limit, top=body.n_probs)
        self._choice = Choice(context.model, context.scheduler, self._wanted)
        self._read_seconds = 0.0
        self._start = time.monotonic()

    async def answer(self) -> dict[str, Any]:
        """The whole answer."""
        session = await self._read()
        if self._wanted.max_tokens == 0:
            return self._last("", [])
        asking = self._asking
        answer = await whole(
            self._choice, session, first=asking.first_token, deadline=asking.deadline
        )
        return self._last(answer.text, [token for token, _ in answer.tokens])

    async def events(self) -> AsyncGenerator[str, None]:
        """The answer as events."""
        session, sent = await self._read(), 0
        if self._wanted.max_tokens > 0:
            parts = self._choice.parts(session, eager=True, first=self._asking.first_token)
            async with aclosing(parts):
                async for part in parts:
                    new = self._choice.ids[sent:]
                    sent = len(self._choice.ids)
                    tokens = [token for token, _ in part.tokens]
                    yield event(
                        {"content": part.text, "tokens": new, "stop": False, **self._probs(tokens)}
                    )
        yield event({**self._last("", []), "tokens": self._choice.ids[sent:]})

    async def _read(self) -> Session:
        session = self._asking.context.model.engine.session()
        await self._asking.context.scheduler.read(session, self._ids)
        self._read_seconds = time.monotonic() - self._start
        return session

    def _last(self, text: str, tokens: list[Token]) -> dict[str, Any]:
        stopped, made = self._choice.stopped_by, len(self._choice.ids)
        kind = "limit" if stopped is None else "word" if isinstance(stopped, str) else "eos"
        seconds = time.monotonic() - self._start - self._read_seconds
        return {
            "content": text,
            "tokens": self._choice.ids,
            "stop": True,
            "stop_type": kind,
            "stopping_word": stopped if isinstance(stopped, str) else "",
            "model": self._asking.context.model.name,
            "tokens_predicted": made,
            "tokens_evaluated": len(self._ids),
            "truncated": False,
            "timings": {
                "prompt_n": len(self._ids),
                "prompt_ms": 1000 * self._read_seconds,
                "predicted_n": made,
                "predicted_ms": 1000 * seconds,
            },
            **self._probs(tokens),
        }

    def _probs(self, tokens: list[Token]) -> dict[str, Any]:
        if not self._body.n_probs:
            return {}
        model = self._asking.context.model
        return {
            "completion_probabilities": [
                {
                    "id": token.id,
                    "token": model.decode([token.id]),
                    "logprob": token.logprob,
                    "top_logprobs": [
                        {"id": i, "token": model.decode([i]), "logprob": value}
                        for i, value in token.top
                    ],
                }
                for token in tokens
            ]
        }
