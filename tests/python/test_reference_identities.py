"""Identities that the float64 reference must satisfy, on random models of every kind."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest

from reference import (
    empty_state,
    forward,
    generate,
    model_from_tensors,
    run_segment,
    smallest_margin,
    start_generation,
    step,
)
from reference.arrays import Array
from reference.memory import DENOMINATOR_EPSILON
from reference.model import (
    LayerState,
    Model,
    Plan,
    after_segment,
    plan_segment,
    run_cell,
    segment_bounds,
)
from reference.random_models import BASES, RandomModel, random_model
from reference.settings import Settings
from tolerances import EXACT, assert_close, tolerance

LAYER_COUNT = {base: "n_layer" if base == "gpt2" else "num_hidden_layers" for base in BASES}
LIMIT = tolerance("identity", "float64")


class Kind(NamedTuple):
    base: str
    dialect: str
    armt: dict[str, Any]

    def make(self, **options: Any) -> RandomModel:
        return random_model(base=self.base, dialect=self.dialect, armt_options=self.armt, **options)


KINDS = [
    Kind("gpt2", "paper", {}),
    Kind("gpt2", "paper", {"wrap_pos": True}),
    Kind("gpt2", "paper", {"wrap_pos": True, "sliding_window": True}),
    Kind("gpt2", "modern", {"wrap_pos": True, "sliding_window": True}),
    Kind("llama", "paper", {"correction": False, "segment_alignment": "right"}),
    Kind("llama", "paper", {"sliding_window": True}),
    Kind("llama", "modern", {"n_heads": 2, "gating": True, "use_sink": True}),
    Kind("llama", "modern", {"n_heads": 2, "sliding_window": True, "use_sink": True}),
    Kind("qwen2", "modern", {"use_denom": False}),
    Kind("qwen3", "modern", {"n_heads": 4, "segment_alignment": "center"}),
    Kind("mistral", "modern", {"n_heads": 4, "sliding_window": True}),
    Kind("llama", "modern-inner", {"use_sink": True, "n_heads": 2}),
    Kind("llama", "modern-inner", {"use_sink": True, "sliding_window": True}),
    Kind("gpt_neox", "paper", {}),
    Kind("gpt_neox", "modern", {"sliding_window": True}),
    Kind("gpt2", "rmt", {"wrap_pos": True}),
    Kind("llama", "rmt", {"sliding_window": True}),
]
IDS = [f"{k.dialect}-{k.base}-" + "-".join(f"{n}={v}" for n, v in k.armt.items()) for k in KINDS]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=IDS)
with_memory = pytest.mark.parametrize(
    "kind", [k for k in KINDS if k.dialect != "rmt"], ids=[i for i in IDS if "rmt" not in i]
)
# The inner loop generates by recomputing, so only the others have a decoding state.
outer_loop = pytest.mark.parametrize(
    "kind",
    [k for k in KINDS if k.dialect != "modern-inner"],
    ids=[i for i in IDS if "inner" not in i],
)


def assert_same_state(found: Any, expected: Any, limit: Any = LIMIT) -> None:
    for name in ("A", "z", "memory_state"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(name, a, b, limit)


def run_by_diagonals(model: Model, ids: Any) -> tuple[Array, list[LayerState]]:
    """Cells (segment, layer) in the order of segment + layer, the later segment first."""
    bounds = segment_bounds(model.settings, ids.shape[1])
    real = np.ones(ids.shape, dtype=bool)
    plans: list[Plan] = []
    state = empty_state(model, batch=len(ids))
    for start, end in bounds:
        plan = plan_segment(model, state, ids[:, start:end], real[:, start:end])
        plans.append(plan)
        kept = plan.real if plan.keeps_cache else plan.real[:, :0]
        state = replace(state, cached_real=kept, rows_before=state.rows_before + plan.shape.rows)
    rows = [plan.rows for plan in plans]
    layers = list(state.layers)
    for diagonal in range(len(plans) + len(layers) - 1):
        for i in reversed(range(len(plans))):
            index = diagonal - i
            if 0 <= index < len(layers):
                rows[i], layers[index] = run_cell(model, plans[i], index, rows[i], layers[index])
    logits = [
        after_segment(model, state, plan, layers, x)[0] for plan, x in zip(plans, rows, strict=True)
    ]
    return np.concatenate(logits, axis=1), layers


@with_memory
def test_diagonals_equal_segment_after_segment(kind: Kind) -> None:
    spec = kind.make(seed=1, base_options={LAYER_COUNT[kind.base]: 3})
    model, ids = spec.reference(), spec.tokens((2, 26))
    logits, state = forward(model, ids)
    found, layers = run_by_diagonals(model, ids)
    assert_close("logits", found, logits, EXACT)
    assert_same_state(replace(state, layers=tuple(layers)), state, EXACT)


@every_kind
def test_continuing_a_saved_state(kind: Kind) -> None:
    """The state after two segments, in a freshly built model, goes on bit for bit."""
    spec = kind.make(seed=2)
    ids = spec.tokens((2, 26))
    lengths = [7, 6, 7, 6]
    logits, state = forward(spec.reference(), ids, segment_lengths=lengths)
    first, saved = forward(spec.reference(), ids[:, :13], segment_lengths=lengths[:2])
    restored = copy.deepcopy(saved)
    second, final = forward(
        spec.reference(), ids[:, 13:], state=restored, segment_lengths=lengths[2:]
    )
    assert_close("logits", np.concatenate([first, second], axis=1), logits, EXACT)
    assert_same_state(final, state, EXACT)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.armt.get("sliding_window")])
def test_cache_belongs_to_the_state(kind: Kind) -> None:
    """Without the cached keys and values the continuation is another one."""
    spec = kind.make(seed=2)
    model, ids = spec.reference(), spec.tokens((2, 21))
    _, saved = forward(model, ids[:, :14])
    with_cache, _ = forward(model, ids[:, 14:], state=saved)
    bare = replace(
        saved,
        layers=tuple(replace(layer, cache=None) for layer in saved.layers),
        cached_real=saved.cached_real[:, :0],
    )
    without_cache, _ = forward(model, ids[:, 14:], state=bare)
    assert np.abs(with_cache - without_cache).max() > 0.1


@every_kind
def test_batch_rows_are_independent(kind: Kind) -> None:
    spec = kind.make(seed=3)
    model, ids = spec.reference(), spec.tokens((3, 17))
    logits, state = forward(model, ids)
    swapped, swapped_state = forward(model, ids[[2, 0, 1]])
    assert_close("logits", swapped, logits[[2, 0, 1]], LIMIT)
    alone, _ = forward(model, ids[1:2])
    assert_close("logits", alone, logits[1:2], LIMIT)
    if state.A is not None and swapped_state.A is not None:
        assert_close("A", swapped_state.A, state.A[:, [2, 0, 1]], LIMIT)


@every_kind
def test_later_tokens_change_nothing_before_them(kind: Kind) -> None:
    spec = kind.make(seed=4)
    model, ids = spec.reference(), spec.tokens((2, 20))
    lengths = [7, 7, 6]
    logits, _ = forward(model, ids, segment_lengths=lengths)
    for cut_lengths in ([7], [7, 7], [7, 4], [7, 7, 1]):
        total = sum(cut_lengths)
        part, _ = forward(model, ids[:, :total], segment_lengths=cut_lengths)
        assert_close(f"logits of {total}", part, logits[:, :total], LIMIT)


@outer_loop
def test_last_segment_without_memory_rows(kind: Kind) -> None:
    """The same logits at the last token; the memory stays as it was before that segment."""
    if kind.dialect != "modern" or kind.armt.get("wrap_pos"):
        # Generation of the paper dialect ignores the window; with wrap_pos it is undefined.
        kind = kind._replace(armt=kind.armt | {"sliding_window": False})
    spec = kind.make(seed=5)
    model, ids = spec.reference(), spec.tokens((2, 19))
    logits, _ = forward(model, ids)
    decoding = start_generation(model, ids)
    assert_close("logits", decoding.logits, logits[:, -1], LIMIT)
    last = segment_bounds(model.settings, ids.shape[1])[-1][0]
    _, before = forward(
        model,
        ids[:, :last],
        segment_lengths=[e - s for s, e in segment_bounds(model.settings, ids.shape[1])[:-1]],
    )
    decoding = step(decoding, np.array([1, 2]))
    assert_same_state(decoding.state, before, EXACT)


@outer_loop
def test_cached_decoding_equals_recomputing(kind: Kind) -> None:
    """Plain generation: feeding tokens one by one = the last segment made longer."""
    if kind.armt.get("sliding_window"):
        kind = kind._replace(armt=kind.armt | {"sliding_window": False})
    spec = kind.make(seed=6)
    model, ids = spec.reference(), spec.tokens((2, 17))
    new_ids, step_logits = generate(model, ids, 6)
    longer = np.concatenate([ids, new_ids], axis=1)
    lengths = [end - start for start, end in segment_bounds(model.settings, ids.shape[1])]
    logits, _ = forward(model, longer, segment_lengths=[*lengths[:-1], lengths[-1] + 6])
    assert_close("step logits", step_logits, logits[:, -7:-1], LIMIT)
    assert smallest_margin(step_logits) > 0.0


def test_sliding_generation_cuts_its_cache() -> None:
    """W + s entries stay; the sink moves left through them and falls out."""
    kind = Kind("llama", "modern", {"sliding_window": True, "use_sink": True})
    spec = kind.make(seed=7, base_options={"num_hidden_layers": 1})
    model, ids = spec.reference(), spec.tokens((1, 18))  # segments 7, 7, 4: W = 7, T = 4
    decoding = start_generation(model, ids)
    (keys, values), W, T, s = decoding.caches[0], 7, 4, 1
    assert keys.shape[2] == values.shape[2] == W + s
    # the sink stands W - T entries from the left and is gone after W - T + 1 new tokens
    sink_key = keys[:, :, W - T]
    for _ in range(W - T + 1):
        assert (decoding.caches[0][0] == sink_key[:, :, None]).all(axis=(0, 1, 3)).any()
        decoding = step(decoding, np.array([3]))
    assert not (decoding.caches[0][0] == sink_key[:, :, None]).all(axis=(0, 1, 3)).any()
    assert decoding.next_position.tolist() == [W + s + T + (W - T + 1)]


@pytest.mark.parametrize("dialect", ["paper", "rmt"])
def test_generation_of_the_paper_dialect_ignores_the_window(dialect: str) -> None:
    window = random_model(base="llama", dialect=dialect, armt_options={"sliding_window": True})
    plain = random_model(base="llama", dialect=dialect)
    ids = plain.tokens((2, 18))
    found, expected = (generate(spec.reference(), ids, 3)[1] for spec in (window, plain))
    assert_close("step logits", found, expected, EXACT)


def test_undefined_generation_is_refused() -> None:
    ids = np.ones((1, 16), dtype=np.int64)
    mask = np.ones_like(ids)
    mask[:, 8] = 0
    options = {"sliding_window": True}
    spec = random_model(base="gpt2", dialect="modern", armt_options=options | {"wrap_pos": True})
    with pytest.raises(ValueError, match="wrap_pos"):
        generate(spec.reference(), ids, 2)
    model = random_model(base="llama", dialect="modern", armt_options=options).reference()
    with pytest.raises(ValueError, match="padding"):
        generate(model, ids, 2, attention_mask=mask)
    with pytest.raises(ValueError, match="right-padded"):
        generate(model, ids, 2, attention_mask=np.roll(mask, 7, axis=1))


def test_generation_stops_when_all_rows_end_together() -> None:
    spec = random_model()
    model, ids = spec.reference(), spec.tokens((1, 10))
    new_ids, step_logits = generate(model, ids, 6)
    end = int(new_ids[0, 2])
    first = int(np.argmax(new_ids[0] == end))
    stopped, stopped_logits = generate(model, ids, 6, eos_token_id=end)
    np.testing.assert_array_equal(stopped, new_ids[:, : first + 1])
    assert_close("step logits", stopped_logits, step_logits[:, : first + 1], EXACT)


def test_modern_without_normalisation_is_the_paper_dialect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One head, correction off, same weights; only the normalisation is taken away."""
    paper = random_model(base="gpt2", dialect="paper", armt_options={"correction": False})
    ids = paper.tokens((2, 24))
    logits, _ = forward(paper.reference(), ids)
    model = model_from_tensors(paper.config | {"dialect": "modern"}, paper.weights)
    normalised, _ = forward(model, ids)
    assert np.abs(normalised - logits).max() > 0.1
    real_rule = Settings.rule
    monkeypatch.setattr(Settings, "rule", lambda self: replace(real_rule(self), normalise=False))
    found, _ = forward(model, ids)
    assert_close("logits", found, logits, EXACT)


@with_memory
def test_bounds_of_the_state(kind: Kind) -> None:
    """z >= 0 and never decreases, 0 <= gamma <= 1, and the denominator is at least 1e-5."""
    spec = kind.make(seed=8)
    trace: dict[str, Array] = {}
    model = spec.reference()
    forward(model, spec.tokens((2, 35)), trace=trace)
    gammas = [array for name, array in trace.items() if name.endswith("gamma")]
    sums = [n for n in trace if n.endswith("_z")]
    assert bool(gammas) == bool(sums) == model.settings.use_denom
    for gamma in gammas:
        assert ((gamma >= 0) & (gamma <= 1)).all()
    for index in range(len(model.maps)):
        zs = [trace[n] for n in sums if f"layer{index}_" in n]
        for before, after in pairwise(zs):
            assert (after >= before).all()
        for s, z in enumerate(zs[:-1]):
            phi = trace[f"segment{s + 1}_layer{index}_phi_k"]
            assert (np.einsum("bhf,bhrf->bhr", z, phi) + DENOMINATOR_EPSILON >= 1e-5).all()


def test_first_write_has_gamma_one() -> None:
    """A flag, not the formula on a zero state."""
    spec = random_model()
    trace: dict[str, Array] = {}
    forward(spec.reference(), spec.tokens((1, 14)), trace=trace)
    assert (trace["segment0_layer0_gamma"] == 1.0).all()
    assert not (trace["segment1_layer0_gamma"] == 1.0).all()


@every_kind
def test_right_padding_leaves_real_logits_alone(kind: Kind) -> None:
    """Within the last segment: the same logits as the row without its padding."""
    spec = kind.make(seed=9)
    if kind.armt.get("segment_alignment", "left") != "left":
        spec = kind._replace(armt=kind.armt | {"segment_alignment": "left"}).make(seed=9)
    model, ids = spec.reference(), spec.tokens((1, 21))
    mask = np.ones_like(ids)
    mask[:, 18:] = 0
    padded, _ = forward(model, ids, mask)
    alone, _ = forward(model, ids[:, :18])
    assert_close("logits", padded[:, :18], alone, LIMIT)


def test_segment_of_padding_still_writes() -> None:
    spec = random_model(base="llama", dialect="modern")
    model, ids = spec.reference(), spec.tokens((1, 14))
    mask = np.ones_like(ids)
    mask[:, 7:] = 0
    _, padded = forward(model, ids, mask)
    _, alone = forward(model, ids[:, :7])
    assert padded.A is not None and alone.A is not None
    assert np.abs(padded.A - alone.A).max() > 1e-3


def test_left_padding_of_a_generation_prompt() -> None:
    """Padding does not count as a position; with one segment the padding can be left off."""
    for base in ("gpt2", "llama", "gpt_neox"):
        spec = random_model(base=base, armt_options={"segment_size": 12})
        model, ids = spec.reference(), spec.tokens((1, 9))
        mask = np.ones_like(ids)
        mask[:, :3] = 0
        padded_ids, padded = generate(model, ids, 4, attention_mask=mask)
        alone_ids, alone = generate(model, ids[:, 3:], 4)
        np.testing.assert_array_equal(padded_ids, alone_ids)
        assert_close(f"{base} step logits", padded, alone, LIMIT)


@with_memory
def test_zero_values_leave_no_trace_but_z(kind: Kind) -> None:
    """W_mv = 0: A stays 0 and logits are those of a run that resets before every segment."""
    spec = kind.make(seed=10, memory_gain=0.0)
    model, ids = spec.reference(), spec.tokens((2, 14))
    logits, state = forward(model, ids)
    assert state.A is not None
    assert_close("A", state.A, np.zeros_like(state.A), EXACT)
    if state.z is not None:
        assert (state.z > 0).any()
    if not kind.armt.get("sliding_window"):
        real = np.ones((2, 7), dtype=bool)
        segments = [
            run_segment(model, empty_state(model, batch=2), ids[:, i : i + 7], real)[0]
            for i in (0, 7)
        ]
        assert_close("logits", logits, np.concatenate(segments, axis=1), LIMIT)


@with_memory
def test_random_models_use_their_memory(kind: Kind) -> None:
    """Otherwise the models would be useless for testing a memory."""
    ids = kind.make().tokens((2, 26))
    for seed in range(3):
        logits, _ = forward(kind.make(seed=seed).reference(), ids)
        without, _ = forward(kind.make(seed=seed, memory_gain=0.0).reference(), ids)
        assert np.isfinite(logits).all()
        assert np.abs(logits - without).max() > 0.5
        assert np.abs(logits[:, :7] - without[:, :7]).max() < 1e-12 or kind.armt.get(
            "segment_alignment"
        )
