"""The float64 reference against the published numbers: stored cases, traces, single steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance import Case, FeatureMapCase, UnitStep
from reference import forward, generate, load_folder, load_hf_folder, smallest_margin
from reference.arrays import as_float64
from reference.features import feature_map
from reference.layout import cut
from reference.memory import MemoryMaps, empty_memory, read, write
from reference.model import Model, State
from reference.settings import read_settings
from tolerances import assert_close, tolerance


def load(case: Case) -> Model:
    """The model of a case; a pickled one needs PyTorch."""
    if Path(case.config["weights"].get("file", "")).suffix in (".bin", ".pt"):
        pytest.importorskip("torch", reason="this checkpoint is pickled: reading it needs PyTorch")
    return load_folder(case.folder)


def state_arrays(state: State) -> dict[str, Any]:
    """The stored names of what is left after the last segment."""
    return {"memory_A": state.A, "memory_z": state.z, "memory_state": state.memory_state}


def test_case(conformance_case: Case) -> None:
    """Logits of every real token, and the whole final state."""
    case = conformance_case
    logits, state = forward(load(case), case.input_ids, case.attention_mask)
    expected = case.expected("logits")
    assert expected is not None
    limit = tolerance("conformance_logits", "float64")
    assert_close("logits", logits, expected, limit, where=case.real)
    for name, found in state_arrays(state).items():
        expected = case.expected(name)
        assert (found is None) == (expected is None), f"{name} should exist in both or in neither"
        if expected is not None:
            assert_close(name, found, expected, tolerance("conformance_memory", "float64"))


def test_cut_of_case(conformance_case: Case) -> None:
    """Segment lengths follow from the settings."""
    case = conformance_case
    settings = read_settings(case.dialect, case.armt)
    found = cut(
        case.input_ids.shape[1], size=settings.segment_size, alignment=settings.segment_alignment
    )
    assert sum(found) == case.input_ids.shape[1]
    if case.segment_lengths is not None:
        assert found == case.segment_lengths


def test_trace(trace_case: Case) -> None:
    """Every intermediate value."""
    assert trace_case.trace is not None
    found: dict[str, Any] = {}
    forward(load(trace_case), trace_case.input_ids, trace=found)
    assert set(found) == set(trace_case.trace)
    for name, expected in trace_case.trace.items():
        assert_close(name, found[name], expected, tolerance("conformance_trace", "float64"))


def test_generation(generation_case: Case) -> None:
    """The same ids, and the logits that each was chosen from."""
    case = generation_case
    expected = case.arrays["generated_ids"]
    prompt = case.arrays["generate_prompt_ids"]
    ids, step_logits = generate(load(case), prompt, expected.shape[1])
    np.testing.assert_array_equal(ids, expected)
    stored = case.expected("generated_step_logits")
    assert stored is not None
    limit = tolerance("conformance_logits", "float64")
    assert_close("generated_step_logits", step_logits, stored, limit)
    assert smallest_margin(step_logits) >= 0.02


def test_feature_map(feature_map_case: FeatureMapCase) -> None:
    """Stored in float32, so compared at float32 rounding."""
    found = feature_map(as_float64(feature_map_case.x), rolls=feature_map_case.nu)
    assert_close("phi", found, feature_map_case.y, tolerance("feature_map", "float32"))


def test_unit_step(unit_step: UnitStep) -> None:
    """Three writes and reads of one memory layer."""
    settings = dict(unit_step.settings)
    rule = read_settings(settings.pop("dialect"), settings).rule()
    arrays = {name: as_float64(array) for name, array in unit_step.arrays.items()}
    names = ("W_mq", "W_mk", "W_mv", "W_mb", "W_mb_bias")
    maps = MemoryMaps(*(arrays[name] for name in names))
    limit = tolerance("conformance_unit", "float64")
    memory = empty_memory(rule, maps, batch=len(arrays["hidden"]))
    assert unit_step.writes == 3
    for s in range(unit_step.writes):
        memory, _ = write(rule, maps, memory, arrays[f"write{s}_tokens"])
        found = {
            f"write{s}_A": memory.A,
            f"write{s}_z": memory.z,
            f"read{s}": read(rule, maps, memory, arrays["hidden"]),
        }
        for name, array in found.items():
            expected = unit_step.expected(name)
            assert (array is None) == (expected is None), name
            if array is not None and expected is not None:
                # The paper dialect's stored arrays have no head axis.
                assert_close(name, array.reshape(expected.shape), expected, limit)


def test_hugging_face_folder_alone_is_enough(hf_case: Case) -> None:
    """The folder's own config.json gives the same model as the case's."""
    weights = hf_case.config["weights"]
    adapter: Path | None = None
    if "adapter_folder" in weights:
        adapter = hf_case.folder / weights["adapter_folder"]
    model = load_hf_folder(hf_case.folder / weights["folder"], adapter=adapter)
    assert model.settings == load(hf_case).settings
    logits, _ = forward(model, hf_case.input_ids)
    expected = hf_case.expected("logits")
    assert expected is not None
    assert_close("logits", logits, expected, tolerance("conformance_logits", "float64"))


@pytest.mark.parametrize(
    ("alignment", "expected"),
    [("left", [5, 5, 3]), ("right", [3, 5, 5]), ("center", [5, 5, 3])],
)
def test_cut(alignment: str, expected: list[int]) -> None:
    assert cut(13, size=5, alignment=alignment) == expected


def test_cut_center_evens_out() -> None:
    assert cut(16, size=10, alignment="center") == [8, 8]
    assert cut(12, size=5, alignment="center") == [4, 4, 4]
    # ceil(9 / 4) = 3 segments of 3; ceil(10 / 7) = 2 fill up 7 segments of size at most 7 early
    assert cut(9, size=4, alignment="center") == [3, 3, 3]
    assert cut(3, size=5, alignment="center") == [3]


@pytest.mark.parametrize(
    ("dialect", "options", "message"),
    [
        ("paper", {"num_mem_tokens": 0}, "num_mem_tokens"),
        ("modern", {"attend_to_previous_input": True}, "attend_to_previous_input"),
        ("modern", {"act_on": True}, "act_on"),
        ("modern", {"wrap_pos": True, "use_sink": True}, "sink"),
        ("modern", {"d_mem": 6, "n_heads": 4}, "divisible"),
        ("modern-inner", {"segment_alignment": "right"}, "left"),
        ("paper", {"n_heads": 2}, "modern only"),
        ("other", {}, "dialect"),
    ],
)
def test_refused_settings(dialect: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(dialect, options)
