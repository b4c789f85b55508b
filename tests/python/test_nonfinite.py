"""Infinities and NaNs are counted, and an error unless the caller wants to see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import armt
import state_format as sf
from reference.random_models import random_model
from variants import VARIANTS, Zoo

VARIANT = next(v for v in VARIANTS if v.name == "modern-llama")


def poisoned(state: armt.State, layer: int, value: float) -> armt.State:
    """The same state with one value of a layer's A changed."""
    blocks = sf.parse(state.to_bytes())
    payload = np.frombuffer(sf.payload_of(blocks, sf.MEMORY, layer), "<f4").copy()
    payload[0 : len(payload) // 2] = value
    return armt.State.from_bytes(
        sf.seal(sf.with_payload(blocks, sf.MEMORY, payload.tobytes(), layer))
    )


def written(engine: armt.Engine) -> armt.Session:
    session = engine.session()
    session.step(np.arange(engine.segment_size) % engine.vocab_size)
    return session


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_poisoned_memory_is_an_error_that_changes_nothing(zoo: Zoo, value: float) -> None:
    engine = zoo.engine(VARIANT, threads=1)
    session = engine.session(state=poisoned(written(engine).state, 1, value))
    before = session.state.to_bytes()
    seen = engine.stats()["nonfinite"]
    ids = np.arange(engine.segment_size)
    for call in (
        lambda: session.step(ids),
        lambda: session.feed(ids, logits="all"),
        lambda: session.feed([1], logits="last"),
        lambda: session.score(ids),
    ):
        with pytest.raises(armt.NonFiniteError, match="not finite"):
            call()
        assert session.state.to_bytes() == before
    assert engine.stats()["nonfinite"] > seen


def test_the_message_names_segment_and_layer(zoo: Zoo) -> None:
    engine = zoo.engine(VARIANT, threads=1)
    session = engine.session(state=poisoned(written(engine).state, 1, np.nan))
    ids = np.arange(engine.segment_size)
    with pytest.raises(FloatingPointError, match=r"segment 1, layer 1 and above, statistics"):
        session.step(ids, logits="none")
    with pytest.raises(FloatingPointError, match=r"segments 1 \.\. 3, layer 1"):
        session.feed(np.tile(ids, 4)[: 3 * engine.segment_size + 1])


def test_drawing_from_poisoned_logits_draws_nothing(zoo: Zoo) -> None:
    engine = zoo.engine(VARIANT, threads=1)
    session = engine.session(state=poisoned(written(engine).state, 0, np.nan), seed=3)
    session.feed([1])  # open: nothing is written, no logits are asked for
    before = session.state.to_bytes()
    for temperature in (0.0, 0.7):
        with pytest.raises(armt.NonFiniteError):
            next(session.generate(1, temperature=temperature))
        assert session.state.to_bytes() == before
    with pytest.raises(armt.NonFiniteError):
        _ = session.logits


def test_ignored_values_are_counted_and_handed_out(tmp_path: Path) -> None:
    random_model(base="llama", dialect="modern").save(tmp_path)
    engine = armt.Engine.from_pretrained(tmp_path, device="cpu", threads=1, on_nonfinite="ignore")
    healthy = written(engine)
    assert engine.stats()["nonfinite"] == 0
    session = engine.session(state=poisoned(healthy.state, 0, np.nan))
    logits = session.step([1, 2]).logits
    assert logits is not None and np.isnan(logits).all()
    assert engine.stats()["nonfinite"] >= engine.vocab_size
    assert np.isfinite(healthy.logits).all()


@pytest.mark.parametrize("value", ["warn", "", None, 1])
def test_other_actions_are_refused(tmp_path: Path, value: Any) -> None:
    random_model().save(tmp_path)
    with pytest.raises((armt.InvalidArgument, TypeError)):
        armt.Engine.from_pretrained(tmp_path, device="cpu", on_nonfinite=value)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_no_false_alarm(zoo: Zoo, variant: Any) -> None:
    """Fresh blocks are full of NaNs here: only what was written may be looked at."""
    from armt._core import testing

    engine = zoo.engine(variant, threads=1)
    seen = engine.stats()["nonfinite"]
    testing.set_poison(engine._core, True)
    try:
        session = engine.session()
        session.feed(np.arange(5 * engine.segment_size) % engine.vocab_size, logits="all")
        list(session.generate(engine.segment_size + 1))
    finally:
        testing.set_poison(engine._core, False)
    assert engine.stats()["nonfinite"] == seen
