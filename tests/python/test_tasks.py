"""Retrieval, BABILong and perplexity: what is made, how it is judged, and what models score."""

from __future__ import annotations

import gzip
import json
import lzma
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import armt
from armt.cli.app import run
from armt.models import resolve
from armt.tasks import babilong, perplexity, retrieval, speed
from armt.tasks.babi import find_file, make_problems, make_sentences, read_problems
from armt.tasks.babilong import Book, parse_length, read_sentences
from armt.tasks.geometries import GEOMETRIES, random_checkpoint
from armt.tasks.reading import blocks, read_all
from armt.tasks.retrieval import Layout, capacity, make_sample
from armt.tasks.scores import Score
from armt.text import TextSettings, Tokenizer

Invoke = Callable[..., tuple[int, str, str]]
BABI = """1 Mary went to the office.
2 John moved to the garden.
3 Where is Mary? \toffice\t1
4 Mary went back to the kitchen.
5 Where is Mary? \tkitchen\t4
1 Sandra went to the bathroom.
2 Where is Sandra? \tbathroom\t1
"""


@pytest.fixture(scope="module")
def engine() -> armt.Engine:
    return armt.Engine.from_pretrained(resolve("demo"), device="cpu")


@pytest.fixture(scope="module")
def tokenizer(engine: armt.Engine) -> Tokenizer:
    pytest.importorskip("tokenizers", reason='needs the extra "text"')
    return Tokenizer(engine.checkpoint.folder)


@pytest.fixture
def invoke(capfd: pytest.CaptureFixture[str]) -> Invoke:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


# ------------------------------------------------------------------ reading


def test_blocks() -> None:
    for sizes in ([], [3], [4], [1, 1, 1, 9, 4], [8], [5, 0, 5]):
        ids = np.arange(sum(sizes), dtype=np.int32)
        cuts = np.cumsum(sizes)[:-1]
        found = list(blocks(iter(np.split(ids, cuts) if sizes else []), 4))
        assert [len(b) for b in found] == [4] * (len(ids) // 4) + [len(ids) % 4] * (
            len(ids) % 4 > 0
        )
        assert np.concatenate([ids[:0], *found]).tolist() == ids.tolist()


def test_streams_of_unequal_length_are_read_side_by_side(engine: armt.Engine) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 4000, n).astype(np.int32) for n in (5, 9000, 4096)]
    seen: list[int] = []

    def stream(ids: Any) -> Iterator[Any]:
        yield from np.array_split(ids, 3)

    sessions = read_all(engine, [stream(ids) for ids in rows], seen.append)
    assert seen[-1] == sum(map(len, rows)) and seen == sorted(seen)
    for session, ids in zip(sessions, rows, strict=True):
        with engine.session() as alone:
            alone.feed(ids)
            np.testing.assert_array_equal(session.logits, alone.logits)
            found, expected = session.state.memory(3)[0], alone.state.memory(3)[0]
            np.testing.assert_array_equal(found, expected)


def test_intervals() -> None:
    assert Score(5, 10, 1, 1.0).interval == pytest.approx((0.2366, 0.7634), abs=1e-4)
    low, high = Score(10, 10, 1, 1.0).interval
    assert high == 1.0 and 0.7 < low < 0.75


# ------------------------------------------------------------------ retrieval


def test_the_newest_value_counts() -> None:
    layout = Layout()
    rng = np.random.default_rng(1)
    for _ in range(50):
        sample = make_sample("rewrite", 40, layout, rng, pool=5)
        known = dict(zip(sample.keys.tolist(), sample.values.tolist(), strict=True))
        assert len(known) <= 5 and known[sample.asked] == sample.answer
        once = make_sample("remember", 40, layout, rng, pool=5)
        assert len(set(once.keys.tolist())) == 40
        assert once.values[once.keys.tolist().index(once.asked)] == once.answer


def test_how_a_pair_is_written() -> None:
    layout = Layout()
    ids = layout.pairs(np.array([0x2A, 3], np.int32), np.array([7, 9], np.int32))
    assert ids.tolist() == [10, 2, 100, 7, 102, 3, 0, 100, 9, 102]
    assert layout.question(0x2A).tolist() == [10, 2, 101]


def test_capacity() -> None:
    assert capacity(50, 1.0, 16) == pytest.approx(50)
    assert capacity(50, 1 / 16, 16) == 0
    assert capacity(100, 0.5, 16) == pytest.approx(100 * 7 / 15)


def test_a_trained_memory_retrieves(trained: Callable[[str], Path]) -> None:
    engine = armt.Engine.from_pretrained(trained("retrieval-50"), device="cpu")
    seen: list[int] = []
    score = retrieval.evaluate(engine, kind="remember", pairs=20, samples=64, report=seen.append)
    assert score.accuracy > 0.95 and score.tokens == 64 * 20 * 5 == seen[-1]
    rewrite = retrieval.evaluate(engine, kind="rewrite", pairs=60, samples=64, filler=3, pool=10)
    assert rewrite.accuracy > 0.95 and rewrite.tokens == 64 * 63 * 5


def test_retrieval_refuses_other_models(invoke: Invoke, engine: armt.Engine) -> None:
    with pytest.raises(armt.InvalidArgument, match="segment of 512"):
        retrieval.evaluate(engine, kind="remember", pairs=5, samples=1)
    code, out, err = invoke("eval", "retrieval", "demo")
    assert code == 1 and out == "" and "trained for retrieval" in err.splitlines()[-1]


# ------------------------------------------------------------------ BABILong


def test_babi_files(tmp_path: Path) -> None:
    file = tmp_path / "qa1_single_test.txt"
    file.write_text(BABI)
    problems = read_problems(find_file(tmp_path, "qa1"))
    assert [p.answer for p in problems] == ["office", "kitchen", "bathroom"]
    assert problems[1].facts[-1] == "Mary went back to the kitchen." and len(problems[1].facts) == 3
    assert problems[2].facts == ("Sandra went to the bathroom.",)
    assert problems[0].question == "Where is Mary?"
    with pytest.raises(armt.InvalidArgument, match="qa2"):
        find_file(tmp_path, "qa2")
    file.write_text("no number here")
    with pytest.raises(armt.InvalidArgument, match="line 1"):
        read_problems(file)


def test_made_problems_are_true() -> None:
    for problem in make_problems(50, seed=3):
        person = problem.question.removeprefix("Where is ").removesuffix("?")
        last = [fact for fact in problem.facts if fact.startswith(person)][-1]
        assert last.endswith(f"{problem.answer}.")
    assert make_problems(5, 1) == make_problems(5, 1) != make_problems(5, 2)


def test_lengths() -> None:
    assert [parse_length(t) for t in ("0", "512", "4k", "1M")] == [0, 512, 4096, 1048576]
    with pytest.raises(armt.InvalidArgument, match="length"):
        parse_length("4 kB")


def test_sentences_of_a_book(tmp_path: Path) -> None:
    text = 'It was\nlate. "Is it?" he asked. Mr. Pell slept!\n\nTHE END'
    expected = ["It was late.", '"Is it?"', "he asked.", "Mr.", "Pell slept!", "THE END"]
    for name, opener in (("a.txt", open), ("a.gz", gzip.open), ("a.xz", lzma.open)):
        with opener(tmp_path / name, "wt", encoding="utf-8") as file:  # type: ignore[operator]
            file.write(text)
        assert read_sentences(tmp_path / name) == expected
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "raw.txt").write_bytes(b"\xff\xfe\xff")
    for name in ("empty.txt", "raw.txt", "absent.txt"):
        with pytest.raises(armt.InvalidArgument, match=name):
            read_sentences(tmp_path / name)


@pytest.mark.parametrize("length", [0, 200, 1024, 3000])
def test_a_sample_has_its_length_and_all_facts_in_order(tokenizer: Tokenizer, length: int) -> None:
    book = Book(make_sentences(100), tokenizer)
    settings = TextSettings.of(resolve("demo"))
    for seed, problem in enumerate(make_problems(5, seed=2)):
        sample = babilong.make_sample(
            problem,
            length=length,
            room=8,
            book=book,
            tokenizer=tokenizer,
            settings=settings,
            rng=np.random.default_rng(seed),
        )
        ids = np.concatenate([*sample.stream(book), sample.prompt])
        assert length == 0 or len(ids) == length - 8
        text = tokenizer.decode(ids)
        places = [text.index(fact) for fact in problem.facts]
        assert places == sorted(places) or len(set(problem.facts)) < len(problem.facts)
        assert text.endswith(f" {problem.question}")


def test_too_short_for_the_facts(invoke: Invoke, tokenizer: Tokenizer) -> None:
    code, out, err = invoke("eval", "babilong", "demo", "--lengths", "20", "--samples", "2")
    assert code == 1 and out == "" and "length: found 20" in err


def test_babilong_is_answered_as_by_a_session(
    invoke: Invoke, engine: armt.Engine, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "qa1_x_test.txt").write_text(BABI)
    (tmp_path / "book.txt").write_text("\n".join(make_sentences(300)))
    paths = ["--data", tmp_path, "--book", tmp_path / "book.txt", "--out", tmp_path / "out.jsonl"]
    sizes = ["--lengths", "0,600,2k", "--samples", "5", "--batch", "2"]
    code, out, err = invoke("eval", "babilong", "demo", *paths, *sizes, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["task"] == "babilong-qa1" and found["device"] == "cpu"
    assert [row["length"] for row in found["results"]] == [0, 600, 2048]
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(answers) == 15
    for row in found["results"]:
        mine = [a for a in answers if a["length"] == row["length"]]
        assert row["right"] == sum(a["right"] for a in mine) >= 3
        assert all(a["right"] == (a["answer"] == a["expected"]) for a in mine)
    again = invoke("eval", "babilong", "demo", *paths, *sizes[:4], "--batch", "5")
    assert again[0] == 0 and "2,048" in again[1] and "accuracy" in again[1]
    assert answers == [
        json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ]


def test_problems_that_do_not_fit_are_passed_over(
    engine: armt.Engine, tokenizer: Tokenizer
) -> None:
    long = [babilong.Problem(("Mary went to the office.",) * 60, "Where is Mary?", "never")]
    settings, book = TextSettings.of(resolve("demo")), Book(make_sentences(100), tokenizer)
    short = make_problems(3, seed=5)
    score, answers = babilong.evaluate(
        engine,
        tokenizer,
        settings,
        problems=long + short,
        book=book,
        length=200,
        samples=7,
    )
    assert score.samples == len(answers) == 7
    assert {a.expected for a in answers} == {p.answer for p in short}


def test_only_the_first_task_is_made_on_the_spot(invoke: Invoke) -> None:
    code, _, err = invoke("eval", "babilong", "demo", "--task", "qa3")
    assert code == 1 and "--data" in err
    code, _, err = invoke("eval", "babilong", "demo", "--task", "qa9")
    assert code == 1 and "qa9" in err


# ------------------------------------------------------------------ perplexity


def test_perplexity_is_that_of_the_whole_sequence(engine: armt.Engine) -> None:
    ids = speed.random_ids(engine, 9000)
    found = perplexity.evaluate(engine.session(), iter([ids[:10], ids[10:]]))
    logits = engine.forward(ids[:1500]).logits
    assert logits is not None and found.tokens == 9000 and found.scored == 8999
    part = perplexity.evaluate(engine.session(), iter([ids[:1500]]))
    rows = logits[0, :-1].astype(np.float64)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    expected = rows[np.arange(1499), ids[1:1500]].sum()
    assert part.log_likelihood == pytest.approx(expected, rel=1e-6)
    assert part.bits_per_token == pytest.approx(-expected / 1499 / math.log(2))
    with pytest.raises(armt.InvalidArgument, match="empty"):
        perplexity.evaluate(engine.session(), iter([ids[:1]]))


def test_perplexity_of_a_file(invoke: Invoke, tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = " ".join(make_sentences(200))
    file = tmp_path / "text.txt"
    file.write_text(text)
    code, out, err = invoke("eval", "perplexity", "demo", "--data", file, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["tokens"] == len(tokenizer.encode(text))
    bits = -found["log_likelihood"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / len(text.encode()))
    code, out, _ = invoke("eval", "perplexity", "demo", "--data", file, "--limit", 100)
    assert code == 0 and "100 tokens" in out and "a byte" not in out
    code, out, err = invoke("eval", "perplexity", "demo", "--data", tmp_path / "none")
    assert (code, out) == (1, "") and "none: no such file" in err


# ------------------------------------------------------------------ speed


def test_bench(invoke: Invoke) -> None:
    quick = ["--seconds", 0, "--tokens", 600, "--decode", 3, "--sessions", 2]
    code, out, err = invoke("bench", "demo", *quick, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["self_check_difference"] == 0.0
    assert found["read"]["tokens"] == 600 and found["write_many"]["tokens"] == 6
    for part in (found["read"], found["write"], found["write_many"]):
        assert 0 < part["least"] <= part["tokens_per_second"] <= part["most"]
        assert part["runs"] >= 3
    code, out, err = invoke("bench", "retrieval", *quick)
    assert code == 0 and "tokens/s" in out and "CPU" in err


def test_a_machine_that_computes_wrongly_is_not_measured(
    engine: armt.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert speed.self_check(engine) == 0.0
    monkeypatch.setattr(speed, "LARGEST_DIFFERENCE", {"cpu": -1.0})
    with pytest.raises(armt.DeviceError, match="self-check"):
        speed.self_check(engine)


def test_geometries() -> None:
    sizes = {
        name: sum(math.prod(p.shape) for p in random_checkpoint(name).plans) for name in GEOMETRIES
    }
    assert 124e6 < sizes["gpt2"] < 135e6 and 1.2e9 < sizes["llama-1b"] < 1.4e9
    engine = armt.Engine.from_checkpoint(random_checkpoint("retrieval"), device="cpu")
    logits = engine.step(np.arange(10)).logits
    assert logits is not None and np.isfinite(logits).all() and np.ptp(logits) > 0.1
    with pytest.raises(armt.InvalidArgument, match="retrieval"):
        random_checkpoint("giant")
