"""The CUDA backend: published numbers, the CPU engine beside it, sessions, errors.

    python -m pytest tests/python/test_cuda.py --conformance DIR

Skipped where no GPU can be used.
"""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

import armt
from armt import _core
from conformance import Case
from conftest import CaseReport
from reference.sensitivity import rounding_sensitivity
from tolerances import Tolerance, assert_close, measured_bound, tolerance, worst_difference
from variants import VARIANTS, Variant, Zoo

pytestmark = pytest.mark.skipif(_core.cuda_device_count() == 0, reason="no GPU can be used here")

VARIANT = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
SCHEDULE = pytest.mark.parametrize("schedule", ["sequential", "diagonal"])
HALVES = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])

# Widths that are not multiples of any tile; segments over several tiles of keys and rows.
_WIDE_LLAMA = {
    "hidden_size": 136,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 40,
}
_WIDE_GPT2 = {"n_embd": 192, "n_layer": 3, "n_head": 3, "n_positions": 512}
_LONG = {"segment_size": 150, "num_mem_tokens": 20, "d_mem": 40}
FEW = [
    Variant(
        "few-paper-gpt2",
        "gpt2",
        "paper",
        _WIDE_GPT2,
        {"segment_size": 150, "num_mem_tokens": 16, "d_mem": 64, "wrap_pos": True},
    ),
    Variant(
        "few-modern-llama",
        "llama",
        "modern",
        _WIDE_LLAMA | {"hidden_size": 160},
        {"segment_size": 150, "num_mem_tokens": 5, "d_mem": 64, "sliding_window": True},
    ),
]
WIDE = [
    Variant("wide-paper-gpt2", "gpt2", "paper", _WIDE_GPT2, _LONG | {"wrap_pos": True}),
    Variant("wide-paper-llama", "llama", "paper", _WIDE_LLAMA, _LONG),
    Variant(
        "wide-modern-llama",
        "llama",
        "modern",
        _WIDE_LLAMA,
        _LONG | {"n_heads": 4, "use_sink": True, "sliding_window": True},
    ),
    Variant("wide-modern-qwen3", "qwen3", "modern", _WIDE_LLAMA | {"head_dim": 128}, _LONG),
    Variant("wide-inner-llama", "llama", "modern-inner", _WIDE_LLAMA | {"head_dim": 16}, _LONG),
    # More tiles of keys than a kernel holds at once; heads for which Hopper GPUs have a kernel.
    Variant(
        "wide-far-llama",
        "llama",
        "modern",
        _WIDE_LLAMA | {"head_dim": 64},
        {"segment_size": 300, "num_mem_tokens": 20, "d_mem": 40, "sliding_window": True},
    ),
    Variant(
        "wide-far-qwen3",
        "qwen3",
        "modern",
        _WIDE_LLAMA | {"head_dim": 128},
        _LONG | {"sliding_window": True},
    ),
    # Segments so long that the memory is rounded before it is read; many memory tokens.
    Variant(
        "wide-long-llama",
        "llama",
        "modern",
        _WIDE_LLAMA | {"hidden_size": 160},
        {"segment_size": 300, "num_mem_tokens": 20, "d_mem": 40, "n_heads": 2},
    ),
    Variant(
        "wide-long-qwen3",
        "qwen3",
        "modern",
        _WIDE_LLAMA,
        {"segment_size": 300, "num_mem_tokens": 100, "d_mem": 40},
    ),
    Variant(
        "wide-rmt-llama",
        "llama",
        "rmt",
        _WIDE_LLAMA | {"head_dim": 160},
        {"segment_size": 150, "num_mem_tokens": 20},
    ),
    # Memories of the size for which reads and writes have kernels of their own.
    *FEW,
]
WIDE_VARIANT = pytest.mark.parametrize("variant", WIDE, ids=lambda v: v.name)


HALF_FACTOR = 10.0


def load(case: Case, **options: Any) -> armt.Engine:
    if case.name.endswith("pickle") or case.config["weights"].get("kind", "").startswith("pickled"):
        pytest.importorskip("torch", reason="pickled checkpoints need torch")
    options = {"dtype": "float32", "device": "cuda"} | options
    return armt.Engine.from_pretrained(case.folder, **options)


def on(
    device: str, zoo: Zoo, variant: Variant, *, weights: str = "F32", **options: Any
) -> armt.Engine:
    zoo.model(variant, weights)
    return armt.Engine.from_pretrained(zoo.path(variant, weights), device=device, **options)


def states_of(out: armt.ForwardOutput) -> dict[str, npt.NDArray[Any]]:
    """What the rows' streams hold after a forward call, stacked over batch and layers."""
    if out.states[0].memory_tokens is not None:
        return {"memory": np.stack([state.memory_tokens for state in out.states])}
    layers = range(out.states[0].layers)
    pairs = [[state.memory(layer) for state in out.states] for layer in layers]
    found = {"A": np.stack([np.stack([a for a, _ in row]) for row in pairs])}
    if pairs[0][0][1] is not None:
        found["z"] = np.stack([np.stack([z for _, z in row]) for row in pairs])
    return found


def relative(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return worst_difference(found, expected) / max(float(np.abs(expected).max()), 1e-30)


# ------------------------------------------------------------------ published numbers


@SCHEDULE
def test_published_forward(conformance_case: Case, schedule: str, case_report: CaseReport) -> None:
    case = conformance_case
    out = load(case, schedule=schedule).forward(case.input_ids, case.attention_mask)
    logits, real = case.expected("logits"), case.real
    assert logits is not None
    assert out.logits is not None
    found = states_of(out)
    names = {"A": "memory_A", "z": "memory_z", "memory": "memory_state"}
    pairs: dict[str, tuple[Any, Any]] = {"logits": (out.logits[real], logits[real])}
    for name, array in found.items():
        expected = case.expected(names[name])
        assert expected is not None
        pairs[name] = (array.reshape(expected.shape), expected)
    case_report(case.name, f"cuda {schedule}", {n: relative(*pair) for n, pair in pairs.items()})
    for name, (value, expected) in pairs.items():
        assert_close(name, value, expected, tolerance("cuda_conformance", "float32"))


@HALVES
def test_published_forward_in_half(
    conformance_case: Case, dtype: str, case_report: CaseReport
) -> None:
    """16-bit weights and activations; how far they may move a model is measured on that model.

    The CPU engine with bfloat16 weights and float32 arithmetic shows what rounding the weights
    alone does. Rounding the activations too may do a few times that; float16 keeps three bits more.
    """
    case = conformance_case
    logits, real = case.expected("logits"), case.real
    assert logits is not None
    out = load(case, dtype=dtype).forward(case.input_ids, case.attention_mask)
    weights_only = load(case, dtype="bfloat16", device="cpu").forward(
        case.input_ids, case.attention_mask
    )
    assert out.logits is not None
    assert weights_only.logits is not None
    found = relative(out.logits[real], logits[real])
    moved = relative(weights_only.logits[real], logits[real])
    case_report(case.name, f"cuda {dtype}", {"logits": found, "bf16 weights alone": moved})
    finer = 8.0 if dtype == "float16" else 1.0
    limit = tolerance("cuda_half", dtype).relative + HALF_FACTOR * moved / finer
    assert found <= limit, f"logits: {found:.3g} of the largest, at most {limit:.3g} expected"


def test_published_generation(generation_case: Case) -> None:
    case = generation_case
    prompt, expected = case.arrays["generate_prompt_ids"], case.arrays["generated_ids"]
    found = load(case).generate(prompt, max_new_tokens=expected.shape[1])
    np.testing.assert_array_equal(found[:, prompt.shape[1] :], expected)


# ------------------------------------------------------------------ beside the CPU engine


Limits: TypeAlias = tuple[Tolerance, Tolerance]  # of logits, of states


def fixed(dtype: str) -> Limits:
    limit = tolerance("cuda_engine", dtype)
    return limit, limit


def measured(zoo: Zoo, variant: Variant, ids: Any, mask: Any = None) -> Limits:
    """Both engines may be off by what rounding does to this very model."""
    model = zoo.model(variant)
    moved = rounding_sensitivity(model.config, model.weights, ids, mask)
    return (
        Tolerance(absolute=2 * measured_bound(moved.logits_absolute)),
        Tolerance(relative=2 * measured_bound(moved.memory_relative)),
    )


def compare_engines(
    cpu: armt.Engine, cuda: armt.Engine, ids: Any, mask: Any, limits: Limits
) -> dict[str, float]:
    """Relative errors of logits and states, each within its limit."""
    expected, found = cpu.forward(ids, mask), cuda.forward(ids, mask)
    assert expected.logits is not None
    assert found.logits is not None
    real = np.ones(ids.shape, bool) if mask is None else mask != 0
    difference = (found.logits - expected.logits)[real]
    errors = {
        "logits": relative(found.logits[real], expected.logits[real]),
        "rms": float(np.sqrt(np.mean(difference**2)) / np.abs(expected.logits[real]).max()),
    }
    assert_close("logits", found.logits, expected.logits, limits[0], where=real)
    theirs = states_of(expected)
    for name, value in states_of(found).items():
        errors[name] = relative(value, theirs[name])
        assert_close(name, value, theirs[name], limits[1])
    return errors


@VARIANT
@SCHEDULE
def test_forward_equals_cpu(zoo: Zoo, variant: Variant, schedule: str) -> None:
    ids = zoo.model(variant).tokens((2, 31), seed=3)
    cuda = on("cuda", zoo, variant, schedule=schedule)
    limits = measured(zoo, variant, ids)
    compare_engines(on("cpu", zoo, variant), cuda, ids, None, limits)


@VARIANT
def test_padding_equals_cpu(zoo: Zoo, variant: Variant) -> None:
    ids = zoo.model(variant).tokens((3, 24), seed=5)
    mask = np.ones_like(ids)
    mask[0, 17:] = 0
    mask[1, :10] = 0
    limits = measured(zoo, variant, ids, mask)
    compare_engines(on("cpu", zoo, variant), on("cuda", zoo, variant), ids, mask, limits)


@WIDE_VARIANT
def test_wide_float32_equals_cpu(zoo: Zoo, variant: Variant) -> None:
    ids = zoo.model(variant).tokens((2, 700), seed=8)
    compare_engines(on("cpu", zoo, variant), on("cuda", zoo, variant), ids, None, fixed("float32"))


@WIDE_VARIANT
@SCHEDULE
@pytest.mark.parametrize("padded", [False, True])
def test_wide_bfloat16_equals_cpu(
    zoo: Zoo, variant: Variant, schedule: str, padded: bool, case_report: CaseReport
) -> None:
    """The CPU computes in float32 with the same bfloat16 weights."""
    ids = zoo.model(variant, "BF16").tokens((2, 700), seed=8)
    mask = None
    if padded:
        mask = np.ones_like(ids)
        mask[0, :170] = 0
        mask[1, 620:] = 0
    cpu = on("cpu", zoo, variant, weights="BF16", dtype="bfloat16")
    cuda = on("cuda", zoo, variant, weights="BF16", dtype="bfloat16", schedule=schedule)
    errors = compare_engines(cpu, cuda, ids, mask, fixed("bfloat16"))
    assert errors["rms"] <= tolerance("cuda_engine_rms", "bfloat16").relative
    case_report(variant.name, f"bf16 {schedule}{' padded' if padded else ''}", errors)


@pytest.mark.parametrize("variant", FEW, ids=lambda v: v.name)
@HALVES
def test_many_streams_equal_cpu(
    zoo: Zoo, variant: Variant, dtype: str, case_report: CaseReport
) -> None:
    """So many that a kernel over the queries of all fills the GPU."""
    ids = zoo.model(variant, "BF16").tokens((48, 330), seed=9)
    cpu = on("cpu", zoo, variant, weights="BF16", dtype="bfloat16")
    cuda = on("cuda", zoo, variant, weights="BF16", dtype=dtype)
    errors = compare_engines(cpu, cuda, ids, None, fixed("bfloat16"))
    assert errors["rms"] <= tolerance("cuda_engine_rms", "bfloat16").relative
    case_report(variant.name, f"{dtype}, 48 streams", errors)


def test_memories_written_in_place_are_those_written_anew(zoo: Zoo) -> None:
    """So many that not all of a write's blocks run at once. From its second segment on, a call
    writes a stream's memories where it read them."""
    sizes = {"n_embd": 512, "n_layer": 2, "n_head": 8, "n_positions": 128}
    memory = {"segment_size": 24, "num_mem_tokens": 16, "d_mem": 64, "wrap_pos": True}
    variant = Variant("many-paper-gpt2", "gpt2", "paper", sizes, memory)
    engine = on("cuda", zoo, variant, weights="BF16", dtype="bfloat16", schedule="sequential")
    ids = zoo.model(variant, "BF16").tokens((48, 96), seed=4)
    found = []
    for pieces in (1, 1, 4):
        sessions = [engine.session() for _ in ids]
        for part in np.split(ids, pieces, axis=1):
            engine.feed_many(list(zip(sessions, part, strict=True)))
        for session in sessions:
            session.close_segment()
        found.append([session.state.memory(layer) for session in sessions for layer in range(2)])
    for other in found[1:]:
        for (a, z), (their_a, their_z) in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, their_a)
            np.testing.assert_array_equal(z, their_z)


# One row through all layers in one kernel (Hopper GPUs): the heads and widths that it takes.
DECODED = [
    FEW[0],
    *(v for v in WIDE if v.name in ("wide-paper-gpt2", "wide-far-llama", "wide-far-qwen3")),
    Variant("decoded-inner", "llama", "modern-inner", _WIDE_LLAMA | {"head_dim": 16}, _LONG),
    Variant(
        "decoded-sink",
        "llama",
        "modern",
        _WIDE_LLAMA | {"hidden_size": 160, "head_dim": 64},
        _LONG | {"n_heads": 4, "use_sink": True, "sliding_window": True},
    ),
    Variant(
        "decoded-rmt",
        "llama",
        "rmt",
        _WIDE_LLAMA | {"head_dim": 64},
        {"segment_size": 150, "num_mem_tokens": 20},
    ),
]


@pytest.mark.parametrize("variant", DECODED, ids=lambda v: v.name)
@HALVES
@pytest.mark.parametrize("prompt", [40, 420])
def test_decoding_equals_cpu(
    zoo: Zoo, variant: Variant, dtype: str, prompt: int, case_report: CaseReport
) -> None:
    """Single tokens, some of them behind a written memory, across the end of a segment too."""
    ids = zoo.model(variant, "BF16").tokens((1, prompt + 40), seed=8)[0]
    found = []
    for device, kind in (("cpu", "bfloat16"), ("cuda", dtype), ("cuda", dtype)):
        session = on(device, zoo, variant, weights="BF16", dtype=kind).session()
        session.feed(ids[:prompt])
        parts = [session.feed(ids[i : i + 1], logits="all").logits for i in range(prompt, len(ids))]
        found.append(np.concatenate([part for part in parts if part is not None]))
    exact, one, other = found
    np.testing.assert_array_equal(one, other)
    rms = float(np.sqrt(np.mean((one - exact) ** 2)) / np.abs(exact).max())
    case_report(variant.name, f"decode {dtype} {prompt}", {"rms": rms})
    assert rms <= tolerance("cuda_engine_rms", "bfloat16").relative
    assert_close("logits", one, exact, tolerance("cuda_engine", "bfloat16"))


# ------------------------------------------------------------------ sessions


@WIDE_VARIANT
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pieces_equal_the_whole(zoo: Zoo, variant: Variant, dtype: str) -> None:
    engine = on("cuda", zoo, variant, weights="BF16", dtype=dtype, schedule="diagonal")
    ids = zoo.model(variant, "BF16").tokens((1, 500), seed=4)[0]
    whole = engine.session()
    expected = whole.feed(ids, logits="all").logits
    assert expected is not None
    session = engine.session()
    parts = []
    cuts = [0, 1, 2, 60, 149, 150, 151, 310, 311, 480, 500]
    for begin, end in itertools.pairwise(cuts):
        part = session.feed(ids[begin:end], logits="all").logits
        assert part is not None
        parts.append(part)
    limit = tolerance("cuda_engine", dtype)
    assert_close("logits", np.concatenate(parts), expected, limit)
    assert_close("last logits", session.logits, whole.logits, limit)


@WIDE_VARIANT
def test_fork_rollback_and_bytes(zoo: Zoo, variant: Variant) -> None:
    engine = on("cuda", zoo, variant)
    cpu = on("cpu", zoo, variant)
    ids = zoo.model(variant).tokens((1, 420), seed=6)[0]
    session = engine.session()
    session.feed(ids[:320])
    state = session.checkpoint()
    fork = session.fork()
    expected = session.feed(ids[320:], logits="all").logits
    assert expected is not None
    again = fork.feed(ids[320:], logits="all").logits
    np.testing.assert_array_equal(again, expected)
    session.rollback(state)
    np.testing.assert_array_equal(session.feed(ids[320:], logits="all").logits, expected)
    loaded = armt.State.from_bytes(state.to_bytes())
    np.testing.assert_array_equal(
        engine.session(state=loaded).feed(ids[320:], logits="all").logits, expected
    )
    moved = cpu.session(state=loaded).feed(ids[320:], logits="all").logits
    assert moved is not None
    assert_close("on the CPU", moved, expected, tolerance("cuda_engine", "float32"))


@WIDE_VARIANT
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_sessions_equal_one(zoo: Zoo, variant: Variant, dtype: str) -> None:
    engine = on("cuda", zoo, variant, weights="BF16", dtype=dtype, schedule="diagonal")
    rng = np.random.default_rng(9)
    lengths = [1, 150, 151, 40, 333, 480, 2]
    inputs = [rng.integers(0, engine.vocab_size, size=n) for n in lengths]
    sessions = [engine.session() for _ in inputs]
    together = engine.feed_many(zip(sessions, inputs, strict=True), logits="all")
    limit = tolerance("cuda_engine", dtype)
    for session, output, ids in zip(sessions, together, inputs, strict=True):
        alone = engine.session()
        expected = alone.feed(ids, logits="all").logits
        assert output.logits is not None
        assert expected is not None
        assert_close("logits", output.logits, expected, limit)
        follow = ids[:1]
        assert_close(
            "next",
            np.asarray(session.feed(follow, logits="last").logits),
            np.asarray(alone.feed(follow, logits="last").logits),
            limit,
        )


def test_threads_share_an_engine(zoo: Zoo) -> None:
    variant = WIDE[1]
    engine = on("cuda", zoo, variant)
    ids = zoo.model(variant).tokens((4, 330), seed=2)
    expected = [engine.session().feed(row, logits="last").logits for row in ids]
    found: dict[int, Any] = {}

    def work(index: int) -> None:
        session = engine.session()
        for begin in range(0, 330, 30):
            out = session.feed(ids[index][begin : begin + 30], logits="last")
        found[index] = out.logits

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, logits in enumerate(expected):
        assert logits is not None
        assert_close("logits", found[index], logits, tolerance("cuda_engine", "float32"))


def test_generation_past_the_segment(zoo: Zoo) -> None:
    variant = WIDE[1]
    prompt = zoo.model(variant).tokens((1, 140), seed=7)[0]
    answers = []
    for device in ("cpu", "cuda"):
        session = on(device, zoo, variant).session(seed=3)
        session.feed(prompt)
        answers.append(list(session.generate(60, rollover=True)))
    assert answers[0] == answers[1]


# ------------------------------------------------------------------ faults


def test_wrong_device_index(zoo: Zoo) -> None:
    with pytest.raises(armt.DeviceError, match="expected a number below"):
        on("cuda:99", zoo, VARIANTS[0])


def test_auto_takes_the_gpu(zoo: Zoo) -> None:
    assert on("auto", zoo, VARIANTS[0]).device == "cuda:0"


def test_out_of_memory_leaves_everything_usable(zoo: Zoo, tmp_path: Path) -> None:
    """One page of this engine's cache holds a whole segment, here more than any GPU has."""
    huge = Variant("huge", "llama", "paper", {}, {"segment_size": 2**31 - 1})
    huge.model().save(tmp_path)
    engine = armt.Engine.from_pretrained(tmp_path, device="cuda")
    session = engine.session()
    for _ in range(2):
        with pytest.raises(armt.OutOfMemory, match="MiB"):
            session.feed([1, 2, 3])
        assert session.tokens == 0
    small = on("cuda", zoo, VARIANTS[0])
    assert small.session().feed([1, 2, 3], logits="last").logits is not None
