"""The application on a socket: uvicorn, with time-outs for clients that send or read nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Callable

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from armt.server.errors import ApiError
from armt.server.settings import Settings

HEAD_SECONDS = 15.0
"""What a client gets to send the head of a request."""
LARGEST_HEAD = 32 * 1024


class GuardedProtocol(H11Protocol):
    """Drops connections that send half a head, or leave their answer unread."""

    head_seconds = HEAD_SECONDS
    write_seconds = 60.0
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The client came; its head must follow."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self.head_seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Bytes came; while they are no whole head the clock runs."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timers(write=False)
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._stop_timers()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads too slowly, or not at all."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._stop_timers(head=False)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an error of the usual form."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        error = ApiError("invalid_request", msg)
        body = json.dumps(error.body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        start = h11.Response(status_code=error.status, headers=headers, reason=b"Bad Request")
        for part in (start, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()

    def _stop_timers(self, *, head: bool = True, write: bool = True) -> None:
        if head and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        if write and self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; OSError in one line if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named: without, each answer
    # waits 40 ms for the client's acknowledgement of its head.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise OSError(f"cannot listen on {host}, port {port}: {error}") from error
    return listener


class Server(uvicorn.Server):
    """Says when it is ready, and ends quietly when told to stop."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, then calls ``ready``."""
        await super().startup(sockets=sockets)
        self._ready()

    def serve_until_told(self, listener: socket.socket) -> None:
        """Serves until SIGINT or SIGTERM. In the main thread."""
        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn raises what it caught once more when it has ended; that is to mean nothing.
            signal.signal(number, lambda *_: None)
        self.run(sockets=[listener])


def server_of(
    app: FastAPI, settings: Settings, *, ready: Callable[[], None] = lambda: None
) -> Server:
    """A server for ``app``; run it with ``server.run(sockets=[bind(...)])``."""
    protocol = type("Protocol", (GuardedProtocol,), {"write_seconds": settings.write_timeout})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=LARGEST_HEAD,
        # Beyond the requests that are admitted there must be room to refuse others politely.
        limit_concurrency=4 * settings.max_requests,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=max(int(settings.shutdown_timeout), 1),
    )
    return Server(config, ready)
