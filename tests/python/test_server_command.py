"""``armt serve`` as a process: starts, stops, keeps what it held, and says what is wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason='needs the extra "server"')
pytest.importorskip("httpx", reason="needs httpx")

import httpx

from serving import KEYS, alone, engine, tokenizer


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "armt.cli", "serve", "demo", "--device", "cpu", *options]


@contextmanager
def serving(*options: str, stop: int = signal.SIGTERM) -> Iterator[tuple[str, list[Any]]]:
    """The server's address; its log lines are there afterwards."""
    process = subprocess.Popen(
        command("--port", "0", "--json-logs", *options), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines: list[Any] = [json.loads(process.stderr.readline())]
    try:
        assert lines[0]["event"] == "serving", lines
        yield lines[0]["url"], lines
    finally:
        process.send_signal(stop)
        rest, _ = process.communicate(timeout=60)[1], None
        lines += [json.loads(line) for line in rest.splitlines()]
    assert process.returncode == 0, rest


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_what_it_holds_survives_a_restart(tmp_path: Path, stop: int) -> None:
    keys = tmp_path / "keys"
    keys.write_text("\n".join(KEYS))
    options = ("--session-dir", str(tmp_path / "sessions"), "--api-keys-file", str(keys))
    headers = {"Authorization": f"Bearer {KEYS[1]}"}
    with serving(*options, stop=stop) as (url, lines):
        assert httpx.get(url + "v1/models").status_code == 401
        session = httpx.post(url + "v1/sessions", headers=headers).json()["id"]
        path = f"v1/sessions/{session}/"
        body = {"text": "Mary went to the kitchen."}
        assert httpx.post(url + path + "feed", json=body, headers=headers).status_code == 200
    assert lines[-1]["event"] == "stopped" and lines[-1]["sessions_saved"] == 1
    with serving(*options, stop=stop) as (url, _):
        body = {"prompt": " Where is Mary?<gen>"}
        answer = httpx.post(url + path + "ask", json=body, headers=headers).json()
        text = "Mary went to the kitchen. Where is Mary?<gen>"
        assert answer["token_ids"] == alone(engine(), tokenizer().encode(text), 20)
        busy = refused("--port", "0", *options)
        assert "another server uses this folder" in busy
        taken = url.rstrip("/").rpartition(":")[2]
        assert "cannot listen on 127.0.0.1" in refused("--port", taken)


def refused(*options: str) -> str:
    """The one line that a start which fails leaves."""
    done = subprocess.run(
        command(*options), capture_output=True, text=True, timeout=60, env={**os.environ}
    )
    assert done.returncode != 0 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("armt: ")
    return line


def test_bad_options_are_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    assert "--api-keys-file" in refused("--api-keys-file", str(tmp_path / "none"))
    assert "at least 16" in refused("--api-keys-file", str(file), "--port", "0")
    assert "--session-dir" in refused("--session-dir", str(file), "--port", "0")
    assert "max" in refused("--max-batch", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot listen" in refused("--port", str(taken.getsockname()[1]))
