"""Stores that many processes share: compare-and-set, damage, and what a worker does over them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import armt
from armt.scale import FolderStore, MemoryStore, SessionMissing, StateStore, VersionConflict
from armt.scale.worker import REMEMBERED, Held, Worker, pack, unpack
from armt.session import Session

PROCESSES = 4
TURNS = 25
ROUNDS = 25


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StateStore:
    return MemoryStore() if request.param == "memory" else FolderStore(tmp_path / "store")


def test_versions_count_up(store: StateStore) -> None:
    assert store.version("a") == 0
    with pytest.raises(SessionMissing, match="session a: there is no such session"):
        store.get("a")
    assert store.put("a", b"one", expected=0) == 1
    assert store.put("a", b"", expected=1) == 2
    found = store.get("a")
    assert (found.version, found.data, store.version("a")) == (2, b"", 2)
    store.put("b/../../etc", b"\x00" * 1000, expected=0)
    assert store.ids() == ["a", "b/../../etc"]
    assert store.delete("a") and not store.delete("a")
    assert store.ids() == ["b/../../etc"]


@pytest.mark.parametrize("expected", [0, 1, 3])
def test_a_conflict_writes_nothing(store: StateStore, expected: int) -> None:
    store.put("a", b"one", expected=0)
    store.put("a", b"two", expected=1)
    with pytest.raises(VersionConflict, match=f"found version 2, expected {expected}") as caught:
        store.put("a", b"three", expected=expected)
    assert (caught.value.found, caught.value.expected) == (2, expected)
    assert store.get("a").data == b"two"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.found, copy.expected, str(copy)) == (2, expected, str(caught.value))
    assert isinstance(caught.value, armt.StateError)


@pytest.mark.parametrize("name", ["", "x" * 257, "a\nb", "ä", 3])
def test_ids_that_cannot_be(store: StateStore, name: Any) -> None:
    for call in (store.version, store.get, store.delete):
        with pytest.raises(armt.InvalidArgument, match="session id"):
            call(name)
    with pytest.raises(armt.InvalidArgument, match="session id"):
        store.put(name, b"", expected=0)


def count_up(store: StateStore, name: str, turns: int) -> None:
    """Adds one to the number in the store, ``turns`` times."""
    for _ in range(turns):
        while True:
            held = store.get(name)
            try:
                store.put(name, b"%d" % (int(held.data) + 1), expected=held.version)
                break
            except VersionConflict:
                continue


def test_threads_race_without_a_lost_update(store: StateStore) -> None:
    store.put("n", b"0", expected=0)
    threads = [threading.Thread(target=count_up, args=(store, "n", TURNS)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get("n").data == b"%d" % (4 * TURNS)
    assert store.version("n") == 4 * TURNS + 1


def _race(path: Path, number: int, together: Any, results: Any) -> None:
    """Rounds in which all expect the same version; which ones this process has won."""
    store = FolderStore(path, durable=False)
    won = []
    for _ in range(ROUNDS):
        expected = store.version("n")
        together.wait()
        with contextlib.suppress(VersionConflict):
            won.append(store.put("n", bytes([number]), expected=expected))
        together.wait()
    count_up(store, "sum", TURNS)
    results.put((number, won))


def test_of_processes_that_race_one_wins(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    store = FolderStore(tmp_path, durable=False)
    store.put("sum", b"0", expected=0)
    together, results = spawn.Barrier(PROCESSES), spawn.Queue()
    workers = [
        spawn.Process(target=_race, args=(tmp_path, i, together, results)) for i in range(PROCESSES)
    ]
    for worker in workers:
        worker.start()
    won = dict(results.get(timeout=300) for _ in workers)
    for worker in workers:
        worker.join()
    assert sorted(version for each in won.values() for version in each) == list(
        range(1, ROUNDS + 1)
    )
    assert ROUNDS in won[store.get("n").data[0]]
    assert store.get("sum").data == b"%d" % (PROCESSES * TURNS)
    assert store.version("sum") == PROCESSES * TURNS + 1
    assert not list(tmp_path.glob(".write-*"))


def _write_for_ever(path: Path) -> None:
    store = FolderStore(path, durable=False)
    while True:
        held = store.get("n")
        store.put("n", bytes([held.version % 256]) * 200_000, expected=held.version)


def test_a_writer_killed_at_any_moment_leaves_whole_data(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    store = FolderStore(tmp_path, durable=False)
    store.put("n", b"", expected=0)
    for round_ in range(4):
        before = store.version("n")
        writer = spawn.Process(target=_write_for_ever, args=(tmp_path,))
        writer.start()
        while store.version("n") < before + 5 + round_:
            time.sleep(0.001)
        writer.kill()
        writer.join()
        held = store.get("n")
        assert held.data == bytes([(held.version - 1) % 256]) * 200_000
        store.put("n", held.data, expected=held.version)  # and its lock is free
        store.put("n", bytes([(held.version + 1) % 256]) * 200_000, expected=held.version + 1)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put("a", b"data" * 100, expected=0)
    (file,) = tmp_path.glob("*.armt-session")
    whole = file.read_bytes()
    for broken in (
        b"",
        b"{",
        whole[:-1],
        whole + b"x",
        whole[:-5] + b"X" + whole[-4:],
        b"[" * 5000,
    ):
        file.write_bytes(broken)
        with pytest.raises(armt.StateError, match="damaged"):
            store.get("a")
    header, _, data = whole.partition(b"\n")
    for change in ({"id": "b"}, {"format": "else"}, {"version": "1"}):
        file.write_bytes(json.dumps(json.loads(header) | change).encode() + b"\n" + data)
        with pytest.raises(armt.StateError, match="found no header"):
            store.version("a")
    file.write_bytes(whole)
    assert store.get("a").data == b"data" * 100


def test_a_held_lock_ends_in_an_error(tmp_path: Path) -> None:
    import fcntl

    store = FolderStore(tmp_path, lock_timeout=0.05)
    store.put("a", b"", expected=0)
    handles = [path.open("w") for path in (tmp_path / "locks").iterdir()]
    for handle in handles:
        fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(armt.StateError, match="has held this lock"):
        store.put("a", b"x", expected=1)
    for handle in handles:
        handle.close()
    assert store.put("a", b"x", expected=1) == 2


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(armt.InvalidArgument, match=r"store: .*file"):
        FolderStore(tmp_path / "file")


# ------------------------------------------------------------------ workers


@pytest.fixture(scope="module")
def engine() -> armt.Engine:
    return armt.Engine.from_pretrained("demo", device="cpu", threads=1)


def feed(ids: list[int]) -> Callable[[Session], dict[str, Any]]:
    def work(session: Session) -> dict[str, Any]:
        session.feed(ids)
        return {}

    return work


def draw(session: Session) -> dict[str, Any]:
    return {"output": list(session.generate(8, temperature=1.0))}


def test_workers_take_turns_on_one_session(engine: armt.Engine, store: StateStore) -> None:
    workers = [Worker(engine, store), Worker(engine, store)]
    helds = [Held("s"), Held("s")]
    assert workers[0].create("s") == 1 == workers[1].create("s")
    alone = engine.session()
    for turn in range(6):
        ids = list(range(10 + turn, 400 + 30 * turn))
        alone.feed(ids)
        answer = workers[turn % 2].change(helds[turn % 2], f"r{turn}", feed(ids))
        assert answer == {"version": turn + 2, "tokens": alone.tokens, "segments": alone.segments}
        drawn = workers[(turn + 1) % 2].ask(helds[(turn + 1) % 2], draw)
        with alone.fork() as branch:
            assert drawn["output"] == list(branch.generate(8, temperature=1.0))
    _, state = unpack(store.get("s").data)
    assert state.to_bytes() == alone.state.to_bytes()


def test_a_request_is_done_once(engine: armt.Engine, store: StateStore) -> None:
    worker = Worker(engine, store)
    worker.create("s")
    first = worker.change(Held("s"), "same", feed([5, 6, 7]))
    again = worker.change(Held("s"), "same", feed([5, 6, 7]))
    assert first == again and store.version("s") == 2
    retried = worker.change(Held("s"), "same", feed([5, 6, 7]), if_version=1)
    assert retried == first  # it had been done when its version was still the newest
    for i in range(REMEMBERED):
        worker.change(Held("s"), f"other{i}", feed([1]))
    recent, _ = unpack(store.get("s").data)
    assert len(recent) == REMEMBERED and "same" not in recent


def test_faster_writers(engine: armt.Engine, store: StateStore) -> None:
    worker, other = Worker(engine, store), Worker(engine, store)
    worker.create("s")
    held = Held("s")

    def overtaken(session: Session) -> dict[str, Any]:
        if store.version("s") == 1:
            other.change(Held("s"), "faster", feed([9]))
        session.feed([1])
        return {}

    answer = worker.change(held, "slow", overtaken)
    assert answer == {"version": 3, "tokens": 2, "segments": 0}
    with pytest.raises(VersionConflict):
        worker.change(held, "late", feed([1]), if_version=2)
    with pytest.raises(armt.InvalidArgument):
        worker.change(held, "wrong", feed([-1]))
    assert worker.look(held) == {"version": 3, "tokens": 2, "segments": 0}
    worker.delete("s")
    with pytest.raises(SessionMissing):
        worker.look(held)


def test_bytes_that_are_no_session() -> None:
    for data in (b"", b"[]", b"[1]\n", b"{\n", b"[]\nnothing", pack({}, b"")):
        with pytest.raises(armt.StateError):
            unpack(data)
