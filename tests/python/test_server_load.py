"""Many clients at once: each gets what the engine gives it alone; faults stay where they are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason='needs the extra "server"')
pytest.importorskip("httpx", reason="needs httpx")

import httpx

import armt
from armt.server import Settings
from armt.server.errors import ApiError
from armt.server.jobs import Decode, top_logprobs
from armt.server.scheduler import Scheduler
from armt.session import Sampling
from serving import Live, alone, babbler, events, live

CLIENTS = 64


def ids_of(client: int, count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(client).integers(10, 4000, count)]


def little_endian(ids: list[int]) -> bytes:
    return np.array(ids, "<i4").tobytes()


async def plain(client: int, http: Any) -> tuple[Any, Any]:
    """A completion of one or several prompts."""
    prompts = [ids_of(1000 * i + client, 1 + 37 * client % 900) for i in range(1 + client % 3)]
    count = 1 + client % 17
    body = {"prompt": prompts, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    answer = (await http.post("/v1/completions", json=body)).json()
    want = [alone(babbler(), prompt, count, stop_ids=()) for prompt in prompts]
    return [choice["token_ids"] for choice in answer["choices"]], want


async def sampled(client: int, http: Any) -> tuple[Any, Any]:
    """A streamed completion with several choices and settings of its own."""
    prompt, count = ids_of(client, 5 + 61 * client % 1200), 3 + client % 11
    options = {"temperature": 0.5 + client / 50, "top_p": 0.9, "top_k": 10 + client}
    body = {"prompt": prompt, "max_tokens": count, "ignore_eos": True, "seed": client, **options}
    answer = await http.post("/v1/completions", json={**body, "n": 2, "stream": True})
    found: list[list[int]] = [[], []]
    for item in events(answer.text):
        found[item["choices"][0]["index"]] += item["choices"][0]["token_ids"]
    options["stop_ids"] = ()
    return found, [alone(babbler(), prompt, count, seed=client + i, **options) for i in range(2)]


async def conversation(client: int, http: Any) -> tuple[Any, Any]:
    """A session that is fed and asked in turns."""
    path = f"/v1/sessions/{(await http.post('/v1/sessions')).json()['id']}"
    want, found, expected = babbler().session(), [], []
    for turn in range(3):
        ids = ids_of(100 * client + turn, 1 + (331 * client * (turn + 1)) % 1100)
        headers = {"Content-Type": "application/octet-stream"}
        await http.post(f"{path}/feed", content=little_endian(ids), headers=headers)
        body = {"max_tokens": 1 + client % 7, "ignore_eos": True, "write": turn == 1}
        found.append((await http.post(f"{path}/ask", json=body)).json()["token_ids"])
        want.feed(ids)
        expected.append(list(want.generate(1 + client % 7, write=turn == 1)))
    state = armt.State.from_bytes((await http.get(f"{path}/save")).content)
    again = babbler().session(state=state)
    return [*found, again.logits.tobytes()], [*expected, want.logits.tobytes()]


async def scored(client: int, http: Any) -> tuple[Any, Any]:
    """A prompt's own logprobs."""
    ids = ids_of(client, 2 + 13 * client % 300)
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = (await http.post("/v1/completions", json=body)).json()
    found = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
    want = babbler().session().score(ids)[1:]
    return np.round(found, 9).tolist(), np.round(want, 9).tolist()


def test_every_client_gets_what_the_engine_gives_it_alone() -> None:
    kinds: list[Callable[[int, Any], Awaitable[tuple[Any, Any]]]] = [
        plain, sampled, conversation, conversation, scored,
    ]  # fmt: skip

    async def everybody(server: Live) -> list[tuple[Any, Any]]:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(
            base_url=str(server.base_url), limits=limits, timeout=60
        ) as http:
            return await asyncio.gather(*(kinds[i % 5](i, http) for i in range(CLIENTS)))

    # Fewer sessions stay in memory, and fewer rows fit into a pass, than there are clients.
    with live(Settings(max_live_sessions=8, max_batch=24), model=babbler()) as server:
        answers = asyncio.run(everybody(server))
        wrong = [i for i, (found, want) in enumerate(answers) if found != want]
        assert wrong == []
        totals, store = server.context.scheduler.totals, server.context.store
        assert totals.rows > 2 * totals.passes, "requests were not batched"
        assert store.evicted > 0 and store.restored > 0
        assert server.idle()


# --------------------------------------------------------------------- scheduler


def scheduled(work: Callable[[Scheduler], Awaitable[Any]], **options: Any) -> Any:
    """Runs ``work`` with a scheduler over the varied model."""

    async def run() -> Any:
        settings = {"max_batch": 16, "pause": 0.02, **options}
        scheduler = Scheduler(babbler(), **settings)
        scheduler.start()
        try:
            return await work(scheduler)
        finally:
            await scheduler.stop()
            assert not scheduler.alive

    return asyncio.run(run())


async def tokens_of(job: Decode) -> list[int]:
    return [token.id async for token in job.tokens()]


def test_long_reading_does_not_starve_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("armt.server.scheduler.READ_SECONDS", 0.02)

    async def work(scheduler: Scheduler) -> tuple[int, int]:
        reader, writer = babbler().session(), babbler().session()
        writer.feed([5])
        ids = np.array(ids_of(1, 80_000), np.int32)
        reading = asyncio.ensure_future(scheduler.read(reader, ids))
        while scheduler.totals.read == 0:
            await asyncio.sleep(0.001)
        assert len(await tokens_of(scheduler.decode(Decode(writer, 5)))) == 5
        done = scheduler.totals.read
        await reading
        return done, reader.tokens

    done, read = scheduled(work)
    assert read == 80_000 and done < 60_000


def test_a_fault_of_one_session_is_not_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    feed_many = armt.Engine.feed_many

    async def work(scheduler: Scheduler) -> None:
        sessions = [babbler().session() for _ in range(5)]

        def failing(self: armt.Engine, rows: Any, **options: Any) -> Any:
            rows = list(rows)
            if any(session is sessions[2] for session, _ in rows):
                raise armt.OutOfMemory("planted")
            return feed_many(self, rows, **options)

        monkeypatch.setattr(armt.Engine, "feed_many", failing)
        inputs = [np.array(ids_of(i, 100 + 300 * i), np.int32) for i in range(5)]
        found = await asyncio.gather(
            *(scheduler.read(s, ids) for s, ids in zip(sessions, inputs, strict=True)),
            return_exceptions=True,
        )
        assert [isinstance(each, ApiError) for each in found] == [False, False, True, False, False]
        assert isinstance(found[2], ApiError) and found[2].code == "out_of_memory"
        monkeypatch.undo()
        for i in (0, 1, 3, 4):
            want = babbler().session()
            want.feed(inputs[i])
            assert sessions[i].logits.tobytes() == want.logits.tobytes()

    scheduled(work)


def test_answers_fail_alone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(scheduler: Scheduler) -> None:
        good, bad = babbler().session(), babbler().session()
        good.feed([7, 8, 9])  # the other one has read nothing and cannot go on
        jobs = [Decode(session, 4, keep=False, eager=False) for session in (bad, good)]
        for job in jobs:
            scheduler.decode(job)
        found = await asyncio.gather(*map(tokens_of, jobs), return_exceptions=True)
        assert isinstance(found[0], ApiError) and found[0].code == "invalid_request"
        assert found[1] == alone(babbler(), [7, 8, 9], 4, stop_ids=())

    scheduled(work)


def test_a_bug_in_a_pass_does_not_end_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(scheduler: Scheduler) -> None:
        session = babbler().session()
        monkeypatch.setattr(scheduler, "_pieces", lambda most: 1 / 0)
        with pytest.raises(ApiError) as caught:
            await scheduler.read(session, np.array([5], np.int32))
        assert caught.value.code == "internal_error"
        monkeypatch.undo()
        await scheduler.read(session, np.array([5], np.int32))
        assert session.tokens == 1

    scheduled(work)


def test_nobody_waits_for_a_stopped_scheduler() -> None:
    async def run() -> None:
        scheduler = Scheduler(babbler(), max_batch=4, pause=0.02)
        scheduler.start()
        session = babbler().session()
        session.feed([5])
        job = scheduler.decode(Decode(session, 10**9, Sampling(temperature=1.0)))
        waiting = asyncio.ensure_future(tokens_of(job))
        await asyncio.sleep(0.05)
        await scheduler.stop()
        with pytest.raises(ApiError) as caught:
            await asyncio.wait_for(waiting, 10)
        assert caught.value.code == "shutting_down"
        with pytest.raises(ApiError):
            await scheduler.read(session, np.array([5], np.int32))

    asyncio.run(run())


def test_top_logprobs_are_the_largest_with_lower_ids_first() -> None:
    logits = np.array([1.0, 3.0, 3.0, -2.0, 3.0], np.float32)
    found = top_logprobs(logits, 2)
    assert [i for i, _ in found] == [1, 2]
    exact = 3 - np.log(np.exp(logits.astype(np.float64)).sum())
    assert [value for _, value in found] == pytest.approx([exact, exact], abs=1e-12)
    assert top_logprobs(logits, 0) == () and len(top_logprobs(logits, 99)) == 5
