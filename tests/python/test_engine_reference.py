"""The engine against the float64 reference: random models of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from reference import forward, generate
from reference.random_models import RandomModel
from reference.sensitivity import rounding_sensitivity
from tolerances import Tolerance, assert_close, measured_bound
from variants import VARIANTS, Variant, Zoo


def limits(model: RandomModel, ids: Any, mask: Any = None) -> tuple[Tolerance, Tolerance]:
    """Of logits (absolute) and of the state (relative): what rounding does to this very model."""
    moved = rounding_sensitivity(model.config, model.weights, ids, mask)
    return (
        Tolerance(absolute=measured_bound(moved.logits_absolute)),
        Tolerance(relative=measured_bound(moved.memory_relative)),
    )


VARIANT = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)


@VARIANT
@pytest.mark.parametrize("weights", ["F32", "BF16"])
def test_forward(zoo: Zoo, variant: Variant, weights: str) -> None:
    model = zoo.model(variant, weights)
    engine = zoo.engine(variant, weights=weights, threads=2)
    assert engine.dtype == ("float32" if weights == "F32" else "bfloat16")
    ids = model.tokens((2, 31), seed=3)
    logits, state = forward(model.reference(), ids)
    out = engine.forward(ids)
    assert out.logits is not None
    limit, memory = limits(model, ids)
    assert_close("logits", out.logits, logits, limit)
    for row, found in enumerate(out.states):
        if state.memory_state is not None:
            assert_close("memory tokens", found.memory_tokens, state.memory_state[row], memory)
            continue
        for layer, expected in enumerate(state.layers):
            assert expected.memory is not None
            a, z = found.memory(layer)
            assert_close(f"A of layer {layer}", a, expected.memory.A[row], memory)
            assert (z is None) == (expected.memory.z is None)
            if z is not None and expected.memory.z is not None:
                assert_close(f"z of layer {layer}", z, expected.memory.z[row], memory)


@VARIANT
def test_padding(zoo: Zoo, variant: Variant) -> None:
    model = zoo.model(variant)
    ids = model.tokens((3, 24), seed=5)
    mask = np.ones_like(ids)
    mask[0, 17:] = 0
    mask[1, :10] = 0
    logits, state = forward(model.reference(), ids, mask)
    out = zoo.engine(variant).forward(ids, mask)
    assert out.logits is not None
    limit, memory = limits(model, ids, mask)
    assert_close("logits", out.logits, logits, limit, where=mask != 0)
    if state.memory_state is None:
        for row, found in enumerate(out.states):
            for layer, expected in enumerate(state.layers):
                assert expected.memory is not None
                a, _ = found.memory(layer)
                assert_close(f"A of layer {layer}", a, expected.memory.A[row], memory)


@VARIANT
@pytest.mark.parametrize("tokens", [5, 14, 18])
def test_greedy_generation(zoo: Zoo, variant: Variant, tokens: int) -> None:
    """Long enough to outgrow the window; compared where the reference's choice is clear."""
    model = zoo.model(variant)
    prompt = model.tokens((2, tokens), seed=7)
    expected, step_logits = generate(model.reference(), prompt, 9)
    found = zoo.engine(variant).generate(prompt, max_new_tokens=9)[:, tokens:]
    two_best = np.sort(step_logits, axis=-1)[..., -2:]
    clear = np.logical_and.accumulate(two_best[..., 1] - two_best[..., 0] > 1e-3, axis=1)
    assert clear.any()
    np.testing.assert_array_equal(found[clear], expected[clear])


@pytest.mark.parametrize("alignment", ["right", "center"])
def test_alignment(zoo: Zoo, alignment: str) -> None:
    variant = Variant(f"aligned-{alignment}", armt_options={"segment_alignment": alignment})
    model = zoo.model(variant)
    ids = model.tokens((2, 30), seed=2)
    logits, _ = forward(model.reference(), ids)
    out = zoo.engine(variant).forward(ids)
    assert out.logits is not None
    assert_close("logits", out.logits, logits, limits(model, ids)[0])
