"""Every error that can leave the application, as one kind of JSON."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from armt.server.context import Gone
from armt.server.errors import ApiError, as_api_error
from armt.server.metrics import Metrics

log = logging.getLogger("armt.server")

LONGEST = 300


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first fault of a body or a query; what was found is not repeated."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    name = ".".join(where)[:LONGEST] or None
    if first["type"].startswith("json"):
        return ApiError("invalid_json", "body: no valid JSON")
    message = str(first["msg"]).removeprefix("Value error, ")[:LONGEST]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return ApiError("invalid_request", f"{name or 'body'}: {message}{more}", param=name)


def from_http(error: HTTPException) -> ApiError:
    """What the framework itself refuses."""
    if error.status_code == 404:
        return ApiError("not_found", "there is no such path")
    if error.status_code == 405:
        return ApiError("method_not_allowed", "this path does not take this method")
    if error.status_code == 400:
        return ApiError("invalid_json", "body: no valid JSON")
    return ApiError("internal_error", "the server failed; its log says more")


def install(app: FastAPI, metrics: Metrics) -> None:
    """Handlers for all of them."""

    def answer(error: ApiError, extra: dict[str, str] | None = None) -> Response:
        metrics.errors.labels(error.code).inc()
        headers = {**error.headers(), **(extra or {})}
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, (Gone, ClientDisconnect)):
            return Response(status_code=499)  # reaches nobody
        if isinstance(error, RequestValidationError):
            return answer(from_validation(error.errors()))
        if isinstance(error, HTTPException):
            allow = (error.headers or {}).get("Allow")
            return answer(from_http(error), {"Allow": allow} if allow else None)
        shown = as_api_error(error)
        if shown.status == 500 and not isinstance(error, ApiError):
            log.error("a request failed", exc_info=error)
        return answer(shown)

    kinds = (ApiError, Gone, ClientDisconnect, RequestValidationError, HTTPException)
    for kind in (*kinds, ValueError, RuntimeError, MemoryError, FloatingPointError):
        app.add_exception_handler(kind, handle)
