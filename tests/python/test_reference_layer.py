"""Identities of single pieces of the float64 reference: feature map, read, write, rotation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from reference.decoder import rotary_frequencies, rotate
from reference.features import feature_map
from reference.memory import MemoryMaps, MemoryRule, empty_memory, read, write
from tolerances import EXACT, assert_close, tolerance

LIMIT = tolerance("identity", "float64")


def test_feature_map_properties() -> None:
    x = np.random.default_rng(0).normal(size=(50, 5))
    phi = feature_map(x)
    assert phi.shape == (50, 30)
    assert (phi >= 0).all()
    assert_close("phi(3x)", feature_map(3.0 * x), 9.0 * phi, LIMIT)
    assert_close("phi(one-hot)", feature_map(-4.0 * np.eye(5)), np.zeros((5, 30)), EXACT)


def test_feature_map_example() -> None:
    """The worked example of the mathematics."""
    expected = [3, 2, 0, 0, 0, 0] + [0, 6, 0, 0, 0, 0] + [0] * 6
    assert feature_map(np.array([1.0, 2.0, -3.0])).tolist() == expected


def random_layer(rule: MemoryRule, *, d: int, width: int, seed: int) -> MemoryMaps:
    rng = np.random.default_rng(seed)
    return MemoryMaps(
        query=rng.normal(size=(d, width)) / 3,
        key=rng.normal(size=(d, width)) / 3,
        value=rng.normal(size=(width, width)) / 3,
        gate=rng.normal(size=(rule.heads, width)) / 3,
        gate_bias=rng.normal(size=rule.heads),
    )


RULES = {
    "paper": MemoryRule(),
    "paper-no-correction": MemoryRule(correction=False),
    "modern": MemoryRule(heads=2, normalise=True, gamma_epsilon=0.0),
    "modern-no-denominator": MemoryRule(
        heads=2, normalise=True, gamma_epsilon=0.0, use_denom=False
    ),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@every_rule
def test_zero_state_reads_zero(rule: MemoryRule) -> None:
    maps = random_layer(rule, d=6, width=10, seed=0)
    x = np.random.default_rng(1).normal(size=(2, 5, 10))
    value = read(rule, maps, empty_memory(rule, maps, batch=2), x)
    assert_close("read", value, np.zeros_like(x), EXACT)


@every_rule
def test_write_ignores_the_order_of_memory_tokens(rule: MemoryRule) -> None:
    maps = random_layer(rule, d=6, width=10, seed=0)
    rng = np.random.default_rng(1)
    memory, _ = write(rule, maps, empty_memory(rule, maps, batch=2), rng.normal(size=(2, 4, 10)))
    y = rng.normal(size=(2, 4, 10))
    one, _ = write(rule, maps, memory, y)
    other, _ = write(rule, maps, memory, y[:, [3, 1, 0, 2]])
    assert_close("A", other.A, one.A, LIMIT)
    if one.z is not None and other.z is not None:
        assert_close("z", other.z, one.z, LIMIT)
    # Writing them one after another is something else.
    halves, _ = write(rule, maps, memory, y[:, :2])
    halves, _ = write(rule, maps, halves, y[:, 2:])
    assert np.abs(halves.A - one.A).max() > 1e-3


@every_rule
def test_heads_are_separate_memories(rule: MemoryRule) -> None:
    """h heads = h one-head memories on the slices of query, key, value and gate."""
    rule = replace(rule, heads=2)
    d, width, rng = 6, 10, np.random.default_rng(2)
    maps = random_layer(rule, d=d, width=width, seed=3)
    together = empty_memory(rule, maps, batch=2)
    single = replace(rule, heads=1)
    parts = [
        MemoryMaps(
            query=maps.query[h * 3 : h * 3 + 3],
            key=maps.key[h * 3 : h * 3 + 3],
            value=maps.value[h * 5 : h * 5 + 5],
            gate=maps.gate[h : h + 1],
            gate_bias=maps.gate_bias[h : h + 1],
        )
        for h in range(2)
    ]
    # One head here has fewer values than the rows are wide, so its shapes are cut by hand.
    separate = [
        replace(empty_memory(single, part, batch=2), A=np.zeros((2, 1, 18, 5))) for part in parts
    ]
    for _ in range(3):
        y = rng.normal(size=(2, 4, width))
        together, _ = write(rule, maps, together, y)
        separate = [write(single, p, m, y)[0] for p, m in zip(parts, separate, strict=True)]
    x = rng.normal(size=(2, 7, width))
    values = [read(single, p, m, x) for p, m in zip(parts, separate, strict=True)]
    assert_close("read", read(rule, maps, together, x), np.concatenate(values, axis=-1), LIMIT)
    assert_close("A", together.A, np.concatenate([m.A for m in separate], axis=1), LIMIT)


def test_zero_key_gives_gamma_zero() -> None:
    """The modern dialect divides by ||k||^2 = 0: infinity, then clipped; never not-a-number."""
    rule = RULES["modern"]
    maps = random_layer(rule, d=6, width=10, seed=0)
    y = np.random.default_rng(1).normal(size=(1, 3, 10))
    memory, _ = write(rule, maps, empty_memory(rule, maps, batch=1), y)
    memory, trace = write(rule, maps, memory, np.zeros((1, 3, 10)))
    assert trace.gamma is not None
    assert (trace.gamma == 0.0).all()
    assert np.isfinite(memory.A).all()


def test_linear_rope_scaling_stretches_positions() -> None:
    plain = rotary_frequencies(8, theta=10000.0, scaling=None)
    linear = rotary_frequencies(8, theta=10000.0, scaling={"rope_type": "linear", "factor": 4.0})
    x = np.random.default_rng(0).normal(size=(1, 2, 5, 10))
    positions = np.arange(5)[None]
    found = rotate(x, 4 * positions, linear)
    assert_close("rotated", found, rotate(x, positions, plain), LIMIT)
    assert_close("unrotated rest", found[..., 8:], x[..., 8:], EXACT)
