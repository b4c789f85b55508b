"""A live server for tests: the application on a real socket, in a thread of this process."""

from __future__ import annotations

import atexit
import json
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import armt
from armt.models import resolve
from armt.server import Settings, create_app, running
from armt.text import TextSettings, Tokenizer

KEYS = ("first-key-of-the-tests", "second-key-of-the-tests")


@cache
def engine() -> armt.Engine:
    """The embedded model on the CPU in float32: it gives short, sensible answers."""
    return load(resolve("demo"))


@cache
def babbler() -> armt.Engine:
    """The same with random embeddings: it goes on and on, now this, now that."""
    folder = Path(tempfile.mkdtemp(prefix="armt-babbler-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(resolve("demo"), folder, dirs_exist_ok=True)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])["memory_cell.model.transformer.wte.weight"]
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    values = np.random.default_rng(3).normal(0, 0.3, (end - begin) // 2).astype(np.float16)
    data[begin:end] = values.tobytes()
    file.write_bytes(data)
    return load(folder)


def load(folder: Path) -> armt.Engine:
    return armt.Engine.from_pretrained(folder, device="cpu", dtype="float32")


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(resolve("demo"))


def text_settings() -> TextSettings:
    return TextSettings.of(resolve("demo"))


class Live(httpx.Client):
    """A client of a running server."""

    def __init__(self, server: running.Server, app: Any, port: int, key: str | None) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        super().__init__(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30)
        self.server = server
        self.port = port
        self.context = app.state.context

    def new_session(self, **body: Any) -> str:
        answer = self.post("/v1/sessions", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def feed(self, session: str, content: Any, **options: Any) -> httpx.Response:
        """Text or a list of token ids."""
        kind = "text/plain" if isinstance(content, str) else "application/octet-stream"
        if isinstance(content, list):
            content = b"".join(i.to_bytes(4, "little") for i in content)
        headers = {"Content-Type": kind}
        path = f"/v1/sessions/{session}/feed"
        return self.post(path, content=content, headers=headers, **options)

    def ask(self, session: str, **body: Any) -> httpx.Response:
        return self.post(f"/v1/sessions/{session}/ask", json=body)

    def is_busy(self, session: str) -> bool:
        return bool(self.get(f"/v1/sessions/{session}").json()["busy"])

    def idle(self, seconds: float = 10.0) -> bool:
        """Waits until the engine has nothing to do; False if it goes on."""
        totals, end = self.context.scheduler.totals, time.monotonic() + seconds
        while time.monotonic() < end:
            passes = totals.passes
            time.sleep(0.1)
            if totals.reading == totals.decoding == 0 and totals.passes == passes:
                return True
        return False


@contextmanager
def live(
    settings: Settings | None = None,
    *,
    model: armt.Engine | None = None,
    key: str | None = None,
    protocol: dict[str, float] | None = None,
    send_buffer: int = 0,
) -> Iterator[Live]:
    """A server, until the block ends."""
    settings = settings or Settings()
    app = create_app(model or engine(), settings)
    listener = running.bind("127.0.0.1", 0)
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    ready = threading.Event()
    server = running.server_of(app, settings, ready=ready.set)
    for name, value in (protocol or {}).items():
        setattr(server.config.http, name, value)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    assert ready.wait(20), "the server did not start"
    try:
        with Live(server, app, listener.getsockname()[1], key) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for something to become true; fails if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def events(text: str) -> list[Any]:
    """The objects of a stream of events; [DONE] is left out."""
    found = []
    for block in text.split("\n\n"):
        if block.startswith("data: ") and block != "data: [DONE]":
            found.append(json.loads(block[len("data: ") :]))
    return found


def alone(model: armt.Engine, ids: Any, count: int, **options: Any) -> list[int]:
    """What an engine itself generates after ``ids``."""
    session = model.session()
    session.feed(ids)
    options.setdefault("stop_ids", model.checkpoint.eos_token_ids)
    return list(session.generate(count, **options))
