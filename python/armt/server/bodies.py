"""Bodies of requests as they arrive: bytes, and the token ids in them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import numpy as np
from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from armt.server.context import Caller, Gone
from armt.server.errors import ApiError
from armt.server.jobs import Ids
from armt.server.model import TextFeed, check_text
from armt.server.problems import from_validation
from armt.server.schemas import FeedBody


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
    async for ids in encoder.feed(check_text(body.text, "text").encode("utf-8")):
        yield ids
    yield encoder.finish()


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
