"""Draws of the compiled sampler against the plain one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import armt
from armt import _core
from reference.sampling import choose

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 40.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 60.0, "top_k": 7},
    {"temperature": 30.0, "top_k": 1000},
    {"temperature": 30.0, "top_p": 0.05},
    {"temperature": 30.0, "top_p": 0.5},
    {"temperature": 60.0, "top_p": 0.999},
    {"temperature": 20.0, "min_p": 0.2},
    {"temperature": 30.0, "top_k": 900, "top_p": 0.6, "min_p": 0.01},
    {"temperature": 60.0, "top_p": 0.9, "min_p": 0.3},
]


@pytest.fixture(scope="module")
def engine() -> armt.Engine:
    return armt.Engine.from_pretrained("demo", device="cpu", threads=1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_are_those_of_the_plain_sampler(
    engine: armt.Engine, settings: dict[str, Any]
) -> None:
    session = engine.session()
    drawn = set()
    for start in range(3):
        out = session.feed([5 + start, 9, 300], logits="last")
        assert out.logits is not None
        logits = out.logits.astype(np.float64)
        for seed in range(40):
            found = list(session.generate(1, write=False, seed=seed, **settings))
            assert found == [choose(logits, _core.uniform(seed, 0), **settings)], (start, seed)
            drawn.add(found[0])
    assert len(drawn) > 3 or settings["temperature"] < 2


def test_a_logprob_is_that_of_the_models_own_logits(engine: armt.Engine) -> None:
    session = engine.session()
    out = session.feed([5, 9, 300], logits="last")
    assert out.logits is not None
    logits = out.logits.astype(np.float64)
    expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    for seed in range(20):
        draws = session.generate(1, write=False, seed=seed, temperature=30.0)
        (token,) = draws
        assert draws.logprobs == pytest.approx([expected[token]], abs=1e-12)
