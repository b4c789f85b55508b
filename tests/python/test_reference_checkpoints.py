"""The reference's own reader, writer and LoRA merging, and the yardstick for tolerances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference import forward, load_folder
from reference.arrays import Array
from reference.checkpoint import merge_adapter_folder, merge_inner_lora, read_weights
from reference.random_models import BASES, PREFIXES, RandomModel, random_model
from reference.safetensors import (
    from_bfloat16_bits,
    read_safetensors,
    round_to,
    to_bfloat16_bits,
    write_safetensors,
)
from reference.sensitivity import rounding_sensitivity
from tolerances import EXACT, assert_close, measured_bound, tolerance

LIMIT = tolerance("identity", "float64")


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_saved_model_is_the_same_model(tmp_path: Path, dtype: str) -> None:
    spec = random_model(base="llama", dialect="modern", dtype=dtype)
    stored = read_weights(spec.save(tmp_path / "model"))
    assert stored.keys() == spec.weights.keys()
    for name, tensor in spec.weights.items():
        assert_close(name, stored[name], tensor, EXACT)
    ids = spec.tokens((2, 16))
    found, _ = forward(load_folder(tmp_path / "model"), ids)
    expected, _ = forward(spec.reference(), ids)
    assert_close("logits", found, expected, EXACT)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dialect", PREFIXES)
def test_every_base_and_dialect_loads(tmp_path: Path, base: str, dialect: str) -> None:
    spec = random_model(base=base, dialect=dialect, seed=5)
    logits, _ = forward(load_folder(spec.save(tmp_path)), spec.tokens((2, 16)))
    assert logits.shape == (2, 16, spec.vocab_size)
    assert np.isfinite(logits).all()


def test_bfloat16_rounds_to_nearest_even() -> None:
    # 1 + 2^-8 lies half way between two neighbours: the even one is 1; 1 + 3 * 2^-8 goes up.
    values = np.array([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-7, 3e38, 0.0])
    found = from_bfloat16_bits(to_bfloat16_bits(values))
    assert found[:4].tolist() == [1.0, 1.0, 1.0 + 2**-6, -1.0 - 2**-7]
    assert found[5] == 0.0
    assert abs(found[4] / 3e38 - 1.0) < 2**-8


def test_integer_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.ones(2)}, dtype="F32")
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(ValueError, match="I32"):
        read_safetensors(path)


def test_shards_equal_one_file(tmp_path: Path) -> None:
    spec = random_model()
    names = sorted(spec.weights)
    weight_map: dict[str, str] = {}
    for k in range(3):
        part = {name: spec.weights[name] for name in names[k::3]}
        write_safetensors(tmp_path / f"part{k}.safetensors", part, dtype="F32")
        weight_map |= dict.fromkeys(part, f"part{k}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    stored = read_weights(tmp_path)
    assert stored.keys() == spec.weights.keys()
    for name, tensor in spec.weights.items():
        assert_close(name, stored[name], tensor, EXACT)


def attention_matrix(spec: RandomModel) -> str:
    """The full module name of one matrix to adapt."""
    gpt2 = spec.config["base_model"]["model_type"] == "gpt2"
    ending = ("attn.c_attn" if gpt2 else "self_attn.k_proj") + ".weight"
    return next(n for n in spec.weights if n.endswith(ending)).removesuffix(".weight")


def lora_pair(spec: RandomModel, r: int) -> tuple[str, Array, Array, bool]:
    """Module name, A [r, in], B [out, r], and whether the base stores [in, out]."""
    module, rng = attention_matrix(spec), np.random.default_rng(r)
    shape = spec.weights[module + ".weight"].shape
    in_out = spec.config["base_model"]["model_type"] == "gpt2"
    columns, rows = shape if in_out else shape[::-1]
    a = round_to(rng.normal(size=(r, columns)), "F32")
    return module, a, round_to(rng.normal(size=(rows, r)), "F32"), in_out


@pytest.mark.parametrize("base", ["gpt2", "llama"])
@pytest.mark.parametrize("older_naming", [False, True])
def test_lora_inside_the_checkpoint(base: str, older_naming: bool) -> None:
    spec = random_model(base=base)
    module, a, b, in_out = lora_pair(spec, 2)
    tensors = dict(spec.weights)
    original = tensors.pop(module + ".weight")
    tensors[module + (".weight" if older_naming else ".base_layer.weight")] = original
    tensors |= {module + ".lora_A.default.weight": a, module + ".lora_B.default.weight": b}
    merged = merge_inner_lora(tensors, alpha=6.0, in_out=in_out)
    assert merged.keys() == spec.weights.keys()
    delta = 3.0 * b @ a
    expected = original + (delta.T if in_out else delta)
    assert_close(module, merged[module + ".weight"], expected, LIMIT)


def write_adapter(folder: Path, tensors: dict[str, Array], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"r": 2, "lora_alpha": 6, "use_rslora": False, "use_dora": False} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    named = {"base_model.model." + name: tensor for name, tensor in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", named, dtype="F32")
    return folder


@pytest.mark.parametrize(
    ("r", "config", "scale"),
    [
        (2, {}, 3.0),
        (2, {"use_rslora": True}, 6.0 / 2**0.5),
        (4, {"rank_pattern": {"k_proj": 4}}, 1.5),
        (2, {"alpha_pattern": {"self_attn.k_proj": 10, "q_proj": 1}}, 5.0),
        (2, {"alpha_pattern": {"proj": 10}}, 3.0),
    ],
)
def test_adapter_folder(tmp_path: Path, r: int, config: dict[str, Any], scale: float) -> None:
    spec = random_model(base="llama", dialect="modern")
    module, a, b, in_out = lora_pair(spec, r)
    replaced = next(name for name in spec.weights if name.endswith("W_mv.weight"))
    new_value = np.full(spec.weights[replaced].shape, 0.25)
    folder = write_adapter(
        tmp_path,
        {
            module + ".lora_A.weight": a,
            module + ".lora_B.weight": b,
            replaced: new_value,
        },
        **config,
    )
    merged = merge_adapter_folder(spec.weights, folder, in_out=in_out)
    expected = spec.weights[module + ".weight"] + scale * b @ a
    assert_close(module, merged[module + ".weight"], expected, LIMIT)
    assert_close(replaced, merged[replaced], new_value, EXACT)
    changed = {name for name in merged if not np.array_equal(merged[name], spec.weights[name])}
    assert changed == {module + ".weight", replaced}


def test_adapter_folder_refusals(tmp_path: Path) -> None:
    spec = random_model(base="llama", dialect="modern")
    module, a, b, _ = lora_pair(spec, 2)
    pair = {module + ".lora_A.weight": a, module + ".lora_B.weight": b}
    with pytest.raises(ValueError, match="use_dora"):
        merge_adapter_folder(
            spec.weights, write_adapter(tmp_path, pair, use_dora=True), in_out=False
        )
    with pytest.raises(ValueError, match="2 rows"):
        merge_adapter_folder(spec.weights, write_adapter(tmp_path, pair, r=3), in_out=False)
    with pytest.raises(ValueError, match="lacks"):
        merge_adapter_folder(
            spec.weights, write_adapter(tmp_path, {"nowhere.weight": a}), in_out=False
        )


def test_sensitivity_bounds_a_rounded_model() -> None:
    """Weights rounded to float32 after the fact stay within the measured bound; bfloat16 do not."""
    spec = random_model(base="llama", dialect="modern", dtype="F64", seed=3)
    ids = spec.tokens((2, 26))
    change = rounding_sensitivity(spec.config, spec.weights, ids)
    assert 0.0 < change.memory_relative < 1e-3
    exact, _ = forward(spec.reference(), ids)
    for dtype, inside in (("F32", True), ("BF16", False)):
        rounded = RandomModel(
            spec.config, {n: round_to(w, dtype) for n, w in spec.weights.items()}, dtype
        )
        found, _ = forward(rounded.reference(), ids)
        assert (np.abs(found - exact).max() <= measured_bound(change.logits_absolute)) == inside


def test_a_window_of_the_base_model_is_refused_once_it_matters() -> None:
    """Mistral's own window is not part of the published memory models."""
    ids = np.ones((1, 14), dtype=np.int64)
    wide = random_model(base="mistral", base_options={"sliding_window": 10})
    forward(wide.reference(), ids)  # 7 tokens and 3 memory rows
    narrow = random_model(base="mistral", base_options={"sliding_window": 9})
    with pytest.raises(ValueError, match="sliding_window"):
        forward(narrow.reference(), ids)
