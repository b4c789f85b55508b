"""The engine against the published numbers: every folder of a conformance directory.

    python -m pytest tests/python/test_conformance.py --conformance DIR

Both schedules, one and two threads; the worst errors of each case are printed at the end.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import armt
from conformance import Case
from conftest import CaseReport
from tolerances import assert_close, worst_difference


def load(case: Case, **options: Any) -> armt.Engine:
    if case.name.endswith("pickle") or case.config["weights"].get("kind", "").startswith("pickled"):
        pytest.importorskip("torch", reason="pickled checkpoints need torch")
    options.setdefault("dtype", "float32")
    return armt.Engine.from_pretrained(case.folder, device="cpu", **options)


def stacked_memory(states: list[armt.State], layers: int) -> tuple[Any, Any]:
    """A and z as the cases store them, modern form: [layers, batch, heads, ...]."""
    pairs = [[state.memory(layer) for state in states] for layer in range(layers)]
    matrix = np.stack([np.stack([a for a, _ in row]) for row in pairs])
    if pairs[0][0][1] is None:
        return matrix, None
    return matrix, np.stack([np.stack([z for _, z in row]) for row in pairs])


def worst_relative(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return worst_difference(found, expected) / max(float(np.abs(expected).max()), 1e-30)


@pytest.mark.parametrize("schedule", ["sequential", "diagonal"])
def test_forward(conformance_case: Case, schedule: str, case_report: CaseReport) -> None:
    case = conformance_case
    engine = load(case, schedule=schedule, threads=2)
    out = engine.forward(case.input_ids, case.attention_mask)
    assert out.logits is not None
    logits = case.expected("logits")
    assert logits is not None
    real = case.real
    errors = {"logits": worst_difference(out.logits[real], logits[real])}

    state: dict[str, tuple[Any, Any]] = {}
    expected_a = case.expected("memory_A")
    if expected_a is not None:
        found_a, found_z = stacked_memory(out.states, expected_a.shape[0])
        state["A"] = (found_a.reshape(expected_a.shape), expected_a)
        expected_z = case.expected("memory_z")
        assert (expected_z is None) == (found_z is None)
        if expected_z is not None:
            state["z"] = (found_z.reshape(expected_z.shape), expected_z)
    expected_rmt = case.expected("memory_state")
    if expected_rmt is not None:
        state["memory"] = (np.stack([s.memory_tokens for s in out.states]), expected_rmt)
    assert state, "the case stores no state"
    errors |= {name: worst_relative(*pair) for name, pair in state.items()}
    case_report(case.name, schedule, errors)

    assert_close("logits", out.logits, logits, case.logits_tolerance, where=real)
    for name, (found, expected) in state.items():
        assert_close(name, found, expected, case.memory_tolerance)


def test_generation(generation_case: Case, case_report: CaseReport) -> None:
    case = generation_case
    engine = load(case)
    prompt = case.arrays["generate_prompt_ids"]
    expected = case.arrays["generated_ids"]
    new = expected.shape[1]
    found = engine.generate(prompt, max_new_tokens=new)
    wrong = int((found[:, prompt.shape[1] :] != expected).sum())
    case_report(case.name, "generate", {"wrong ids": wrong})
    np.testing.assert_array_equal(found[:, : prompt.shape[1]], prompt)
    np.testing.assert_array_equal(found[:, prompt.shape[1] :], expected)


def test_streaming_equals_the_published_forward(conformance_case: Case) -> None:
    """A session fed in uneven pieces and closed gives the forward call's last logits and state."""
    case = conformance_case
    if case.attention_mask is not None or case.armt.get("segment_alignment", "left") != "left":
        pytest.skip("a stream has no padding and is cut from the left")
    engine = load(case)
    ids = case.input_ids[0]
    whole = engine.forward(ids)
    session = engine.session()
    cuts = [0, 1, len(ids) // 3, len(ids) // 2, len(ids)]
    for begin, end in itertools.pairwise(cuts):
        if end > begin:
            out = session.feed(ids[begin:end], logits="last")
    session.close_segment()
    assert whole.logits is not None
    assert out.logits is not None
    assert np.array_equal(out.logits, whole.logits[0, -1])
    layers = session.state.layers if case.expected("memory_A") is not None else 0
    for layer in range(layers):
        a, z = session.state.memory(layer)
        expected_a, expected_z = whole.states[0].memory(layer)
        assert np.array_equal(a, expected_a)
        assert (z is None and expected_z is None) or np.array_equal(z, expected_z)


def test_hf_folder_loads_by_itself(hf_case: Case) -> None:
    """The Hugging Face folder inside a case, without the facts that stand around it."""
    weights = hf_case.config["weights"]
    if weights["cell_prefix"] != "armt.memory_cell.":
        pytest.skip("not a Hugging Face folder")
    adapter = weights.get("adapter_folder")
    engine = armt.Engine.from_pretrained(
        hf_case.folder / weights["folder"],
        adapter=hf_case.folder / adapter if adapter else None,
        device="cpu",
        dtype="float32",
    )
    out = engine.forward(hf_case.input_ids, hf_case.attention_mask)
    expected = hf_case.expected("logits")
    assert expected is not None
    assert out.logits is not None
    assert_close("logits", out.logits, expected, hf_case.logits_tolerance, where=hf_case.real)
