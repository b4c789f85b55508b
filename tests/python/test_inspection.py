"""What a state tells of its memory, against the float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import armt
from armt.inspection import inspect, key_features, nearest, recall
from reference import forward
from reference.features import feature_map
from reference.memory import LayerMemory, MemoryMaps, MemoryRule, read
from reference.model import State
from reference.random_models import RandomModel
from reference.sensitivity import rounding_sensitivity
from tolerances import Tolerance, assert_close, measured_bound
from variants import VARIANTS, Variant, Zoo

ASSOCIATIVE = [variant for variant in VARIANTS if variant.dialect != "rmt"]
VARIANT = pytest.mark.parametrize("variant", ASSOCIATIVE, ids=lambda v: v.name)
SEGMENTS = 3


def stream_of(model: RandomModel, segments: int) -> Any:
    return model.tokens((1, segments * model.config["armt"]["segment_size"]), seed=15)


def limit_of(model: RandomModel) -> Tolerance:
    """What rounding does to this model's memory."""
    moved = rounding_sensitivity(model.config, model.weights, stream_of(model, SEGMENTS))
    bound = measured_bound(moved.memory_relative)
    return Tolerance(absolute=bound, relative=bound)


def read_both(
    zoo: Zoo, variant: Variant, segments: int = SEGMENTS
) -> tuple[RandomModel, armt.State, State, dict[str, Any]]:
    """The engine's and the reference's state after some segments, and the latter's trace."""
    model = zoo.model(variant)
    session = zoo.engine(variant).session()
    ids = stream_of(model, segments)
    session.feed(ids[0])
    session.close_segment()
    trace: dict[str, Any] = {}
    _, expected = forward(model.reference(), ids, trace=trace)
    return model, session.state, expected, trace


@VARIANT
def test_figures_of_every_layer(zoo: Zoo, variant: Variant) -> None:
    model, state, expected, trace = read_both(zoo, variant)
    limit = limit_of(model)
    rule = model.reference().settings.rule()
    for found, layer in zip(inspect(state), expected.layers, strict=True):
        assert layer.memory is not None
        assert found.written
        a = layer.memory.A[0]
        assert_close("norm", np.array(found.norm), np.linalg.norm(a), limit)
        heads = np.linalg.norm(a, axis=(1, 2))
        assert_close("head_norms", np.array(found.head_norms), heads, limit)
        if layer.memory.z is None:
            assert found.z_mass is None
        else:
            assert_close("z_mass", np.array(found.z_mass), layer.memory.z[0].sum(), limit)
        at = f"segment{SEGMENTS - 1}_layer{found.layer}_"
        assert_close("beta", np.array(found.beta), trace[at + "beta"].mean(), limit)
        if not (rule.use_denom and rule.correction):
            assert found.gamma is None and found.overwritten is None
            continue
        gamma = trace[at + "gamma"]
        figures = np.array([gamma.mean(), gamma.min(), gamma.max()])
        assert_close("gamma", np.array(found.gamma), figures, limit)
        assert_close("overwritten", np.array(found.overwritten), 1 - gamma.mean(), limit)
    assert [found.layer for found in inspect(state)] == list(range(state.layers))


def test_gamma_tells_old_from_new(zoo: Zoo) -> None:
    """All of a first write is new; the same segment again goes over itself."""
    variant = next(v for v in VARIANTS if v.name == "modern-llama")
    session = zoo.engine(variant).session()
    session.step([1, 2, 3, 4, 5, 6, 7])
    first = [layer.overwritten for layer in inspect(session.state)]
    assert first == [0.0] * len(first)
    session.step([1, 2, 3, 4, 5, 6, 7])
    assert all(layer.overwritten > 0.1 for layer in inspect(session.state) if layer.overwritten)
    assert any(layer.overwritten for layer in inspect(session.state))


@VARIANT
def test_an_empty_memory(zoo: Zoo, variant: Variant) -> None:
    state = zoo.engine(variant).session().state
    for layer in inspect(state):
        assert not layer.written
        assert (layer.norm, layer.gamma, layer.beta, layer.overwritten) == (0.0, None, None, None)
        assert layer.z_mass in (0.0, None)
    width = state.facts["memory.d_mem"]
    found = recall(state, 0, np.ones(width))
    assert not found.value.any()
    assert found.strength is None or not found.strength.any()


@VARIANT
def test_features_and_recall(zoo: Zoo, variant: Variant) -> None:
    """Any key [d], against the reference's read of the same memory."""
    model, state, _, _ = read_both(zoo, variant)
    rule: MemoryRule = model.reference().settings.rule()
    width = int(state.facts["memory.d_mem"])
    rng = np.random.default_rng(1)
    for layer in range(state.layers):
        a, z = state.memory(layer)
        memory = LayerMemory(
            a[None].astype(float), None if z is None else z[None].astype(float), True
        )
        key = rng.standard_normal(width)
        phi = feature_map(key.reshape(rule.heads, -1), rolls=rule.rolls)
        if rule.normalise:
            phi /= np.linalg.norm(phi, axis=1, keepdims=True)
        assert_close("phi", key_features(state, key), phi, Tolerance(relative=1e-6))
        straight = MemoryMaps(np.eye(width), *(np.zeros((1, 1)) for _ in range(4)))
        expected = read(rule, straight, memory, key[None, None])[0, 0]
        found = recall(state, layer, key)
        assert_close("value", found.value.ravel(), expected, Tolerance(relative=5e-6))
        if z is not None:
            mass = np.einsum("hf,hf->h", z.astype(float), phi)
            assert found.strength is not None
            assert_close("strength", found.strength, mass, Tolerance(relative=5e-6))


@pytest.mark.parametrize("dialect", ["paper", "modern"])
def test_a_stored_value_is_found_under_its_key(zoo: Zoo, dialect: str) -> None:
    """One memory token, one write: its key recalls its gated value, and nothing else does."""
    variant = Variant(f"one-token-{dialect}", "llama", dialect, {}, {"num_mem_tokens": 1})
    model, state, _, trace = read_both(zoo, variant, segments=1)
    reference = model.reference()
    rng = np.random.default_rng(2)
    for layer in range(state.layers):
        at = f"segment0_layer{layer}_"
        y = trace[at + "out"][0, -1]
        value = (trace[at + "beta"] * trace[at + "v"])[0, :, 0].ravel()
        found = recall(state, layer, reference.maps[layer].key @ y)
        assert_close("value", found.value.ravel(), value, Tolerance(relative=1e-3))
        candidates = rng.standard_normal((9, value.size)) * np.linalg.norm(value)
        candidates[4] = value
        which, cosine = nearest(found, candidates)
        assert which == 4
        assert cosine > 0.999
        other = recall(state, layer, -(reference.maps[layer].key @ y))
        assert found.strength is not None and other.strength is not None
        assert other.strength.sum() < 0.5 * found.strength.sum()


def test_rmt_has_memory_tokens_instead(zoo: Zoo) -> None:
    variant = next(v for v in VARIANTS if v.dialect == "rmt")
    model, state, expected, _ = read_both(zoo, variant)
    limit = limit_of(model)
    assert expected.memory_state is not None
    assert_close("memory tokens", state.memory_tokens, expected.memory_state[0], limit)
    assert inspect(state) == []
    with pytest.raises(armt.InvalidArgument, match="no associative memory"):
        key_features(state, [1.0])
    with pytest.raises(armt.InvalidArgument, match="no associative memory"):
        state.recall(0, np.ones((1, 1), np.float32))


def test_impossible_questions(zoo: Zoo) -> None:
    state = zoo.engine(VARIANTS[0]).session().state
    width = state.facts["memory.d_mem"]
    for layer in (-1, state.layers):
        with pytest.raises(armt.InvalidArgument, match="layer: found"):
            recall(state, layer, np.ones(width))
    for key in (np.ones(width + 1), np.ones((1, width)), 3.0):
        with pytest.raises(armt.InvalidArgument, match="key: found shape"):
            recall(state, 0, key)
    found = recall(state, 0, np.ones(width))
    for candidates in (np.ones((2, 3)), np.ones(24), np.ones((0, 24))):
        with pytest.raises(armt.InvalidArgument, match="candidates: found shape"):
            nearest(found, candidates)


def test_engine_stats(zoo: Zoo) -> None:
    zoo.model(VARIANTS[0])
    engine = armt.Engine.from_pretrained(zoo.path(VARIANTS[0]), device="cpu")
    empty = engine.stats()
    assert (empty["tokens"], empty["segments"], empty["calls"], empty["seconds"]) == (0, 0, 0, 0.0)
    assert empty["call_seconds"] == {"last": 0.0, "p50": 0.0, "p99": 0.0, "greatest": 0.0}
    assert empty["state_bytes"] == 0
    assert empty["weight_bytes"] > 0

    size = engine.segment_size
    session = engine.session()
    session.feed([1] * (2 * size + 1))
    for _ in range(5):
        session.step([1] * size)
    stats = engine.stats()
    assert (stats["tokens"], stats["segments"], stats["calls"]) == (7 * size + 1, 8, 6)
    times = stats["call_seconds"]
    assert 0 < times["p50"] <= times["p99"] <= times["greatest"] <= stats["seconds"]
    assert 0 < times["last"] <= times["greatest"]

    held = stats["state_bytes"]
    assert held == session.state.nbytes
    fork = session.fork()
    assert engine.stats()["state_bytes"] == held  # shared
    fork.step([2] * size)
    assert held < engine.stats()["state_bytes"] <= 2 * held
    fork.close()
    session.close()
    assert engine.stats()["state_bytes"] == 0
    for _ in range(1100):  # more calls than are kept
        engine.step([1])
    stats = engine.stats()
    assert stats["calls"] == 1107
    assert stats["call_seconds"]["greatest"] <= stats["seconds"]
