"""Associative retrieval: what is made, how it is judged, and what models score."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import armt
from armt.tasks import plots, retrieval
from armt.tasks.journal import Journal
from armt.tasks.reading import EngineReader
from armt.tasks.retrieval import Layout, Trial, capacity, curves, make_sample

Invoke = Callable[..., tuple[int, str, str]]


def test_the_newest_value_counts() -> None:
    layout = Layout()
    rng = np.random.default_rng(1)
    for _ in range(50):
        sample = make_sample(Trial("rewrite", 40, keys=5), layout, rng, 3)
        known = dict(zip(sample.keys.tolist(), sample.values.tolist(), strict=True))
        assert len(known) <= 5 and len(sample.asked) == 3
        for key, value, written in zip(sample.asked, sample.answers, sample.written, strict=True):
            assert known[key] == value == sample.values[written]
            assert key not in sample.keys[written + 1 :]
        once = make_sample(Trial("remember", 40), layout, rng)
        assert len(set(once.keys.tolist())) == 40
        assert once.values[once.keys.tolist().index(once.asked[0])] == once.answers[0]


def test_how_a_pair_is_written() -> None:
    layout = Layout()
    ids = layout.pairs(np.array([0x2A, 3], np.int32), np.array([7, 9], np.int32))
    assert ids.tolist() == [10, 2, 100, 7, 102, 3, 0, 100, 9, 102]
    assert layout.question(0x2A).tolist() == [10, 2, 101]


def test_capacity() -> None:
    assert capacity(50, 1.0, 16) == pytest.approx(50)
    assert capacity(50, 1 / 16, 16) == 0
    assert capacity(100, 0.5, 16) == pytest.approx(100 * 7 / 15)


def test_the_curves_fit_the_layout() -> None:
    for layout in (Layout(), Layout(key_symbols=1), Layout(key_symbols=3)):
        trials = curves(layout)
        for trial in trials:
            trial.check(layout)
        assert {t.kind for t in trials} == {"remember", "rewrite"}
    trials = curves(Layout())
    assert [t.pairs for t in trials if t.kind == "remember" and not t.filler][-1] == 200
    assert {(t.keys, t.pairs) for t in trials} >= {(10, 50), (10, 5000), (50, 50), (50, 5000)}
    assert Trial("remember", 50, filler=10_000) in trials
    with pytest.raises(armt.InvalidArgument, match="keys: found 17"):
        Trial("rewrite", 50, keys=17).check(Layout(key_symbols=1))


def test_a_trained_memory_retrieves(trained: Callable[[str], Path]) -> None:
    folder = trained("retrieval-50")
    reader = EngineReader(armt.Engine.from_pretrained(folder, device="cpu"))
    layout = Layout.of(folder)
    seen: list[int] = []
    score = retrieval.evaluate(
        reader, layout, Trial("remember", 20), samples=64, batch=24, report=seen.append
    )
    assert score.accuracy > 0.95 and score.tokens == 64 * 20 * 5 == seen[-1]
    trial = Trial("rewrite", 60, keys=10, filler=3)
    journal = Journal()
    score = retrieval.evaluate(reader, layout, trial, samples=32, questions=4, journal=journal)
    assert score.accuracy > 0.95 and score.tokens == 32 * 63 * 5 and score.samples == 128
    (cell,) = journal.cells
    assert cell["kind"] == "rewrite" and len(journal.of(cell)) == 128
    assert all(4 <= line["segments_ago"] <= 63 for line in journal.of(cell))
    again = retrieval.evaluate(reader, layout, trial, samples=32, questions=4, batch=5)
    assert again.right == score.right


def test_retrieval_refuses_other_models(invoke: Invoke) -> None:
    code, out, err = invoke("eval", "retrieval", "demo")
    assert code == 1 and out == "" and "trained for retrieval" in err.splitlines()[-1]
    with pytest.raises(armt.InvalidArgument, match="vocabulary of 50"):
        Layout().check(5, 50)


def test_the_command(invoke: Invoke, trained: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = trained("retrieval-50"), tmp_path / "out"
    quick = ["--pairs", "4,8", "--samples", 8, "--device", "cpu"]
    code, text, err = invoke("eval", "retrieval", model, *quick, "--filler", "0,6", "--out", out)
    assert code == 0 and "remember" in text and "filler" in text and "results.csv" in err
    found = json.loads((out / "results.json").read_text())
    assert [(r["pairs"], r["filler"]) for r in found["results"]] == [(4, 0), (8, 0), (4, 6), (8, 6)]
    assert found["system"] == "armt" and found["results"][0]["capacity"] <= 4
    if plots.available():
        for name in ("remember.png", "filler.png", "capacity.png"):
            assert name in err and (out / name).read_bytes().startswith(b"\x89PNG")
    rows = (out / "results.csv").read_text().splitlines()
    assert len(rows) == 5 and {"pairs", "accuracy", "low"} <= set(rows[0].split(","))
    code, text, err = invoke("eval", "retrieval", model, *quick, "--kind", "both")
    assert code == 1 and "--kind" in err
    code, text, _ = invoke(
        "eval", "retrieval", model, *quick, "--kind", "rewrite", "--keys", "2,3", "--json"
    )
    assert code == 0
    assert [(r["keys"], r["pairs"]) for r in json.loads(text)["results"]] == [
        (2, 4),
        (2, 8),
        (3, 4),
        (3, 8),
    ]
