"""Sessions over HTTP, each compared with a session of the engine that did the same."""

from __future__ import annotations

import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason='needs the extra "server"')
pytest.importorskip("httpx", reason="needs httpx")

import armt
from armt.errors import InvalidArgument
from armt.server import Settings
from serving import Live, babbler, engine, events, live, text_settings, tokenizer, until

RNG = np.random.default_rng(6)
LONG = [int(i) for i in RNG.integers(10, 4000, 2000)]
STATE = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(model=babbler()) as client:
        yield client


@pytest.fixture(scope="module")
def reader() -> Iterator[Live]:
    with live() as client:
        yield client


def fed(ids: Any, model: armt.Engine | None = None) -> armt.Session:
    session = (model or babbler()).session()
    session.feed(ids)
    return session


def state_of(server: Live, session: str) -> armt.State:
    answer = server.get(f"/v1/sessions/{session}/save")
    assert answer.status_code == 200
    return armt.State.from_bytes(answer.content)


def same(found: armt.State, want: armt.Session, model: armt.Engine | None = None) -> bool:
    """Whether a state goes on exactly as a session does: memory, open segment, next logits."""
    again = (model or babbler()).session(state=found)
    expected = want.state
    for layer in range(expected.layers):
        for a, b in zip(found.memory(layer), expected.memory(layer), strict=True):
            if (a is None) != (b is None) or (a is not None and a.tobytes() != b.tobytes()):
                return False
    return (
        (again.tokens, again.segments) == (want.tokens, want.segments)
        and found.open_tokens.tolist() == expected.open_tokens.tolist()
        and again.logits.tobytes() == want.logits.tobytes()
    )


@pytest.mark.parametrize("count", [1, 511, 512, 513, 2000])
def test_token_ids_are_read_as_by_the_engine(server: Live, count: int) -> None:
    session = server.new_session()
    answer = server.feed(session, LONG[:count]).json()
    assert answer["tokens"] == answer["session"]["tokens"] == count
    assert answer["session"]["version"] == 1
    assert same(state_of(server, session), fed(LONG[:count]))


def test_the_ways_of_feeding_agree(reader: Live) -> None:
    text = "Mary went to the  kitchen.\r\n\n Élodie stayed: 東京 🙂.\n" * 40
    ids = tokenizer().encode("".join(text_settings().prepared([text])), specials=True)
    want = fed(ids, engine())
    found = [reader.new_session() for _ in range(4)]
    assert reader.feed(found[0], text).status_code == 200
    data = text.encode()
    pieces = (data[i : i + 7] for i in range(0, len(data), 7))  # cuts characters, words, line ends
    headers = {"Content-Type": "text/plain; charset=utf-8"}
    path = "/v1/sessions/{}/feed"
    assert reader.post(path.format(found[1]), content=pieces, headers=headers).status_code == 200
    assert reader.post(path.format(found[2]), json={"text": text}).status_code == 200
    assert reader.post(path.format(found[3]), json={"tokens": ids.tolist()}).status_code == 200
    assert all(same(state_of(reader, session), want, engine()) for session in found)


def test_a_long_text_is_read_in_pieces_as_a_whole(reader: Live) -> None:
    text = " ".join(f"John moved to the garden {i}." for i in range(4000))
    session = reader.new_session()
    answer = reader.feed(session, text).json()
    want = fed(tokenizer().encode(text, specials=True), engine())
    assert answer["tokens"] == want.tokens > 16 * engine().segment_size
    assert same(state_of(reader, session), want, engine())


def test_closing_the_segment(server: Live) -> None:
    session = server.new_session()
    server.feed(session, LONG[:100], params={"close_segment": True})
    want = fed(LONG[:100])
    want.close_segment()
    assert same(state_of(server, session), want)


def test_a_question_leaves_no_trace_unless_it_is_to(server: Live) -> None:
    session = server.new_session()
    server.feed(session, LONG[:700])
    before = state_of(server, session).to_bytes()
    want = fed(LONG[:700])
    body = {"tokens": LONG[700:720], "max_tokens": 30, "ignore_eos": True}
    answer = server.ask(session, **body).json()
    branch = want.fork()
    branch.feed(LONG[700:720])
    expected = list(branch.generate(30))
    assert answer["token_ids"] == expected and answer["finish_reason"] == "length"
    assert answer["text"] == tokenizer().decode(expected)
    assert state_of(server, session).to_bytes() == before
    stream = events(server.ask(session, **body, stream=True).text)
    assert [i for part in stream for i in part["token_ids"]] == expected
    assert "".join(part["text"] for part in stream) == answer["text"]
    written = server.ask(session, **body, write=True).json()
    assert written["token_ids"] == expected and written["session"]["version"] == 2
    assert same(state_of(server, session), branch)
    # Without anything to read the stream is continued.
    more = server.ask(session, max_tokens=5, ignore_eos=True).json()
    assert more["token_ids"] == list(branch.generate(5, write=False))


def test_answers_that_are_kept_draw_from_the_sessions_own_sequence(server: Live) -> None:
    session = server.new_session(seed=11)
    server.feed(session, LONG[:50])
    want = babbler().session(seed=11)
    want.feed(LONG[:50])
    body = {"max_tokens": 8, "temperature": 1.5, "ignore_eos": True, "write": True}
    for _ in range(2):
        found = server.ask(session, **body).json()["token_ids"]
        assert found == list(want.generate(8, temperature=1.5))


def test_a_question_in_the_models_form_is_not_torn(reader: Live) -> None:
    size = engine().segment_size
    for count in (size - 100, size - 3, size, size + 88):
        session = reader.new_session()
        reader.feed(session, LONG[:count])
        answer = reader.ask(session, question="Where is Mary?").json()
        want = fed(LONG[:count], engine())
        ids = tokenizer().encode(text_settings().prompt("Where is Mary?"))
        if want.open_tokens + len(ids) > size:
            want.close_segment()
        want.feed(ids)
        stop = engine().checkpoint.eos_token_ids
        assert answer["token_ids"] == list(want.generate(20, stop_ids=stop)), count


def test_logprobs_of_an_answer(server: Live) -> None:
    session = server.new_session()
    server.feed(session, LONG[:30])
    answer = server.ask(session, max_tokens=6, logprobs=2, ignore_eos=True).json()
    generation = fed(LONG[:30]).generate(6)
    assert [t["token_id"] for t in answer["logprobs"]] == list(generation)
    found = [t["logprob"] for t in answer["logprobs"]]
    np.testing.assert_allclose(found, generation.logprobs, rtol=0, atol=1e-12)
    assert all(t["top"][0]["token_id"] == t["token_id"] for t in answer["logprobs"])  # greedy


def test_forks_go_their_own_ways(server: Live) -> None:
    first = server.new_session()
    server.feed(first, LONG[:600])
    answer = server.post(f"/v1/sessions/{first}/fork")
    second = answer.json()["id"]
    assert answer.status_code == 201 and second != first
    server.feed(second, LONG[600:900])
    server.feed(first, LONG[900:1000])
    assert same(state_of(server, first), fed([*LONG[:600], *LONG[900:1000]]))
    assert same(state_of(server, second), fed(LONG[:900]))


def test_states_move_between_server_and_engine(server: Live, tmp_path: Path) -> None:
    first, second = server.new_session(), server.new_session()
    server.feed(first, LONG[:777])
    data = server.post(f"/v1/sessions/{first}/save").content
    assert same(armt.State.from_bytes(data), fed(LONG[:777]))
    loaded = server.post(f"/v1/sessions/{second}/load", content=data, headers=STATE)
    assert loaded.json()["tokens"] == 777
    assert same(state_of(server, second), fed(LONG[:777]))
    other = fed([5, 6, 7], engine()).state.to_bytes()
    for bad in (data[:-9], b"", b"x" * 5000, data[:200] + b"\x55" + data[201:], other):
        refused = server.post(f"/v1/sessions/{second}/load", content=bad, headers=STATE)
        assert refused.status_code == 400, len(bad)
        assert refused.json()["error"]["code"] == "invalid_state"
    assert same(state_of(server, second), fed(LONG[:777]))


def test_memory_of_each_layer(server: Live) -> None:
    session = server.new_session()
    server.feed(session, LONG[:1100])
    layers = server.get(f"/v1/sessions/{session}/memory").json()["layers"]
    state = fed(LONG[:1100]).state
    assert [layer["layer"] for layer in layers] == list(range(state.layers))
    for layer in layers:
        values, mass = state.memory(layer["layer"])
        assert layer["norm"] == pytest.approx(float(np.linalg.norm(values)), rel=1e-6)
        mass_of = None if mass is None else pytest.approx(float(np.abs(mass).sum()), rel=1e-6)
        assert layer["key_mass"] == mass_of
        assert layer["written"] is True
        assert layer["last_write"]["mean_beta"] is not None


def test_a_version_can_be_asked_for(server: Live) -> None:
    session = server.new_session()
    assert server.feed(session, LONG[:5], params={"if_version": 0}).status_code == 200
    late = server.feed(session, LONG[:5], params={"if_version": 0})
    assert late.status_code == 412 and late.json()["error"]["code"] == "version_mismatch"
    path = f"/v1/sessions/{session}/ask?if_version=0"
    refused = server.post(path, json={"write": True, "max_tokens": 1})
    assert refused.status_code == 412
    assert server.get(f"/v1/sessions/{session}").json()["version"] == 1


def test_only_one_request_changes_a_session_at_a_time(server: Live) -> None:
    session = server.new_session()
    server.feed(session, LONG[:10])
    reached, go_on = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        yield b"\x01\x02\x00\x00"
        reached.set()
        assert go_on.wait(20)
        yield b"\x03\x04\x00\x00"

    path, found = f"/v1/sessions/{session}/feed", []
    thread = threading.Thread(
        target=lambda: found.append(server.post(path, content=slowly(), headers=STATE))
    )
    thread.start()
    assert reached.wait(20)
    until(lambda: server.is_busy(session))
    refused = server.feed(session, LONG[:10])
    assert refused.status_code == 409 and refused.json()["error"]["code"] == "session_busy"
    assert "retry-after" in refused.headers
    # Questions see the session as it was.
    answer = server.ask(session, max_tokens=3, ignore_eos=True).json()
    assert answer["token_ids"] == list(fed(LONG[:10]).generate(3))
    go_on.set()
    thread.join()
    assert found[0].json()["session"]["tokens"] == 12
    assert same(state_of(server, session), fed([*LONG[:10], 0x0201, 0x0403]))


def test_a_deleted_session_is_gone(server: Live) -> None:
    session = server.new_session()
    assert server.delete(f"/v1/sessions/{session}").json()["deleted"] is True
    for answer in (
        server.get(f"/v1/sessions/{session}"),
        server.delete(f"/v1/sessions/{session}"),
        server.feed(session, [1]),
        server.ask(session, prompt="x"),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "session_not_found"


def test_pages_of_the_list() -> None:
    with live() as server:
        made = [server.new_session() for _ in range(5)]
        first = server.get("/v1/sessions", params={"limit": 3}).json()
        assert [s["id"] for s in first["data"]] == made[:3] and first["has_more"] is True
        rest = server.get("/v1/sessions", params={"after": made[2]}).json()
        assert [s["id"] for s in rest["data"]] == made[3:] and rest["has_more"] is False


# ---------------------------------------------------------------------- eviction


def test_idle_sessions_come_back_bit_equal(tmp_path: Path) -> None:
    settings = Settings(session_dir=tmp_path / "idle", max_live_sessions=3, idle_seconds=0.2)
    with live(settings, model=babbler()) as server:
        made = [server.new_session() for _ in range(12)]
        for i, session in enumerate(made):
            server.feed(session, LONG[i : 500 + 60 * i])
        before = [state_of(server, session).to_bytes() for session in made]
        store = server.context.store
        assert store.live <= 3 and store.evicted > 0
        until(lambda: store.live == 0)
        listed = server.get("/v1/sessions").json()["data"]
        assert not any(session["in_memory"] for session in listed)
        files = [*(tmp_path / "idle").iterdir()]
        assert len([f for f in files if f.suffix == ".armt-state"]) == 12
        assert all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in files)
        assert stat.S_IMODE((tmp_path / "idle").stat().st_mode) == 0o700
        assert not any(session[5:] in f.name for session in made for f in files)
        for i, session in enumerate(made):
            assert state_of(server, session).to_bytes() == before[i]
            answer = server.ask(session, max_tokens=4, ignore_eos=True).json()
            assert answer["token_ids"] == list(fed(LONG[i : 500 + 60 * i]).generate(4))


def test_sessions_survive_a_restart(tmp_path: Path) -> None:
    settings = Settings(session_dir=tmp_path / "kept")
    with live(settings, model=babbler()) as server:
        session, empty = server.new_session(), server.new_session()
        server.feed(session, LONG[:900])
        before = state_of(server, session).to_bytes()
        with pytest.raises(InvalidArgument, match="another server uses this folder"):
            server.context.store.__class__(babbler(), settings).open()
    (tmp_path / "kept" / "0.json").write_text("{}")
    (tmp_path / "kept" / f"{'0' * 32}.json").write_text('{"id": "../../etc/passwd"}')
    with live(settings, model=babbler()) as server:
        (listed,) = server.get("/v1/sessions").json()["data"]
        assert listed["id"] == session and listed["tokens"] == 900 and listed["version"] == 1
        assert state_of(server, session).to_bytes() == before
        assert server.get(f"/v1/sessions/{empty}").status_code == 404  # it held nothing
        server.delete(f"/v1/sessions/{session}")
        assert not [*(tmp_path / "kept").glob("*.armt-state")]


def test_a_damaged_file_is_one_sessions_trouble(tmp_path: Path) -> None:
    settings = Settings(session_dir=tmp_path / "kept")
    with live(settings, model=babbler()) as server:
        lost, kept = server.new_session(), server.new_session()
        server.feed(lost, LONG[:100])
        server.feed(kept, LONG[:200])
    for file in (tmp_path / "kept").glob("*.armt-state"):
        if armt.State.load(file).tokens == 100:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
    with live(settings, model=babbler()) as server:
        answer = server.ask(lost, prompt="x")
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "session_lost"
        assert same(state_of(server, kept), fed(LONG[:200]))
        assert server.delete(f"/v1/sessions/{lost}").status_code == 200


def test_old_sessions_are_deleted_where_that_is_wanted() -> None:
    with live(Settings(session_ttl=0.3, idle_seconds=0.2)) as server:
        server.new_session()
        until(lambda: server.get("/v1/sessions").json()["data"] == [])


def test_many_idle_sessions_take_little_memory() -> None:
    with live(Settings(max_live_sessions=8)) as server:
        first = server.new_session()
        server.feed(first, LONG[:20])
        for _ in range(50):
            server.post(f"/v1/sessions/{first}/fork")
        assert server.context.store.live <= 8
        metrics = server.get("/metrics").text
        assert 'armt_sessions{place="disk"} 43.0' in metrics
