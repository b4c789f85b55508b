"""POST /v1/completions, as OpenAI's clients send it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from armt.server.answering import NOTHING, Answer, Choice, forks, score_prompt, whole, within
from armt.server.context import Asking, Caller, Context
from armt.server.errors import ApiError
from armt.server.events import event, stream
from armt.server.jobs import Ids, Token
from armt.server.merging import merged
from armt.server.model import Model
from armt.server.schemas import CompletionBody
from armt.session import Session

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionBody, asking: Asking) -> dict[str, Any] | Response:
    """Continues each prompt: text, several texts, token ids, or several lists of token ids.

    Every prompt is read into an empty memory, as a stream of any length.
    """
    context = asking.context
    context.model.check_name(body.model)
    body.refuse_unsupported()
    prompts = await parse_prompts(context, body.prompt)
    run = Completion(body, asking, prompts)
    if body.stream:
        return await stream(asking, run.events())
    return await asking.unless_gone(run.answer())


async def parse_prompts(context: Context, prompt: Any) -> list[Ids]:
    """The token ids of each prompt; ApiError for what is no prompt."""
    model = context.model
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ApiError(
            "invalid_request" if not isinstance(prompt, list) else "empty_input",
            "prompt: expected a text, token ids, or a list of such",
            param="prompt",
        )
    if isinstance(prompt[0], int):
        prompt = [prompt]
    if len(prompt) > context.settings.max_choices:
        raise too_many(context)
    found = []
    for item in prompt:
        if isinstance(item, str):
            ids = await model.encode(item, param="prompt", specials=True)
        else:
            ids = model.check_ids(item, param="prompt")
        if len(ids) == 0:
            raise ApiError("empty_input", "prompt: expected at least one token", param="prompt")
        found.append(ids)
    return found


def too_many(context: Context) -> ApiError:
    """More choices than one request may ask for."""
    return ApiError(
        "invalid_request",
        f"prompts times n: expected at most {context.settings.max_choices}",
        param="n",
    )


class Completion:
    """One request."""

    def __init__(self, body: CompletionBody, asking: Caller, prompts: list[Ids]) -> None:
        self._body = body
        self._asking = asking
        self._context = asking.context
        self._prompts = prompts
        self._n = body.n or 1
        if len(prompts) * self._n > self._context.settings.max_choices:
            raise too_many(self._context)
        # Most clients mean "no end" by null; 16 is the original's default.
        self._limit = 16 if body.max_tokens is None else body.max_tokens
        top = max(body.logprobs or 0, 0)
        self._wanted = self._context.wanted(body, self._limit, top=top)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._context.model.name,
        }

    # ------------------------------------------------------------------- at once

    async def answer(self) -> dict[str, Any]:
        """The whole answer."""
        tasks = [
            asyncio.ensure_future(self._one_prompt(i, ids)) for i, ids in enumerate(self._prompts)
        ]
        try:
            await within(asyncio.gather(*tasks), self._asking.deadline)
        finally:
            for task in tasks:
                task.cancel()
        found = [task.result() for task in tasks]
        choices = [choice for choices, _ in found for choice in choices]
        return {
            **self._head,
            "choices": choices,
            "usage": self._usage(sum(count for _, count in found)),
        }

    async def _one_prompt(self, index: int, ids: Ids) -> tuple[list[dict[str, Any]], int]:
        session, prompt, scored = await self._read(ids)
        n = self._n
        answers = await asyncio.gather(
            *(
                self._generate(index * n + i, fork, prompt)
                for i, fork in enumerate(forks(session, n))
            )
        )
        made = sum(len(answer.choice.ids) for answer in answers)
        return [self._choice(answer, ids, scored) for answer in answers], made

    async def _generate(self, index: int, session: Session, prompt: Ids) -> Answer:
        asking = self._asking
        choice = Choice(self._context.model, self._context.scheduler, self._wanted, index)
        if self._limit == 0:
            return Answer(choice)
        return await whole(
            choice, session, prompt, first=asking.first_token, deadline=asking.deadline
        )

    async def _read(self, ids: Ids) -> tuple[Session, Ids, list[Token | None]]:
        """A session, what its one choice must read, and the prompt's logprobs where asked for.

        Several choices share one reading.
        """
        context, body = self._context, self._body
        scheduler, session = context.scheduler, context.model.engine.session()
        if body.echo and body.logprobs is not None:
            scored = await score_prompt(context.model, scheduler, session, ids, body.logprobs)
            return session, NOTHING, scored
        if self._n == 1:
            return session, ids, []
        await scheduler.read(session, ids)
        return session, NOTHING, []

    def _choice(self, answer: Answer, ids: Ids, scored: list[Token | None]) -> dict[str, Any]:
        choice, prefix = answer.choice, ""
        logprobs = Logprobs(self._context.model, self._body.logprobs)
        if self._body.echo:
            prefix = logprobs.add_prompt(ids, scored)
        logprobs.add(answer.tokens, len(prefix))
        finish = "length" if self._limit == 0 else choice.finish
        return {
            "index": choice.index,
            "text": prefix + answer.text,
            "token_ids": choice.ids,
            "logprobs": logprobs.shown(),
            "finish_reason": finish,
        }

    # --------------------------------------------------------------- as it comes

    async def events(self) -> AsyncGenerator[str, None]:
        """The answer as events; choices of all prompts run side by side."""
        made = [0]
        parts = [self._prompt_events(i, ids, made) for i, ids in enumerate(self._prompts)]
        async for item in merged(parts):
            yield item
        options = self._body.stream_options
        if options is not None and options.include_usage:
            yield event({**self._head, "choices": [], "usage": self._usage(made[0])})

    async def _prompt_events(
        self, index: int, ids: Ids, made: list[int]
    ) -> AsyncGenerator[str, None]:
        session, prompt, scored = await self._read(ids)
        parts = [
            self._choice_events(index * self._n + i, fork, ids, prompt, scored, made)
            for i, fork in enumerate(forks(session, self._n))
        ]
        async for item in merged(parts):
            yield item

    async def _choice_events(
        self,
        index: int,
        session: Session,
        ids: Ids,
        prompt: Ids,
        scored: list[Token | None],
        made: list[int],
    ) -> AsyncGenerator[str, None]:
        choice = Choice(self._context.model, self._context.scheduler, self._wanted, index)
        offset = sent = 0
        if self._body.echo:
            logprobs = Logprobs(self._context.model, self._body.logprobs)
            prefix = logprobs.add_prompt(ids, scored)
            offset = len(prefix)
            yield self._chunk(index, prefix, [], logprobs, None)
        if self._limit > 0:
            parts = choice.parts(session, prompt, eager=True, first=self._asking.first_token)
            async with aclosing(parts):
                async for part in parts:
                    logprobs = Logprobs(self._context.model, self._body.logprobs)
                    logprobs.add(part.tokens, offset)
                    yield self._chunk(index, part.text, choice.ids[sent:], logprobs, None)
                    sent = len(choice.ids)
        made[0] += len(choice.ids)
        finish = "length" if self._limit == 0 else choice.finish
        empty = Logprobs(self._context.model, None)
        yield self._chunk(index, "", choice.ids[sent:], empty, finish)

    def _chunk(
        self, index: int, text: str, ids: list[int], logprobs: Logprobs, finish: str | None
    ) -> str:
        choice = {
            "index": index,
            "text": text,
            "token_ids": ids,
            "logprobs": logprobs.shown(),
            "finish_reason": finish,
        }
        return event({**self._head, "choices": [choice]})

    def _usage(self, made: int) -> dict[str, int]:
        read = sum(len(ids) for ids in self._prompts)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


class Logprobs:
    """The ``logprobs`` object of a completion."""

    def __init__(self, model: Model, count: int | None) -> None:
        self._model = model
        self._count = count
        self._tokens: list[str] = []
        self._values: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add_prompt(self, ids: Ids, scored: list[Token | None]) -> str:
        """The prompt's own tokens; its text."""
        offset = 0
        text = self._model.decode(ids)
        for token_id, token in zip(ids.tolist(), scored, strict=False):
            self._one(token_id, token, min(offset, len(text)))
            offset += len(self._tokens[-1])
        return text

    def add(self, tokens: list[tuple[Token, int]], offset: int) -> None:
        """Tokens of the answer, which begins at ``offset`` in the text."""
        if self._count is not None:
            for token, place in tokens:
                self._one(token.id, token, offset + place)

    def shown(self) -> dict[str, Any] | None:
        """The object; None where it was not asked for."""
        if self._count is None:
            return None
        return {
            "tokens": self._tokens,
            "token_logprobs": self._values,
            "top_logprobs": self._top,
            "text_offset": self._offsets,
        }

    def _one(self, token_id: int, token: Token | None, offset: int) -> None:
        self._tokens.append(self._model.decode([token_id]))
        self._values.append(None if token is None else token.logprob)
        # Two tokens may show the same text: the likelier one, which comes first, stays.
        tops = reversed(token.top) if token is not None else None
        self._top.append(
            None if tops is None else {self._model.decode([i]): value for i, value in tops}
        )
        self._offsets.append(offset)
