"""The server under load: many clients feed and ask at the same time, and every answer is checked.

    python bench/server_load.py --seconds 600 --out bench/results/server_load.json

Starts ``armt serve`` in a process of its own. Each client goes through scripts: a new session, a
feed, a streamed question, another feed, a question that is kept, the end. The answers are known
beforehand from the engine alone; one that differs makes the program fail. Throughput is compared
with the engine's own batched calls doing the same work, and, for reading alone, with ``step_many``,
in turns in the same run. Clients run on the same machine and take their share of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import armt
import harness
from armt.models import resolve

Ids = npt.NDArray[np.int32]
TEMPERATURE = 2.0  # so that the answers depend on every bit of the logits
BINARY = "application/octet-stream"


@dataclass(frozen=True)
class Script:
    """What one client does with one session, and what must come of it."""

    first: Ids
    question: Ids
    second: Ids
    count: int
    seed: int
    answer: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.first) + len(self.question) + len(self.second) + 2 * self.count


def make_scripts(engine: armt.Engine, count: int) -> list[Script]:
    """Inputs of unequal lengths; the answers come from the engine, one session at a time."""
    rng = np.random.default_rng(0)

    def ids(least: int, most: int) -> Ids:
        length = int(np.exp(rng.uniform(np.log(least), np.log(most))))
        return rng.integers(0, engine.vocab_size, length).astype(np.int32)

    scripts = []
    for seed in range(count):
        script = Script(ids(20, 6000), ids(3, 60), ids(20, 2000), int(rng.choice([4, 8, 16])), seed)
        with engine.session() as session:
            session.feed(script.first)
            with session.fork() as branch:
                branch.feed(script.question)
                options: dict[str, Any] = {"temperature": TEMPERATURE, "seed": seed}
                script.answer.extend(branch.generate(script.count, **options))
            session.feed(script.second)
            script.kept.extend(session.generate(script.count, **options))
        scripts.append(script)
    return scripts


def work_alone(engine: armt.Engine, scripts: list[Script]) -> float:
    """Seconds that the engine's own batched calls take for these scripts."""
    begin = time.perf_counter()
    sessions = [engine.session(seed=script.seed) for script in scripts]
    engine.feed_many([(s, script.first) for s, script in zip(sessions, scripts, strict=True)])
    forks = [session.fork() for session in sessions]
    engine.feed_many([(s, script.question) for s, script in zip(forks, scripts, strict=True)])
    generate(engine, forks, scripts)
    engine.feed_many([(s, script.second) for s, script in zip(sessions, scripts, strict=True)])
    generate(engine, sessions, scripts)
    return time.perf_counter() - begin


def generate(engine: armt.Engine, sessions: list[armt.Session], scripts: list[Script]) -> None:
    for count in sorted({script.count for script in scripts}):
        rows = [s for s, script in zip(sessions, scripts, strict=True) if script.count == count]
        engine.generate_many(rows, count, temperature=TEMPERATURE)


def step_alone(engine: armt.Engine, sessions: int, steps: int) -> float:
    """Tokens per second of ``step_many`` over whole segments."""
    ids = np.random.default_rng(1).integers(0, engine.vocab_size, engine.segment_size)
    rows = [engine.session() for _ in range(sessions)]
    begin = time.perf_counter()
    for _ in range(steps):
        engine.step_many([(session, ids) for session in rows], logits="none")
    return sessions * steps * engine.segment_size / (time.perf_counter() - begin)


# ------------------------------------------------------------------------ clients


class Connection:
    """The least of an HTTP client: it must not cost more than the server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.first_piece = 0.0

    async def ask(self, method: str, path: str, body: bytes = b"", kind: str = "") -> bytes:
        """The body of the answer; ``first_piece`` is when it began to come."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        if kind:
            head += f"Content-Type: {kind}\r\n"
        self._writer.write(head.encode() + b"\r\n" + body)
        await self._writer.drain()
        assert self._reader is not None
        status = await self._reader.readline()
        headers = {}
        while (line := await self._reader.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        if headers.get(b"transfer-encoding") == b"chunked":
            data = await self._chunks()
        else:
            data = await self._reader.readexactly(int(headers[b"content-length"]))
        code = int(status.split()[1])
        if code >= 400:
            raise RuntimeError(f"{method} {path}: {code} {data.decode()[:200]}")
        return data

    async def json(self, method: str, path: str, value: Any = None) -> Any:
        body = b"" if value is None else json.dumps(value).encode()
        return json.loads(await self.ask(method, path, body, "application/json" if body else ""))

    async def _chunks(self) -> bytes:
        assert self._reader is not None
        found = b""
        while size := int(await self._reader.readline(), 16):
            if not found:
                self.first_piece = time.perf_counter()
            found += await self._reader.readexactly(size)
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)
        return found


@dataclass
class Tally:
    """What all clients saw."""

    scripts: int = 0
    tokens: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_token: list[float] = field(default_factory=list)


async def play(connection: Connection, script: Script, tally: Tally) -> None:
    session = (await connection.json("POST", "/v1/sessions", {}))["id"]
    path = f"/v1/sessions/{session}"
    await connection.ask("POST", f"{path}/feed", script.first.tobytes(), BINARY)
    body = {
        "max_tokens": script.count,
        "temperature": TEMPERATURE,
        "seed": script.seed,
        "ignore_eos": True,
    }
    begin = time.perf_counter()
    asked = {**body, "tokens": script.question.tolist(), "stream": True}
    data = await connection.ask(
        "POST", f"{path}/ask", json.dumps(asked).encode(), "application/json"
    )
    tally.first_token.append(connection.first_piece - begin)
    answer: list[int] = []
    for line in data.decode().split("\n\n"):
        if line.startswith("data: {"):
            answer += json.loads(line[6:])["token_ids"]
    await connection.ask("POST", f"{path}/feed", script.second.tobytes(), BINARY)
    kept = (await connection.json("POST", f"{path}/ask", {**body, "write": True}))["token_ids"]
    await connection.json("DELETE", path)
    tally.wrong += (answer != script.answer) + (kept != script.kept)
    tally.scripts += 1
    tally.tokens += script.tokens


async def mixed(port: int, clients: int, scripts: list[Script], seconds: float) -> Tally:
    """All clients play scripts until the time is up."""
    tally, end = Tally(), time.perf_counter() + seconds

    async def client(number: int) -> None:
        connection, turn = Connection(port), number
        while time.perf_counter() < end:
            try:
                await play(connection, scripts[turn % len(scripts)], tally)
            except (OSError, RuntimeError, asyncio.IncompleteReadError) as error:
                tally.errors[f"{type(error).__name__}: {error}"[:200]] += 1
                connection = Connection(port)
            turn += clients + 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    return tally


async def reading(port: int, clients: int, engine: armt.Engine, segments: int = 4) -> float:
    """Tokens per second while all clients feed, nothing else."""
    count, rounds = segments * engine.segment_size, 3
    data = np.random.default_rng(1).integers(0, engine.vocab_size, count).astype("<i4").tobytes()

    async def client() -> Connection:
        connection = Connection(port)
        session = (await connection.json("POST", "/v1/sessions", {}))["id"]
        for _ in range(rounds):
            await connection.ask("POST", f"/v1/sessions/{session}/feed", data, BINARY)
        await connection.json("DELETE", f"/v1/sessions/{session}")
        return connection

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return clients * rounds * count / (time.perf_counter() - begin)


# ------------------------------------------------------------------------- server


class Server:
    """``armt serve`` in a process of its own, its resident memory watched."""

    def __init__(self, model: str) -> None:
        command = [sys.executable, "-m", "armt.cli", "serve", model, "--port", "0"]
        command += ["--json-logs", "--no-log-requests", "--device", "cpu", "--dtype", "float32"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        self.port = int(json.loads(line)["url"].rstrip("/").rpartition(":")[2])
        self.resident: list[float] = []
        threading.Thread(target=self._watch, daemon=True).start()
        threading.Thread(target=self._process.stderr.read, daemon=True).start()

    def _watch(self) -> None:
        status = Path(f"/proc/{self._process.pid}/status")
        while self._process.poll() is None:
            try:
                lines = status.read_text().splitlines()
            except OSError:
                return
            found = [line.split()[1] for line in lines if line.startswith("VmRSS")]
            self.resident += [int(kib) / 1024 for kib in found]
            time.sleep(1)

    def stop(self) -> int:
        self._process.terminate()
        return self._process.wait(60)


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, share)) if values else float("nan")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    engine = armt.Engine.from_pretrained(resolve(arguments.model), device="cpu", dtype="float32")
    scripts = make_scripts(engine, arguments.scripts)
    clients, rounds = arguments.clients, arguments.rounds
    server = Server(arguments.model)
    tallies, alone, feeds, steps = [], [], [], []
    try:
        asyncio.run(mixed(server.port, clients, scripts, 2.0))  # warm
        for _ in range(rounds):
            for at in range(0, len(scripts), clients):
                batch = scripts[at : at + clients]
                alone.append(sum(s.tokens for s in batch) / work_alone(engine, batch))
            begin = time.perf_counter()
            tally = asyncio.run(mixed(server.port, clients, scripts, arguments.seconds / rounds))
            tallies.append((tally, time.perf_counter() - begin))
            steps.append(step_alone(engine, clients, 4))
            feeds.append(asyncio.run(reading(server.port, clients, engine)))
            steps.append(step_alone(engine, clients, 4))
    finally:
        code = server.stop()
    first = [value for tally, _ in tallies for value in tally.first_token]
    seconds = sum(each for _, each in tallies)
    mixed_rate = sum(tally.tokens for tally, _ in tallies) / seconds
    third = max(len(server.resident) // 3, 1)
    return {
        "model": Path(resolve(arguments.model)).name,
        "clients": clients,
        "seconds": seconds,
        "scripts_played": sum(tally.scripts for tally, _ in tallies),
        "wrong_answers": sum(tally.wrong for tally, _ in tallies),
        "errors": dict(sum((tally.errors for tally, _ in tallies), Counter())),
        "first_token_seconds": {
            "p50": percentile(first, 50),
            "p90": percentile(first, 90),
            "p99": percentile(first, 99),
            "samples": len(first),
        },
        "mixed_tokens_per_second": mixed_rate,
        "engine_same_work_tokens_per_second": harness.median_spread(alone),
        "mixed_share_of_engine": mixed_rate / statistics.median(alone),
        "reading_tokens_per_second": harness.median_spread(feeds),
        "step_many_tokens_per_second": harness.median_spread(steps),
        "reading_share_of_step_many": statistics.median(feeds) / statistics.median(steps),
        "server_resident_mib": {
            "second_third": statistics.median(server.resident[third : 2 * third] or [0]),
            "last_third": statistics.median(server.resident[2 * third :] or [0]),
            "greatest": max(server.resident, default=0),
        },
        "server_exit_code": code,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="of mixed load, in all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scripts", type=int, default=128)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = run(arguments)
    print(json.dumps(results, indent=1))
    if arguments.out is not None:
        harness.write(arguments.out, "server_load", results)
    failed = results["wrong_answers"] or results["errors"] or results["server_exit_code"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
