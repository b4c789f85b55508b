"""Prefill in 8 bits on a GPU: close to the weights' own type, for long inputs only."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import armt
from armt import _core
from conftest import CaseReport
from tolerances import tolerance
from variants import VARIANTS, Variant, Zoo

GPU = pytest.mark.skipif(_core.cuda_device_count() == 0, reason="no GPU can be used here")

# Widths that 8-bit products take (multiples of 16) but no tile divides; biases and none; gated and
# not; segments over several tiles of rows, so that every wave is long enough.
_LLAMA = {
    "hidden_size": 160,
    "intermediate_size": 304,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 40,
}
_GPT2 = {"n_embd": 192, "n_layer": 3, "n_head": 3, "n_positions": 512}
_NEOX = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
}
_LONG = {"segment_size": 300, "num_mem_tokens": 20, "d_mem": 40}
MODELS = [
    Variant("fp8-paper-gpt2", "gpt2", "paper", _GPT2, _LONG | {"wrap_pos": True}),
    Variant("fp8-paper-llama", "llama", "paper", _LLAMA, _LONG),
    Variant("fp8-modern-qwen3", "qwen3", "modern", _LLAMA, _LONG | {"sliding_window": True}),
    Variant("fp8-paper-neox", "gpt_neox", "paper", _NEOX, _LONG),
]


def engine(zoo: Zoo, variant: Variant, **options: Any) -> armt.Engine:
    zoo.model(variant, "BF16")
    options = {"device": "cuda", "dtype": "bfloat16"} | options
    return armt.Engine.from_pretrained(zoo.path(variant, "BF16"), **options)


def rms(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Root mean square of the difference in units of that of the expected values."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


@GPU
@pytest.mark.parametrize("variant", MODELS, ids=lambda v: v.name)
@pytest.mark.parametrize("schedule", ["sequential", "diagonal"])
def test_close_to_bfloat16(
    zoo: Zoo, variant: Variant, schedule: str, case_report: CaseReport
) -> None:
    ids = zoo.model(variant, "BF16").tokens((2, 1000), seed=8)
    exact = engine(zoo, variant, device="cpu").forward(ids).logits
    plain = engine(zoo, variant).forward(ids).logits
    short = engine(zoo, variant, schedule=schedule, prefill_dtype="fp8").forward(ids).logits
    assert exact is not None and plain is not None and short is not None
    errors = {"bf16": rms(plain, exact), "fp8": rms(short, exact)}
    case_report(variant.name, f"fp8 {schedule}", errors)
    assert errors["fp8"] <= tolerance("cuda_fp8_rms", "fp8").relative
    assert errors["fp8"] > errors["bf16"]  # 8 bits were at work


@GPU
def test_short_waves_keep_their_type(zoo: Zoo) -> None:
    variant = MODELS[1]
    plain, short = engine(zoo, variant), engine(zoo, variant, prefill_dtype="fp8")
    assert (plain.prefill_dtype, short.prefill_dtype) == ("same", "fp8")
    prompt = zoo.model(variant, "BF16").tokens((1, 40), seed=2)[0]
    answers = []
    for each in (plain, short):
        session = each.session()
        session.feed(prompt)
        answers.append((session.logits, list(session.generate(20))))
    np.testing.assert_array_equal(answers[0][0], answers[1][0])
    assert answers[0][1] == answers[1][1]


@GPU
def test_states_move_between_both(zoo: Zoo) -> None:
    variant = MODELS[0]
    ids = zoo.model(variant, "BF16").tokens((1, 900), seed=4)[0]
    short = engine(zoo, variant, prefill_dtype="fp8").session()
    short.feed(ids)
    loaded = armt.State.from_bytes(short.state.to_bytes())
    plain = engine(zoo, variant).session(state=loaded)
    np.testing.assert_array_equal(plain.logits, short.logits)


@GPU
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_weights_are_refused(zoo: Zoo, dtype: str) -> None:
    with pytest.raises(armt.InvalidArgument, match="bfloat16"):
        engine(zoo, MODELS[0], dtype=dtype, prefill_dtype="fp8")


def test_the_cpu_is_refused(zoo: Zoo) -> None:
    with pytest.raises(armt.DeviceError, match="prefill_dtype"):
        engine(zoo, VARIANTS[0], device="cpu", prefill_dtype="fp8")


@pytest.mark.parametrize("name", ["float8", "bf16", ""])
def test_other_names_are_refused(zoo: Zoo, name: str) -> None:
    with pytest.raises(armt.InvalidArgument, match="prefill_dtype"):
        engine(zoo, VARIANTS[0], device="cpu", prefill_dtype=name)
