"""Reading side by side, scores, perplexity and speed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import armt
from armt.models import resolve
from armt.tasks import perplexity, speed
from armt.tasks.babi import make_sentences
from armt.tasks.geometries import GEOMETRIES, random_checkpoint
from armt.tasks.reading import blocks, read_all
from armt.tasks.scores import Score
from armt.text import Tokenizer

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def engine() -> armt.Engine:
    return armt.Engine.from_pretrained(resolve("demo"), device="cpu")


@pytest.fixture(scope="module")
def tokenizer(engine: armt.Engine) -> Tokenizer:
    pytest.importorskip("tokenizers", reason='needs the extra "text"')
    return Tokenizer(engine.checkpoint.folder)


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
