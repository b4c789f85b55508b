"""What is refused, who is kept out, and what goes wrong on the way: others never notice."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason='needs the extra "server"')
pytest.importorskip("httpx", reason="needs httpx")

from armt.errors import InvalidArgument
from armt.server import Settings, create_app
from armt.server.auth import Keys, read_keys
from armt.server.errors import CODES
from serving import KEYS, Live, alone, babbler, live, until

RNG = np.random.default_rng(7)
LONG = [int(i) for i in RNG.integers(10, 4000, 1500)]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(model=babbler()) as client:
        yield client


def code_of(answer: Any) -> str:
    """The code of an error; the whole form is checked."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"} and error["message"]
    assert (answer.status_code, error["type"]) == CODES[error["code"]]
    assert "x-request-id" in answer.headers
    return str(error["code"])


def still_right(server: Live) -> bool:
    """Whether the server answers as the engine does."""
    body = {"prompt": LONG[:40], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    answer = server.post("/v1/completions", json=body).json()
    want = alone(babbler(), LONG[:40], 5, stop_ids=())
    return bool(answer["choices"][0]["token_ids"] == want)


COMPLETIONS: list[tuple[bytes, str]] = [
    (b"", "invalid_request"),
    (b"{", "invalid_json"),
    (b"\xff\xfe{}", "invalid_json"),
    (b"[" * 100_000, "invalid_json"),
    (b'{"a":' * 50_000, "invalid_json"),
    (b"null", "invalid_request"),
    (b"[]", "invalid_request"),
    (b"{}", "invalid_request"),
    (b'{"prompt": "a", "bogus": 1}', "invalid_request"),
    (b'{"prompt": {}}', "invalid_request"),
    (b'{"prompt": 5}', "invalid_request"),
    (b'{"prompt": []}', "empty_input"),
    (b'{"prompt": [[]]}', "empty_input"),
    (b'{"prompt": ""}', "empty_input"),
    (b'{"prompt": [4096]}', "invalid_token"),
    (b'{"prompt": [-1]}', "invalid_token"),
    (b'{"prompt": [1, 2.5]}', "invalid_token"),
    (b'{"prompt": [1, true]}', "invalid_token"),
    (b'{"prompt": [1, "a"]}', "invalid_token"),
    (b'{"prompt": [[1], [[2]]]}', "invalid_token"),
    (b'{"prompt": [99999999999999999999999999]}', "invalid_token"),
    (b'{"prompt": [1e400]}', "invalid_token"),
    (b'{"prompt": "\\ud800"}', "invalid_text"),
    (b'{"prompt": "a", "stop": "\\udc00"}', "invalid_text"),
    (b'{"prompt": "a", "stop": [""]}', "invalid_request"),
    (b'{"prompt": "a", "temperature": NaN}', "invalid_request"),
    (b'{"prompt": "a", "temperature": -0.1}', "invalid_request"),
    (b'{"prompt": "a", "temperature": "hot"}', "invalid_request"),
    (b'{"prompt": "a", "top_p": 0}', "invalid_request"),
    (b'{"prompt": "a", "top_p": 1.5}', "invalid_request"),
    (b'{"prompt": "a", "repetition_penalty": 0}', "invalid_request"),
    (b'{"prompt": "a", "max_tokens": -1}', "invalid_request"),
    (b'{"prompt": "a", "max_tokens": 1000000}', "invalid_request"),
    (b'{"prompt": "a", "max_tokens": 1e9}', "invalid_request"),
    (b'{"prompt": "a", "seed": -1}', "invalid_request"),
    (b'{"prompt": "a", "seed": 9223372036854775808}', "invalid_request"),
    (b'{"prompt": "a", "n": 0}', "invalid_request"),
    (b'{"prompt": ["a", "b"], "n": 100}', "invalid_request"),
    (b'{"prompt": "a", "logprobs": 100}', "invalid_request"),
    (b'{"prompt": "a", "logit_bias": {"5": 1}}', "unsupported"),
    (b'{"prompt": "a", "suffix": "b"}', "unsupported"),
    (b'{"prompt": "a", "best_of": 5}', "unsupported"),
    (b'{"prompt": "a", "presence_penalty": 1}', "unsupported"),
    (b'{"prompt": "a", "model": "../../etc/passwd"}', "model_not_found"),
]


@pytest.mark.parametrize(("body", "code"), COMPLETIONS, ids=lambda value: str(value)[:40])
def test_bad_completions(server: Live, body: bytes, code: str) -> None:
    assert code_of(server.post("/v1/completions", content=body, headers=JSON)) == code


CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "invalid_request"),
    ({"messages": [{"role": "king", "content": "x"}]}, "invalid_request"),
    ({"messages": [{"role": "user"}]}, "invalid_request"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_request"),
    ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "unsupported"),
    ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}, "invalid_request"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "no_chat_template"),
]


@pytest.mark.parametrize(("body", "code"), CHATS, ids=lambda value: str(value)[:60])
def test_bad_chats(server: Live, body: dict[str, Any], code: str) -> None:
    assert code_of(server.post("/v1/chat/completions", json=body)) == code


def test_bad_requests_to_sessions(server: Live) -> None:
    session = server.new_session()
    feed, ask = f"/v1/sessions/{session}/feed", f"/v1/sessions/{session}/ask"
    text, binary = {"Content-Type": "text/plain"}, {"Content-Type": "application/octet-stream"}
    cases = [
        (server.ask(session), "empty_input"),
        (server.post(feed, content=b"x"), "unsupported_media_type"),
        (server.post(feed, content=b"", headers=text), "empty_input"),
        (server.post(feed, content=b"abc \xff\xfe", headers=text), "invalid_text"),
        (server.post(feed, content=b"abc \xe2\x82", headers=text), "invalid_text"),
        (server.post(feed, content=b"\1\0\0\0\2", headers=binary), "invalid_token"),
        (server.post(feed, content=b"\xff\xff\xff\xff", headers=binary), "invalid_token"),
        (server.post(feed, json={}), "invalid_request"),
        (server.post(feed, json={"text": "a", "tokens": [1]}), "invalid_request"),
        (server.post(feed, json={"tokens": "abc"}), "invalid_token"),
        (server.post(feed, json={"tokens": []}), "empty_input"),
        (server.post(feed, content=b"{", headers=JSON), "invalid_json"),
        (server.post(f"{feed}?if_version=x", json={"text": "a"}), "invalid_request"),
        (server.post(ask, json={"prompt": "a", "question": "b"}), "invalid_request"),
        (server.post(ask, json={"prompt": "a", "max_tokens": 0}), "invalid_request"),
        (server.post(ask, json={"prompt": "a", "max_tokens": 10**6}), "invalid_request"),
        (server.post(f"/v1/sessions/{session}/load", content=b"x"), "unsupported_media_type"),
        (server.get("/v1/sessions?limit=0"), "invalid_request"),
        (server.post("/v1/sessions", json={"seed": "x"}), "invalid_request"),
        (server.get("/nowhere"), "not_found"),
        (server.put("/v1/sessions"), "method_not_allowed"),
    ]
    assert [code_of(answer) for answer, _ in cases] == [code for _, code in cases]
    assert server.get(f"/v1/sessions/{session}").json()["version"] == 0


@pytest.mark.parametrize(
    "name",
    ["..", "../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", "sess_" + "0" * 32, "lock"],
)
def test_path_tricks_find_nothing(server: Live, name: str) -> None:
    for tail in ("", "/save", "/memory"):
        head = raw(server, f"GET /v1/sessions/{name}{tail} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert head.startswith(b"HTTP/1.1 404 "), (name, tail)


def raw(server: Live, data: bytes, *, wait: float = 10.0) -> bytes:
    """What comes back for bytes on a socket: one whole answer, or what came before the end."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
            head, end, body = answer.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            if end and len(body) >= int(length[1] if length else 0):
                break
        return answer


def test_what_is_no_http_gets_the_same_kind_of_error(server: Live) -> None:
    for data in (b"GARBAGE\r\n\r\n", b"GET /\0 HTTP/1.1\r\n\r\n", b"\0" * 100 + b"\r\n\r\n"):
        head, _, body = raw(server, data).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["code"] == "invalid_request"
    long = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000
    assert raw(server, long).startswith(b"HTTP/1.1 4")


# ---------------------------------------------------------------- sizes and times


def test_bodies_have_limits() -> None:
    limits = Settings(max_body_bytes=10_000, max_feed_bytes=50_000, max_state_bytes=20_000)
    with live(limits, model=babbler()) as server:
        session = server.new_session()
        large = b'{"prompt": "' + b"a" * 20_000 + b'"}'
        assert code_of(server.post("/v1/completions", content=large, headers=JSON)) == (
            "body_too_large"
        )
        pieces = (b" " * 1000 for _ in range(10_000))  # without a Content-Length
        answer = server.post("/v1/completions", content=pieces, headers=JSON)
        assert code_of(answer) == "body_too_large"
        feed = f"/v1/sessions/{session}/feed"
        assert code_of(server.post(feed, content=large, headers=JSON)) == "body_too_large"
        both = [("Content-Type", "application/json"), ("Content-Type", "text/plain")]
        for kinds in (both, both[::-1]):
            answer = server.post(feed, content=b'{"text": "' + b"a" * 20_000, headers=kinds)
            assert code_of(answer) == "body_too_large"
        assert server.feed(session, "word " * 9_000).status_code == 200
        before = server.get(f"/v1/sessions/{session}").json()["tokens"]
        text = {"Content-Type": "text/plain"}
        answer = server.post(feed, content=(b"word " * 1000 for _ in range(11)), headers=text)
        assert code_of(answer) == "body_too_large"
        assert server.get(f"/v1/sessions/{session}").json()["tokens"] == before
        state = server.get(f"/v1/sessions/{session}/save").content
        load = f"/v1/sessions/{session}/load"
        binary = {"Content-Type": "application/octet-stream"}
        assert code_of(server.post(load, content=state, headers=binary)) == "body_too_large"
        assert still_right(server)


def test_a_gigabyte_is_refused_at_its_head(server: Live) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000000000\r\n\r\n"
    )
    assert raw(server, head).startswith(b"HTTP/1.1 413 ")
    assert still_right(server)


def test_bodies_of_all_requests_together_have_a_limit() -> None:
    with live(Settings(max_buffered_bytes=1000), model=babbler()) as server:
        body = b'{"prompt": "' + b"a" * 2000 + b'"}'
        answer = server.post("/v1/completions", content=body, headers=JSON)
        assert code_of(answer) == "overloaded" and answer.headers["retry-after"]
        assert still_right(server)


def test_slow_clients_are_let_go() -> None:
    limits = Settings(read_timeout=0.3, body_timeout=0.6)
    protocol = {"head_seconds": 0.3}
    with live(limits, model=babbler(), protocol=protocol) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        answer = raw(server, head + b"Content-Length: 100\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408 ") and b"body_timeout" in answer
        for start in (b"", b"GET / HTT", head):
            with pytest.raises(ConnectionError):
                if raw(server, start) == b"":
                    raise ConnectionResetError
        # Drop by drop: each drop in time, but not the whole.
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(head + b"Content-Length: 100\r\n\r\n")
            for _ in range(5):
                time.sleep(0.15)
                connection.sendall(b" ")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408 ")
        assert still_right(server)


def test_a_client_that_does_not_read_is_dropped() -> None:
    limits = Settings(write_timeout=0.3, max_tokens=100_000)
    with live(limits, model=babbler(), send_buffer=4096) as server:
        body = {"prompt": LONG[:20], "n": 4, "max_tokens": 100_000, "stream": True}
        data = json.dumps({**body, "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        assert server.idle(30)
        connection.close()
        assert still_right(server)


def test_an_answer_has_its_time() -> None:
    with live(Settings(request_timeout=0.3, max_tokens=10**6), model=babbler()) as server:
        body = {"prompt": LONG[:20], "max_tokens": 10**6, "ignore_eos": True}
        assert code_of(server.post("/v1/completions", json=body)) == "request_timeout"
        text = server.post("/v1/completions", json={**body, "stream": True}).text
        last = json.loads(text.rstrip().rpartition("data: ")[2])
        assert last["error"]["code"] == "request_timeout"
        assert server.idle()


# ------------------------------------------------------------------ going away


def test_going_away_in_the_middle_of_an_answer_ends_the_work() -> None:
    with live(Settings(max_tokens=10**6), model=babbler()) as server:
        session = server.new_session()
        server.feed(session, LONG[:30])
        body = {"max_tokens": 10**6, "ignore_eos": True}
        totals = server.context.scheduler.totals
        chat = {"messages": [{"role": "user", "content": "x"}]}
        for path, extra in (
            ("/v1/completions", {"prompt": LONG[:20], "n": 3}),
            ("/v1/chat/completions", chat),
            (f"/v1/sessions/{session}/ask", {"write": True}),
        ):
            generated = totals.generated
            with server.stream("POST", path, json={**body, **extra, "stream": True}) as answer:
                pieces = answer.iter_raw()
                next(pieces)
                assert answer.status_code == 200, path
                until(lambda before=generated: totals.generated >= before + 20)
            assert server.idle(), path
        state = server.get(f"/v1/sessions/{session}").json()
        assert (state["tokens"], state["version"], state["busy"]) == (30, 1, False)
        # Nobody reads anything before the whole is there: then the socket says it.
        data = json.dumps({**body, "prompt": LONG[:20]}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        passes = totals.passes
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
            until(lambda: totals.passes >= passes + 5)
        assert server.idle()
        assert still_right(server)


def test_going_away_in_the_middle_of_a_feed_leaves_the_session(server: Live) -> None:
    session = server.new_session()
    server.feed(session, LONG[:30])
    head = f"POST /v1/sessions/{session}/feed HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + b"Content-Type: text/plain\r\n\r\n" + b"word " * 50_000)
        until(lambda: server.is_busy(session))
    until(lambda: not server.is_busy(session))
    assert server.get(f"/v1/sessions/{session}").json()["tokens"] == 30
    answer = server.ask(session, max_tokens=3, ignore_eos=True).json()
    assert answer["token_ids"] == alone(babbler(), LONG[:30], 3, stop_ids=())


# ------------------------------------------------------------- keys and admission


def test_each_key_sees_its_own_sessions() -> None:
    with live(Settings(api_keys=KEYS), model=babbler(), key=KEYS[0]) as first:
        session = first.new_session()
        first.feed(session, LONG[:10])
        other = {"Authorization": f"Bearer {KEYS[1]}"}
        base = f"/v1/sessions/{session}"
        for method, path in (
            ("GET", base), ("DELETE", base), ("GET", f"{base}/save"), ("GET", f"{base}/memory"),
            ("POST", f"{base}/fork"),
        ):  # fmt: skip
            assert code_of(first.request(method, path, headers=other)) == "session_not_found"
        ask = first.post(f"{base}/ask", json={"prompt": "x"}, headers=other)
        assert code_of(ask) == "session_not_found"
        assert first.get("/v1/sessions", headers=other).json()["data"] == []
        assert len(first.get("/v1/sessions").json()["data"]) == 1
        wrong = [
            "", "Bearer", "Bearer wrong", f"Basic {KEYS[0]}", KEYS[0],
            f"Bearer {KEYS[0]}x", f"Bearer {KEYS[0][:-1]}", "Bearer \xff\xfe",
        ]  # fmt: skip
        for value in wrong:
            refused = first.get("/v1/models", headers={"Authorization": value.encode("latin-1")})
            assert code_of(refused) == "invalid_api_key", value
            assert refused.headers["www-authenticate"] == "Bearer"
        assert code_of(first.get("/metrics", headers={"Authorization": "x"})) == "invalid_api_key"
        for path in ("/", "/health", "/openapi.json"):
            assert first.get(path, headers={"Authorization": "x"}).status_code == 200
        assert first.get("/metrics").status_code == 200


def test_keys_from_a_file(tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEYS[0]}\n\n  {KEYS[1]}  \n")
    assert read_keys(file) == KEYS
    for text in ("", "# nothing\n", "schl\u00fcssel-schl\u00fcssel\n"):
        file.write_text(text)
        with pytest.raises(InvalidArgument, match="--api-keys-file"):
            read_keys(file)
    with pytest.raises(InvalidArgument, match="--api-keys-file"):
        read_keys(tmp_path / "none")
    with pytest.raises(InvalidArgument, match="at least 16"):
        Keys(["short"])
    with pytest.raises(InvalidArgument, match="max_batch"):
        create_app(babbler(), Settings(max_batch=0))


def test_too_much_at_once_is_refused_politely() -> None:
    limits = Settings(api_keys=KEYS, max_requests=3, max_requests_per_key=2, max_tokens=10**6)
    with live(limits, model=babbler(), key=KEYS[0]) as server:
        body = {"prompt": LONG[:9], "max_tokens": 10**6, "ignore_eos": True, "stream": True}
        other = {"Authorization": f"Bearer {KEYS[1]}"}
        small = {"prompt": LONG[:9], "max_tokens": 1}

        def running(headers: dict[str, str] | None = None) -> Any:
            return server.stream("POST", "/v1/completions", json=body, headers=headers)

        with running() as one, running() as two:
            assert one.status_code == two.status_code == 200
            refused = server.post("/v1/completions", json=small)
            assert code_of(refused) == "too_many_requests" and refused.headers["retry-after"]
            assert server.post("/v1/completions", json=small, headers=other).status_code == 200
            with running(other):
                refused = server.post("/v1/completions", json=small, headers=other)
                assert code_of(refused) == "overloaded"
                assert server.get("/health").status_code == 200
                assert server.get("/v1/sessions/x").status_code == 404
                refused = server.get("/v1/sessions/x/save", headers=other)
                assert code_of(refused) == "overloaded"
        assert server.idle()
        assert still_right(server)


def test_sessions_have_a_limit() -> None:
    limits = Settings(api_keys=KEYS, max_sessions=3, max_sessions_per_key=2)
    with live(limits, key=KEYS[0]) as server:
        mine = [server.new_session() for _ in range(2)]
        assert code_of(server.post("/v1/sessions")) == "too_many_sessions"
        other = {"Authorization": f"Bearer {KEYS[1]}"}
        assert server.post("/v1/sessions", headers=other).status_code == 201
        assert code_of(server.post("/v1/sessions", headers=other)) == "too_many_sessions"
        server.delete(f"/v1/sessions/{mine[0]}")
        assert server.post("/v1/sessions", headers=other).status_code == 201


# ----------------------------------------------------------------------- records


def test_metrics_count(server: Live) -> None:
    def value(line: str) -> float:
        for found in server.get("/metrics").text.splitlines():
            if found.startswith(line + " "):
                return float(found.rpartition(" ")[2])
        return 0.0

    route = 'route="/v1/completions"'
    names = [
        f'armt_requests_total{{method="POST",{route},status="200"}}',
        'armt_tokens_total{kind="read"}',
        'armt_tokens_total{kind="generated"}',
        "armt_time_to_first_token_seconds_count",
        'armt_errors_total{code="model_not_found"}',
    ]
    before = [value(name) for name in names]
    assert still_right(server)
    server.post("/v1/completions", json={"prompt": [1], "model": "x"})
    assert [value(n) - b for n, b in zip(names, before, strict=True)] == [1, 40, 5, 1, 1]


def test_logs_hold_no_secrets(caplog: pytest.LogCaptureFixture) -> None:
    from armt.server.logs import JsonLines

    for name in ("armt.access", "armt.server"):
        logging.getLogger(name).propagate = True
    with (
        caplog.at_level(logging.INFO, "armt.access"),
        caplog.at_level(logging.INFO, "armt.server"),
        live(Settings(api_keys=KEYS), model=babbler(), key=KEYS[0]) as server,
    ):
        session = server.new_session()
        server.feed(session, "a most secret word")
        server.ask(session, prompt="another secret", max_tokens=2)
        server.get(f"/v1/sessions/{session}/nowhere")
        server.post("/v1/completions", json={"prompt": "secret", "bogus secret": 1})
    lines = [JsonLines().format(record) for record in caplog.records]
    requests = [found for found in map(json.loads, lines) if found["event"] == "request"]
    while requests[0]["status"] != 201:  # a server before this one that was slow to end
        requests.pop(0)
    assert [found["status"] for found in requests] == [201, 200, 200, 404, 400]
    assert requests[1]["route"] == "/v1/sessions/{session_id}/feed"
    assert requests[1]["body_bytes"] == 18 and requests[1]["finished"] is True
    text = "\n".join(lines)
    assert "secret" not in text and session not in text and not any(key in text for key in KEYS)


def test_a_stop_lets_running_answers_finish() -> None:
    with live(model=babbler()) as server:
        body = {"prompt": LONG[:9], "max_tokens": 300, "ignore_eos": True, "temperature": 0}
        found: list[Any] = []
        thread = threading.Thread(
            target=lambda: found.append(server.post("/v1/completions", json=body))
        )
        thread.start()
        until(lambda: server.context.scheduler.totals.decoding > 0)
        server.server.should_exit = True
        thread.join()
        want = alone(babbler(), LONG[:9], 300, stop_ids=())
        assert found[0].json()["choices"][0]["token_ids"] == want
