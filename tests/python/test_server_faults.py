"""What a server does when its disk, its memory or the numbers fail: one request, never others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason='needs the extra "server"')
pytest.importorskip("httpx", reason="needs httpx")

import armt
import state_format as sf
from armt.errors import DeviceError, InvalidArgument, NonFiniteError
from armt.server import Settings
from armt.server.errors import CODES, as_api_error
from armt.server.files import read_record, write_record
from armt.server.store import Entry, Store
from file_faults import ERRORS, closed, descriptors, failing, points
from serving import Live, alone, babbler, events, live

RNG = np.random.default_rng(8)
LONG = [int(i) for i in RNG.integers(10, 4000, 700)]
STATE = {"Content-Type": "application/octet-stream"}
RECORD = {
    "id": "sess_" + "0" * 32,
    "owner": "",
    "created": 1,
    "version": 2,
    "tokens": 3,
    "segments": 0,
    "open_tokens": 3,
}


def each_fault(count: int) -> Iterator[tuple[str, int]]:
    """Each of ``count`` operations with each kind of error."""
    for first in range(1, count + 1):
        for kind in ERRORS:
            yield kind, first


# ----------------------------------------------------------------------- numbers


def poisoned() -> bytes:
    """A state file of the babbler with a NaN in its first memory."""
    session = babbler().session()
    session.step(LONG[: babbler().segment_size])
    blocks = sf.parse(session.state.to_bytes())
    payload = np.frombuffer(sf.payload_of(blocks, sf.MEMORY, 0), "<f4").copy()
    payload[: len(payload) // 2] = np.nan
    return sf.seal(sf.with_payload(blocks, sf.MEMORY, payload.tobytes(), 0))


def code_of(answer: Any) -> str:
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == CODES[error["code"]]
    return str(error["code"])


def test_numbers_that_are_not_finite_have_a_code() -> None:
    with live(model=babbler()) as server:
        session, other = server.new_session(), server.new_session()
        path = f"/v1/sessions/{session}"
        assert server.post(f"{path}/load", content=poisoned(), headers=STATE).status_code == 200
        server.feed(other, LONG[:50])
        before = server.get(f"{path}/save").content
        assert code_of(server.feed(session, LONG[:600])) == "not_finite"
        answer = server.ask(session, tokens=LONG[:5], max_tokens=3)
        assert code_of(answer) == "not_finite" and "not finite" in answer.text
        streamed = server.ask(session, tokens=LONG[:5], max_tokens=3, stream=True)
        assert streamed.status_code == 500 or events(streamed.text)[-1]["error"]["code"] == (
            "not_finite"
        )
        assert server.get(f"{path}/save").content == before
        body = {"tokens": LONG[:5], "max_tokens": 4, "ignore_eos": True, "temperature": 0}
        found = server.ask(other, **body).json()["token_ids"]
        assert found == alone(babbler(), LONG[:50] + LONG[:5], 4, stop_ids=())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NonFiniteError("x"), "not_finite"),
        (DeviceError("x"), "device_error"),
        (MemoryError("x"), "out_of_memory"),
        (armt.StateError("x"), "invalid_state"),
        (armt.CheckpointError("x"), "internal_error"),
        (InvalidArgument("x"), "invalid_request"),
        (OSError("/a/secret/path"), "internal_error"),
        (KeyError("x"), "internal_error"),
    ],
)
def test_every_error_has_a_code(error: Exception, code: str) -> None:
    shown = as_api_error(error)
    assert shown.code == code and "secret" not in shown.message


# ------------------------------------------------------------------------- files


def test_a_record_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    new = RECORD | {"version": 3}
    names = points(lambda: write_record(path, RECORD))
    assert {"open", "file.write", "os.fsync", "os.replace"} <= set(names)
    opened = descriptors()
    for error, first in each_fault(len(names)):
        with failing(ERRORS[error], first, first), pytest.raises((OSError, MemoryError)):
            write_record(path, new)
        assert read_record(path) == RECORD, (error, first)
        assert [*tmp_path.iterdir()] == [path] and closed(opened), (error, first)
    write_record(path, new)
    assert read_record(path) == new


def settings_of(folder: Path) -> Settings:
    return Settings(session_dir=folder)


def opened_store(folder: Path) -> Store:
    store = Store(babbler(), settings_of(folder))
    store.open()
    return store


async def filled(store: Store, count: int) -> Entry:
    """A session in the store that has read ``count`` tokens."""
    entry = await store.create("me")
    await feed(store, entry, LONG[:count])
    return entry


async def feed(store: Store, entry: Entry, ids: list[int]) -> None:
    async with store.writing(entry) as change:
        change.session.feed(ids)


async def logits_of(store: Store, entry: Entry) -> bytes:
    async with store.reading(entry) as session:
        return bytes(session.logits.tobytes())


def want(count: int) -> bytes:
    session = babbler().session()
    session.feed(LONG[:count])
    return bytes(session.logits.tobytes())


def files_of(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir() if path.name != "lock")


def run(work: Callable[[], Any]) -> None:
    asyncio.run(work())


def test_a_session_that_cannot_be_written_stays_in_memory(tmp_path: Path) -> None:
    async def work() -> None:
        store = opened_store(tmp_path)
        with failing() as counted:
            assert await store.evict(await filled(store, 20))
        for error, first in each_fault(len(counted.names)):
            before = files_of(tmp_path)
            entry = await filled(store, 30)
            with failing(ERRORS[error], first, first):
                assert not await store.evict(entry), (error, first)
            assert entry.session is not None and await logits_of(store, entry) == want(30)
            assert files_of(tmp_path) == before, "half a session is left in the folder"
            assert await store.evict(entry) and entry.session is None
            assert await logits_of(store, entry) == want(30)
            await store.delete(entry)
        await store.close()

    run(work)


def test_a_change_that_cannot_be_written_leaves_the_old_files(tmp_path: Path) -> None:
    async def work() -> None:
        store = opened_store(tmp_path)
        entry = await filled(store, 20)
        assert await store.evict(entry)
        await feed(store, entry, LONG[20:30])
        with failing() as counted:
            assert await store.evict(entry)
        for number, (error, first) in enumerate(each_fault(len(counted.names))):
            count = 30 + number
            await feed(store, entry, LONG[count : count + 1])
            with failing(ERRORS[error], first, first):
                assert not await store.evict(entry), (error, first)
            assert files_of(tmp_path) == [".armt-state", ".json"]
            assert await logits_of(store, entry) == want(count + 1)
        total = entry.tokens
        assert await store.close() == 1
        again = opened_store(tmp_path)
        (found,) = again.owned("me")
        assert (found.id, found.tokens) == (entry.id, total)
        assert await logits_of(again, found) == want(total)
        await again.close()

    run(work)


def test_a_session_whose_files_cannot_be_removed_is_still_there(tmp_path: Path) -> None:
    async def work() -> None:
        store = opened_store(tmp_path)
        with failing() as counted:
            entry = await filled(store, 20)
            assert await store.evict(entry)
            del counted.names[:]
            await store.delete(entry)
        assert counted.names and files_of(tmp_path) == []
        for error, first in each_fault(len(counted.names)):
            for evicted in (True, False):
                entry = await filled(store, 20)
                assert await store.evict(entry)
                if not evicted:
                    await feed(store, entry, LONG[20:25])
                with failing(ERRORS[error], first, first), pytest.raises((OSError, MemoryError)):
                    await store.delete(entry)
                assert store.find("me", entry.id) is entry and len(store.owned("me")) == 1
                assert await logits_of(store, entry) == want(20 if evicted else 25)
                await store.delete(entry)
                assert files_of(tmp_path) == [] and store.owned("me") == []
        await store.close()

    run(work)


def test_a_folder_that_cannot_be_read_is_let_go(tmp_path: Path) -> None:
    async def work() -> None:
        store = opened_store(tmp_path)
        entry = await filled(store, 20)
        await store.close()
        store = Store(babbler(), settings_of(tmp_path))
        names = points(store.open)
        await store.close()
        assert {"os.mkdir", "os.open", "os.scandir"} <= set(names)
        opened = descriptors()
        refused = 0
        for error, first in each_fault(len(names)):
            store = Store(babbler(), settings_of(tmp_path))
            try:
                with failing(ERRORS[error], first, first):
                    store.open()
                await store.close()
            except (InvalidArgument, MemoryError):
                refused += 1
            assert closed(opened), (error, first)
            again = opened_store(tmp_path)  # the lock is free, and the session there
            assert [found.id for found in again.owned("me")] == [entry.id]
            await again.close()
        assert refused >= len(names)

    run(work)


def test_stopping_with_a_full_disk(tmp_path: Path) -> None:
    async def work() -> None:
        store = opened_store(tmp_path)
        entry = await filled(store, 20)
        assert await store.evict(entry)
        await feed(store, entry, LONG[20:30])
        with failing(ERRORS["disk full"], 1, 1_000_000):
            assert await store.close() == 0
        again = opened_store(tmp_path)
        (found,) = again.owned("me")
        assert await logits_of(again, found) in (want(20), want(30))
        await again.close()

    run(work)


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(model=babbler()) as client:
        yield client


def test_an_upload_that_cannot_be_kept(server: Live) -> None:
    session = server.new_session()
    path = f"/v1/sessions/{session}"
    server.feed(session, LONG[:40])
    other = babbler().session()
    other.feed(LONG[:90])
    data = other.state.to_bytes()
    before = server.get(f"{path}/save").content

    def load() -> Any:
        return server.post(f"{path}/load", content=data, headers=STATE)

    with failing() as counted:
        assert load().status_code == 200
    assert {"open", "file.write"} <= set(counted.names)
    assert server.post(f"{path}/load", content=before, headers=STATE).status_code == 200
    version = server.get(path).json()["version"]
    opened = descriptors()
    for error, first in each_fault(len(counted.names)):
        with failing(ERRORS[error], first, first) as met:
            answer = load()
        if len(met.names) < first:  # the body came in fewer pieces this time
            assert answer.json()["tokens"] == 90
            assert server.post(f"{path}/load", content=before, headers=STATE).status_code == 200
            version += 2
            continue
        assert code_of(answer) == ("out_of_memory" if error == "no memory" else "internal_error")
        assert "secret" not in answer.text and "upload-" not in answer.text
        assert server.get(f"{path}/save").content == before, (error, first)
        assert server.get(path).json()["version"] == version and not server.is_busy(session)
        for left in Path(server.context.store.scratch()).glob("upload-*"):
            assert counted.names[first - 1] == "os.unlink", (error, first)
            left.unlink()
    assert closed(opened)
    assert load().json()["tokens"] == 90
