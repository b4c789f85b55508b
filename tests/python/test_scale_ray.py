"""Two replicas under Ray Serve: a session survives the death of its replica, bit for bit."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import armt
from armt.scale import FolderStore
from armt.scale.worker import unpack

ray = pytest.importorskip("ray", reason='needs the extra "ray"')
httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason='needs the extra "ray"')

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale-out.md"
BLOCK = re.compile(r"^```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    # A busy machine starts processes slowly.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
}
IDS = np.random.default_rng(5).integers(3, 4000, 100_000).tolist()


@pytest.fixture(scope="module")
def engine() -> armt.Engine:
    return armt.Engine.from_pretrained("demo", device="cpu", threads=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FolderStore:
    return FolderStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def client(store: FolderStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An HTTP client of an application with two replicas."""
    from ray import serve

    from armt.scale.ray_app import application

    os.environ.update(SETTINGS)  # the processes of Ray inherit them
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 << 20,
        logging_level="ERROR",
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application("demo", store, replicas=2, threads=1, cpus=0.5))
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=180) as client:
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()


def new_session(client: Any) -> str:
    answer = client.post("/v1/sessions")
    assert answer.status_code == 200, answer.text
    return f"/v1/sessions/{answer.json()['id']}"


def test_a_session_moves_when_its_replica_dies(
    client: Any, engine: armt.Engine, store: FolderStore
) -> None:
    path, alone = new_session(client), engine.session()
    processes = []
    for turn in range(4):
        ids = IDS[turn * 700 : (turn + 1) * 700]
        fed = client.post(f"{path}/feed", json={"tokens": ids})
        alone.feed(ids)
        assert fed.status_code == 200, fed.text
        assert fed.json()["tokens"] == alone.tokens
        settings = {"max_new_tokens": 12, "temperature": 1.0, "write": turn % 2 == 1}
        drawn = client.post(f"{path}/generate", json=settings)
        expected = alone.generate(12, temperature=1.0, write=turn % 2 == 1)
        assert drawn.json()["output"] == list(expected)
        _, state = unpack(store.get(path.rpartition("/")[2]).data)
        assert state.to_bytes() == alone.state.to_bytes()
        processes.append(drawn.json()["process"])
        os.kill(processes[-1], signal.SIGKILL)
    assert len(set(processes)) > 1


def test_a_replica_that_dies_at_work(client: Any, engine: armt.Engine) -> None:
    path, alone = new_session(client), engine.session()
    first = client.post(f"{path}/feed", json={"tokens": IDS[:100]}).json()
    alone.feed(IDS[:100])
    with ThreadPoolExecutor() as pool:
        feeding = pool.submit(client.post, f"{path}/feed", json={"tokens": IDS})
        time.sleep(0.3)
        os.kill(first["process"], signal.SIGKILL)
        fed = feeding.result()
    assert fed.status_code == 200, fed.text
    assert fed.json()["process"] != first["process"], "it had finished before: this shows nothing"
    assert fed.json()["version"] == 3
    alone.feed(IDS)
    drawn = client.post(f"{path}/generate", json={"max_new_tokens": 8}).json()
    assert drawn["output"] == list(alone.generate(8))


def test_writers_at_the_same_time_are_put_in_order(client: Any) -> None:
    path = new_session(client)
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda i: client.post(f"{path}/feed", json={"tokens": [i]}), range(16))
        )
    assert [a.status_code for a in answers] == [200] * 16
    assert sorted(a.json()["version"] for a in answers) == list(range(2, 18))
    assert client.get(path).json()["tokens"] == 16


def test_a_request_sent_twice_is_done_once(client: Any) -> None:
    path = new_session(client)
    headers = {"Idempotency-Key": "mine"}
    body = {"tokens": [5, 6, 7], "if_version": 1}
    first = client.post(f"{path}/feed", json=body, headers=headers).json()
    again = client.post(f"{path}/feed", json=body, headers=headers).json()
    assert (first["version"], first["tokens"]) == (again["version"], again["tokens"]) == (2, 3)
    late = client.post(f"{path}/feed", json=body)
    assert late.status_code == 409
    assert late.json()["error"]["code"] == "version_mismatch"


def test_bad_requests(client: Any) -> None:
    path = new_session(client)
    for body, status, code in (
        ({"tokens": [-1]}, 400, "invalid_request"),
        ({"tokens": [10**6]}, 400, "invalid_request"),
    ):
        answer = client.post(f"{path}/feed", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert client.post(f"{path}/feed", json={"tokens": []}).status_code == 422
    assert client.post(f"{path}/feed", json={"token": [1]}).status_code == 422
    nothing = client.post(f"{path}/generate", json={})
    assert nothing.status_code == 400 and "no token" in nothing.json()["error"]["message"]
    assert client.get(path).json()["version"] == 1
    assert client.delete(path).json()["deleted"] is True
    for answer in (client.get(path), client.post(f"{path}/feed", json={"tokens": [1]})):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "session_not_found"
    assert client.get("/v1/sessions/sess_x%00").status_code in (400, 404)


def test_many_sessions_at_the_same_time(client: Any, engine: armt.Engine) -> None:
    paths = [new_session(client) for _ in range(6)]
    wrong: list[int] = []

    def converse(i: int) -> None:
        alone = engine.session()
        for turn in range(3):
            ids = IDS[1000 * i + turn * 300 :][: 100 + 50 * i]
            client.post(f"{paths[i]}/feed", json={"tokens": ids})
            alone.feed(ids)
            drawn = client.post(f"{paths[i]}/generate", json={"max_new_tokens": 5}).json()
            if drawn["output"] != list(alone.generate(5, write=False)):
                wrong.append(i)

    threads = [threading.Thread(target=converse, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_documentation(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of docs/scale-out.md, at the port of these tests; they replace the application."""
    monkeypatch.chdir(tmp_path)
    serving, asking = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    exec(serving, names)
    exec(asking.replace("http://127.0.0.1:8000", str(client.base_url)), names)
    assert capsys.readouterr().out.strip().endswith("] 2")
    assert len(FolderStore("sessions").ids()) == 1
