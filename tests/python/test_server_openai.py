"""Completions as OpenAI's and llama.cpp's clients ask for them, against the engine alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason='needs the extra "server"')
pytest.importorskip("httpx", reason="needs httpx")

from armt.models import resolve
from serving import Live, alone, babbler, engine, events, live, load, tokenizer

STORY = "Mary went to the kitchen. John moved to the garden. Daniel went back to the office."
RNG = np.random.default_rng(5)
LONG = [int(i) for i in RNG.integers(10, 4000, 1300)]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    """The model whose answers vary."""
    with live(model=babbler()) as client:
        yield client


@pytest.fixture(scope="module")
def reader() -> Iterator[Live]:
    """The model whose answers make sense."""
    with live() as client:
        yield client


def complete(server: Live, **body: Any) -> Any:
    answer = server.post("/v1/completions", json={"temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("count", [1, 2, 511, 512, 513, 1300])
def test_token_ids_are_continued_as_by_the_engine(server: Live, count: int) -> None:
    body = complete(server, prompt=LONG[:count], max_tokens=24, ignore_eos=True)
    (choice,) = body["choices"]
    assert choice["token_ids"] == alone(babbler(), LONG[:count], 24, stop_ids=())
    assert choice["text"] == tokenizer().decode(choice["token_ids"])
    assert choice["finish_reason"] == "length"
    assert body["usage"] == {
        "prompt_tokens": count,
        "completion_tokens": 24,
        "total_tokens": count + 24,
    }


def test_a_text_ends_at_the_models_own_end(reader: Live) -> None:
    prompt = STORY + " Where is John?<gen>"
    (choice,) = complete(reader, prompt=prompt, max_tokens=10)["choices"]
    ids = alone(engine(), tokenizer().encode(prompt, specials=True), 10)
    assert choice["token_ids"] == ids and ids[-1] in engine().checkpoint.eos_token_ids
    assert choice["text"] == " garden" and choice["finish_reason"] == "stop"


def test_several_prompts_keep_their_order(server: Live) -> None:
    prompts = [LONG[:700], LONG[5:9], LONG[300:900]]
    body = complete(server, prompt=prompts, max_tokens=6, ignore_eos=True)
    found = [(choice["index"], choice["token_ids"]) for choice in body["choices"]]
    assert found == [(i, alone(babbler(), p, 6, stop_ids=())) for i, p in enumerate(prompts)]
    texts = ["Where is Mary?", STORY]
    body = complete(server, prompt=texts, max_tokens=3, ignore_eos=True)
    want = [alone(babbler(), tokenizer().encode(t, specials=True), 3, stop_ids=()) for t in texts]
    assert [choice["token_ids"] for choice in body["choices"]] == want


def test_draws_are_those_of_the_engine(server: Live) -> None:
    options = {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "min_p": 0.01}
    body = complete(
        server, prompt=LONG[:600], max_tokens=12, n=3, seed=17, ignore_eos=True, **options
    )
    found = [choice["token_ids"] for choice in body["choices"]]
    assert found == [
        alone(babbler(), LONG[:600], 12, seed=17 + i, stop_ids=(), **options) for i in range(3)
    ]
    assert len({tuple(ids) for ids in found}) > 1
    unseeded = [
        complete(server, prompt=LONG[:9], max_tokens=12, temperature=2.0, ignore_eos=True)
        for _ in range(2)
    ]
    assert unseeded[0]["choices"] != unseeded[1]["choices"]


def test_logprobs_of_prompt_and_answer(server: Live) -> None:
    ids = LONG[:700]
    body = complete(server, prompt=ids, max_tokens=4, logprobs=3, echo=True, ignore_eos=True)
    (choice,) = body["choices"]
    shown = choice["logprobs"]
    session = babbler().session()
    want = session.score(ids)
    generation = session.generate(4)
    new = list(generation)
    assert choice["token_ids"] == new
    assert shown["token_logprobs"][0] is None and shown["top_logprobs"][0] is None
    np.testing.assert_allclose(shown["token_logprobs"][1:700], want[1:], rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        shown["token_logprobs"][700:], generation.logprobs, rtol=0, atol=1e-9
    )
    rows = babbler().session().feed([*ids, *new], logits="all").logits
    assert rows is not None
    for place in (1, 511, 512, 699, 700, 703):
        logits = rows[place - 1].astype(np.float64)
        best = np.sort(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))[::-1]
        top = sorted(shown["top_logprobs"][place].values(), reverse=True)
        np.testing.assert_allclose(top, best[: len(top)], rtol=0, atol=1e-9)
    assert len(shown["tokens"]) == len(shown["text_offset"]) == 704
    assert shown["text_offset"] == sorted(shown["text_offset"])


def test_scoring_without_generating(server: Live) -> None:
    body = complete(server, prompt=LONG[:20], max_tokens=0, logprobs=1, echo=True)
    (choice,) = body["choices"]
    want = babbler().session().score(LONG[:20])
    np.testing.assert_allclose(
        choice["logprobs"]["token_logprobs"][1:], want[1:], rtol=0, atol=1e-9
    )
    assert choice["text"] == tokenizer().decode(LONG[:20], specials=True)
    assert choice["token_ids"] == [] and choice["finish_reason"] == "length"


def test_a_stop_string_cuts_the_text_and_ends_the_work(server: Live) -> None:
    plain = complete(server, prompt=LONG[:90], max_tokens=40, ignore_eos=True)["choices"][0]
    text = plain["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    body = complete(
        server, prompt=LONG[:90], max_tokens=40, ignore_eos=True, stop=["\u2603", stop], logprobs=0
    )
    (choice,) = body["choices"]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
    assert len(choice["token_ids"]) < 40
    assert choice["token_ids"] == plain["token_ids"][: len(choice["token_ids"])]
    offsets = choice["logprobs"]["text_offset"]
    assert all(offset < len(choice["text"]) for offset in offsets)


@pytest.mark.parametrize("extra", [{}, {"stop": ["e"]}, {"n": 3, "seed": 1, "temperature": 1.2}])
def test_a_stream_adds_up_to_the_whole(server: Live, extra: dict[str, Any]) -> None:
    body = {"prompt": LONG[:600], "max_tokens": 20, "logprobs": 1, "ignore_eos": True, **extra}
    whole = complete(server, **body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = server.post("/v1/completions", json={"temperature": 0, **body, **options})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    *chunks, last = events(answer.text)
    assert last["usage"] == whole["usage"] and last["choices"] == []
    for choice in whole["choices"]:
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
        assert [part["finish_reason"] for part in parts][-1] == choice["finish_reason"]
        shown = [part["logprobs"] for part in parts if part["logprobs"]]
        for name in ("tokens", "token_logprobs", "text_offset"):
            assert [v for part in shown for v in part[name]] == choice["logprobs"][name]


def test_a_stream_comes_in_pieces(server: Live) -> None:
    body = {"prompt": LONG[:50], "max_tokens": 200, "stream": True, "ignore_eos": True}
    with server.stream("POST", "/v1/completions", json=body) as answer:
        pieces = [*answer.iter_text()]
    assert pieces[0].count("data: ") < 100
    assert sum(len(e["choices"][0]["token_ids"]) for e in events("".join(pieces))) == 200


def test_chat_in_the_plain_form(reader: Live) -> None:
    messages = [
        {"role": "system", "content": "Mary went to the kitchen."},
        {"role": "user", "content": [{"type": "text", "text": "John moved to the garden."}]},
        {"role": "user", "content": "Where is Mary?"},
    ]
    body = {"messages": messages, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    answer = reader.post("/v1/chat/completions", json=body).json()
    (choice,) = answer["choices"]
    prompt = "Mary went to the kitchen. John moved to the garden. Where is Mary?<gen>"
    want = alone(engine(), tokenizer().encode(prompt, specials=True), 20)
    text = tokenizer().decode(want)
    assert choice["token_ids"] == want and len(want) == 2
    assert choice["message"]["content"] == text and choice["finish_reason"] == "stop"
    assert [t["token"] for t in choice["logprobs"]["content"]] == [text]
    stream = reader.post("/v1/chat/completions", json={**body, "stream": True}).text
    deltas = [c["choices"][0]["delta"] for c in events(stream)]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == text
    last = {"role": "assistant", "content": "Yes."}
    refused = reader.post("/v1/chat/completions", json={"messages": [*messages, last]})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "no_chat_template"


def test_a_chat_template_of_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason='needs the extra "server"')
    folder = tmp_path / "model"
    shutil.copytree(resolve("demo"), folder)
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}"
        "{{ raise_exception('no tools here') }}{% endif %}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}<gen>{% endif %}"
    )
    config = {"chat_template": template, "bos_token": {"content": "<eos>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with live(model=load(folder)) as server:
        messages = [{"role": "user", "content": STORY + " Where is John?"}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 4, "ignore_eos": True}
        answer = server.post("/v1/chat/completions", json=body).json()
        ids = tokenizer().encode(f"<eos>{STORY} Where is John? <gen>")
        assert answer["choices"][0]["token_ids"] == alone(engine(), ids, 4, stop_ids=())
        assert answer["usage"]["prompt_tokens"] == len(ids)
        tool = [{"role": "tool", "content": "x"}]
        refused = server.post("/v1/chat/completions", json={"messages": tool})
        assert refused.status_code == 400 and "no tools here" in refused.text


def test_the_form_of_llama_cpp(server: Live) -> None:
    body = {"prompt": LONG[:80], "n_predict": 15, "temperature": 0, "ignore_eos": True}
    answer = server.post("/completion", json={**body, "cache_prompt": True, "n_probs": 2}).json()
    want = alone(babbler(), LONG[:80], 15, stop_ids=())
    assert answer["tokens"] == want and answer["content"] == tokenizer().decode(want)
    assert answer["stop"] is True and answer["stop_type"] == "limit"
    assert [p["id"] for p in answer["completion_probabilities"]] == want
    assert answer["tokens_evaluated"] == 80 and answer["tokens_predicted"] == 15
    parts = events(server.post("/completion", json={**body, "stream": True}).text)
    assert "".join(part["content"] for part in parts) == answer["content"]
    assert [part["stop"] for part in parts] == [False] * (len(parts) - 1) + [True]
    stop = answer["content"][9:13]
    word = server.post("/completion", json={**body, "stop": [stop]}).json()
    assert word["stop_type"] == "word" and word["stopping_word"] == stop
    assert word["content"] == answer["content"][: answer["content"].index(stop)]
    none = server.post("/completion", json={**body, "n_predict": 0}).json()
    assert none["content"] == "" and none["tokens"] == []


def test_models(reader: Live) -> None:
    (model,) = reader.get("/v1/models").json()["data"]
    assert model["id"] == "babilong"
    assert reader.get("/v1/models/babilong").json() == model
    assert reader.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_the_openai_client(reader: Live) -> None:
    openai = pytest.importorskip("openai", reason="needs the package openai")
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{reader.port}/v1", api_key="none", max_retries=0
    )
    (model,) = client.models.list().data
    prompt = STORY + " Where is John?<gen>"
    done = client.completions.create(model=model.id, prompt=prompt, temperature=0, max_tokens=5)
    assert done.choices[0].text == " garden" and done.choices[0].finish_reason == "stop"
    by_ids = client.completions.create(
        model=model.id, prompt=LONG[:300], temperature=0, max_tokens=7, logprobs=2, echo=True
    )
    assert by_ids.choices[0].logprobs is not None
    assert len(by_ids.choices[0].logprobs.tokens) >= 300
    messages: Any = [
        {"role": "user", "content": STORY},
        {"role": "user", "content": "Where is Mary?"},
    ]
    chat = client.chat.completions.create(
        model=model.id, messages=messages, temperature=0, logprobs=True, top_logprobs=1
    )
    assert chat.choices[0].message.content == " kitchen"
    pieces = client.chat.completions.create(
        model=model.id, messages=messages, temperature=0, stream=True, n=2
    )
    texts = ["", ""]
    for piece in pieces:
        for choice in piece.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [" kitchen", " kitchen"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model.id, prompt=[-1])
    assert caught.value.code == "invalid_token"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="a")


def test_a_model_without_a_tokenizer_takes_ids(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    ignored = shutil.ignore_patterns("tokenizer.json")
    shutil.copytree(resolve("demo"), folder, ignore=ignored)
    with live(model=load(folder)) as server:
        body = complete(server, prompt=LONG[:40], max_tokens=5, ignore_eos=True, logprobs=1)
        (choice,) = body["choices"]
        assert (
            choice["token_ids"] == alone(engine(), LONG[:40], 5, stop_ids=())
            and choice["text"] == ""
        )
        for path, sent in (
            ("/v1/completions", {"prompt": "text"}),
            ("/v1/completions", {"prompt": [1], "stop": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            refused = server.post(path, json=sent)
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "no_tokenizer"
