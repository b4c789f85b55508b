"""What stands before every request: keys, limits, time-outs; and what is noted behind it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from armt.server.auth import Keys
from armt.server.errors import ApiError
from armt.server.metrics import Metrics
from armt.server.settings import Settings

log = logging.getLogger("armt.server")
access = logging.getLogger("armt.access")

OPEN = ("/", "/health", "/openapi.json")
"""Paths that need no key."""
STREAMED = re.compile(r"/v1/sessions/[^/]*/(feed|load)")
"""Paths whose bodies are not held in memory, unless they are JSON."""
WHOLE_STATES = re.compile(r"/v1/sessions/[^/]*/(save|memory)")
"""Paths whose answers cost as much as work does."""
DRAIN_SECONDS = 2.0


@dataclass
class Visit:
    """One request on its way."""

    scope: Scope
    id: str
    owner: str = ""
    limit: int = 0
    """Largest body; 0: any size."""
    held: bool = True
    """Whether the body is held in memory as a whole."""
    admitted: bool = False
    body: int = 0
    whole: bool = False
    status: int = 0
    finished: bool = False
    refused: bool = False
    start: float = field(default_factory=time.monotonic)

    @property
    def route(self) -> str:
        """The path as the application declares it: never an id."""
        path = getattr(self.scope.get("route"), "path", None)
        return path if isinstance(path, str) else "other"


class Guard:
    """ASGI middleware around the application."""

    def __init__(self, app: ASGIApp, *, settings: Settings, keys: Keys, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys
        self._metrics = metrics
        self._in_flight = 0
        self._by_owner: dict[str, int] = {}
        self._buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = Visit(scope, secrets.token_hex(8))
        try:
            await self._visit(visit, receive, send)
        finally:
            self._leave(visit)
            self._note(visit)

    async def _visit(self, visit: Visit, receive: Receive, send: Send) -> None:
        async def checked_send(message: Message) -> None:
            if visit.refused:  # the answer was an error of ours; the rest goes nowhere
                return
            await self._send(visit, message, send)

        async def checked_receive() -> Message:
            try:
                return await self._receive(visit, receive)
            except ApiError as error:
                if visit.status == 0:
                    await self._refuse(visit, error, receive, send)
                visit.refused = True
                return {"type": "http.disconnect"}

        try:
            self._check(visit)
        except ApiError as error:
            await self._refuse(visit, error, receive, send)
            return
        try:
            await self._app(visit.scope, checked_receive, checked_send)
        except Exception:
            log.exception("a request failed")
            if visit.status:  # too late for another answer
                raise
            failed = ApiError("internal_error", "the server failed; its log says more")
            await self._refuse(visit, failed, receive, send)

    # ------------------------------------------------------------------- arrival

    def _check(self, visit: Visit) -> None:
        """Everything that can be known from the head of the request."""
        scope, settings = visit.scope, self._settings
        headers = dict(scope["headers"])
        path = scope["path"]
        owner = self._keys.owner(headers.get(b"authorization"))
        if owner is None and path not in OPEN:
            raise ApiError("invalid_api_key", "the API key is missing or wrong")
        visit.owner = owner or ""
        scope.setdefault("state", {})["owner"] = visit.owner
        scope["state"]["start"] = visit.start
        # Of several such headers the application may look at another one than we do.
        kinds = [value.lower() for name, value in scope["headers"] if name == b"content-type"]
        is_json = any(b"json" in kind for kind in kinds)
        visit.limit, visit.held = settings.max_body_bytes, True
        if (match := STREAMED.fullmatch(path)) and not is_json:
            feeding = match.group(1) == "feed"
            visit.limit = settings.max_feed_bytes if feeding else settings.max_state_bytes
            visit.held = False
        length = headers.get(b"content-length", b"0")
        if visit.limit and length.isdigit() and int(length[:20]) > visit.limit:
            raise too_large(visit.limit)
        if scope["method"] == "POST" or WHOLE_STATES.fullmatch(path):
            self._admit(visit)

    def _admit(self, visit: Visit) -> None:
        if self._in_flight >= self._settings.max_requests:
            raise ApiError("overloaded", "the server is busy; try again later")
        mine = self._by_owner.get(visit.owner, 0)
        if len(self._keys) and mine >= self._settings.max_requests_per_key:
            raise ApiError("too_many_requests", "too many requests of this key at the same time")
        self._in_flight += 1
        self._by_owner[visit.owner] = mine + 1
        self._metrics.in_flight.set(self._in_flight)
        visit.admitted = True

    def _leave(self, visit: Visit) -> None:
        if visit.held:
            self._buffered -= visit.body
        if not visit.admitted:
            return
        self._in_flight -= 1
        self._metrics.in_flight.set(self._in_flight)
        self._by_owner[visit.owner] -= 1
        if self._by_owner[visit.owner] == 0:
            del self._by_owner[visit.owner]

    # ---------------------------------------------------------------------- body

    async def _receive(self, visit: Visit, receive: Receive) -> Message:
        """The next piece of the body, in time and within the limits."""
        if visit.whole:
            return await receive()
        settings = self._settings
        patience = settings.read_timeout
        if visit.held:
            left = visit.start + settings.body_timeout - time.monotonic()
            patience = max(min(patience, left), 0.0)
        try:
            message = await asyncio.wait_for(receive(), patience)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise ApiError("body_timeout", "the body did not arrive in time") from error
        if message["type"] == "http.request":
            self._weigh(visit, len(message.get("body", b"")))
            visit.whole = not message.get("more_body", False)
        return message

    def _weigh(self, visit: Visit, size: int) -> None:
        visit.body += size
        if visit.held:
            self._buffered += size
            if self._buffered > self._settings.max_buffered_bytes:
                raise ApiError("overloaded", "the server holds too many bodies; try again later")
        if visit.limit and visit.body > visit.limit:
            raise too_large(visit.limit)

    # -------------------------------------------------------------------- answer

    async def _send(self, visit: Visit, message: Message, send: Send) -> None:
        if message["type"] == "http.response.start":
            visit.status = message["status"]
            message["headers"] = [
                *message.get("headers", []),
                (b"x-request-id", visit.id.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
        elif message["type"] == "http.response.body":
            visit.finished = not message.get("more_body", False)
        await send(message)

    async def _refuse(self, visit: Visit, error: ApiError, receive: Receive, send: Send) -> None:
        """Answers with an error and closes the connection, whatever is left of the body."""
        self._metrics.errors.labels(error.code).inc()
        body = json.dumps(error.body()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **error.headers(),
        }
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        start = {"type": "http.response.start", "status": error.status, "headers": pairs}
        await self._send(visit, start, send)
        await self._send(
            visit, {"type": "http.response.body", "body": body, "more_body": True}, send
        )
        await self._drain(visit, receive)
        await self._send(visit, {"type": "http.response.body", "body": b""}, send)

    async def _drain(self, visit: Visit, receive: Receive) -> None:
        """Throws away what still comes, for a moment: many clients read only after writing."""
        end = time.monotonic() + DRAIN_SECONDS
        while not visit.whole and (left := end - time.monotonic()) > 0:
            try:
                message = await asyncio.wait_for(receive(), left)
            except (asyncio.TimeoutError, TimeoutError):
                return
            visit.whole = not message.get("more_body", False)

    def _note(self, visit: Visit) -> None:
        """Metrics and the access log: never ids, contents or keys."""
        seconds = time.monotonic() - visit.start
        route, method = visit.route, visit.scope["method"]
        method = method if method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
        status = str(visit.status) if visit.finished else "closed"
        self._metrics.requests.labels(route, method, status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        noted: dict[str, Any] = {
            "request": visit.id,
            "method": method,
            "route": route,
            "status": visit.status,
            "finished": visit.finished,
            "seconds": round(seconds, 4),
            "body_bytes": visit.body,
        }
        access.info("request", extra={"fields": noted})


def too_large(limit: int) -> ApiError:
    """The body is beyond its limit."""
    return ApiError("body_too_large", f"body: expected at most {limit} bytes")
