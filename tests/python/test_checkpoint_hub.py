"""Hugging Face folders, their two traps, and LoRA."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from armt.checkpoint import load_checkpoint
from armt.errors import CheckpointError
from canonical import assert_reads
from checkpoint_files import (
    lora_orientation,
    lora_pair,
    modules,
    save_adapter,
    save_hub,
)
from conformance import Case
from reference.arrays import Array
from reference.random_models import RandomModel, random_model
from reference.safetensors import write_safetensors
from tolerances import Tolerance

MERGED = Tolerance(relative=1e-6)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize(
    ("base", "dialect", "options"),
    [
        ("llama", "modern", {"use_sink": True, "n_heads": 2}),
        ("llama", "modern-inner", {}),
        ("gpt2", "modern", {"wrap_pos": True}),
        ("gpt_neox", "modern", {"gating": True, "n_heads": 4, "sliding_window": True}),
        ("qwen3", "modern", {"use_denom": False, "correction": False}),
    ],
)
def test_hub_folders(
    tmp_path: Path, base: str, dialect: str, options: dict[str, Any], shards: int
) -> None:
    spec = random_model(base=base, dialect=dialect, armt_options=options)
    found = load_checkpoint(save_hub(tmp_path, spec, shards=shards))
    assert_reads(found, spec.reference())
    assert found.memory["dialect"] == {"modern-inner": "inner"}.get(dialect, dialect)
    assert found.assumed == ()
    told = spec.config["armt"]
    for name in ("d_mem", "n_heads", "use_denom", "correction", "gating", "sliding_window"):
        assert found.memory[name] == told[name]


def test_absent_fields_have_the_published_defaults(tmp_path: Path) -> None:
    options = {"num_mem_tokens": 16, "d_mem": 512, "segment_size": 512}
    spec = random_model(base="llama", dialect="modern", armt_options=options)
    folder = save_hub(tmp_path, spec)
    config = json.loads((folder / "config.json").read_text())
    for name in (*options, "correction", "n_heads", "use_denom", "gating", "use_sink", "wrap_pos"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    found = load_checkpoint(folder)
    assert_reads(found, spec.reference())
    assert found.memory["segment_size"] == 512
    # A memory of another size is not taken for granted: the defaults are what the folder says.
    small = random_model(base="llama", dialect="modern")
    write_safetensors(folder / "model.safetensors", small.weights, dtype="F32")
    with pytest.raises(CheckpointError, match=r"memory in .* found \[3, 24\], expected \[16, 24\]"):
        load_checkpoint(folder)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_head_width_and_kv_heads_come_from_the_shapes(tmp_path: Path, kv_heads: int) -> None:
    options = {"head_dim": 10, "num_key_value_heads": kv_heads}
    spec = random_model(base="llama", dialect="modern", base_options=options)
    base = {k: v for k, v in spec.config["base_model"].items() if k not in options}
    found = load_checkpoint(save_hub(tmp_path, spec, base_model_config=base))
    assert (found.decoder["head_dim"], found.decoder["n_kv_heads"]) == (10, kv_heads)
    assert found.decoder["rotary_dims"] == 10
    assert_reads(found, spec.reference())


def test_more_key_heads_than_query_heads_are_refused(tmp_path: Path) -> None:
    """What the default of 32 key/value heads makes of a small model."""
    spec = random_model(base="llama", dialect="modern", base_options={"num_key_value_heads": 32})
    with pytest.raises(CheckpointError, match="multiple of the 32 key/value heads"):
        load_checkpoint(save_hub(tmp_path, spec))


def test_base_defaults(tmp_path: Path) -> None:
    left_out = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
    spec = random_model(base="llama", dialect="modern", base_options=left_out)
    names = (*left_out, "hidden_act", "rope_scaling", "attention_bias", "mlp_bias")
    base = {k: v for k, v in spec.config["base_model"].items() if k not in names}
    found = load_checkpoint(save_hub(tmp_path, spec, base_model_config=base))
    assert_reads(found, spec.reference())
    assert (found.decoder["norm_eps"], found.decoder["activation"]) == (1e-6, "silu")


@pytest.mark.parametrize("given", [None, "meta-llama/Llama-3.2-1B"])
def test_a_base_model_by_name_needs_its_configuration(tmp_path: Path, given: str | None) -> None:
    spec = random_model(base="llama", dialect="modern")
    changes: dict[str, Any] = {
        "base_model_name": "meta-llama/Llama-3.2-1B",
        "base_model_config": given,
    }
    folder = save_hub(tmp_path, spec, **changes)
    with pytest.raises(CheckpointError, match=r"meta-llama/Llama-3.2-1B.*pass base_model="):
        load_checkpoint(folder)
    assert_reads(load_checkpoint(folder, base_model=spec.config["base_model"]), spec.reference())


def test_inner_loop_over_the_same_weights(tmp_path: Path) -> None:
    folder = save_hub(tmp_path, random_model(base="llama", dialect="modern"))
    assert load_checkpoint(folder).memory["dialect"] == "modern"
    assert load_checkpoint(folder, dialect="inner").memory["dialect"] == "inner"


def test_end_tokens_and_tokenizer(tmp_path: Path) -> None:
    spec = random_model(base="llama", dialect="modern", base_options={"eos_token_id": 5})
    folder = save_hub(tmp_path, spec)
    assert load_checkpoint(folder).eos_token_ids == [5]
    assert load_checkpoint(folder).tokenizer is None
    (folder / "tokenizer.json").write_text("{}")
    generation = {"eos_token_id": [7, 8, 999], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    found = load_checkpoint(folder)
    assert found.eos_token_ids == [7, 8]  # 999 is no id of this vocabulary
    assert found.generation["pad_token_id"] == 0
    assert found.tokenizer == folder / "tokenizer.json"
    assert load_checkpoint(folder, eos_token_id=3).eos_token_ids == [3]


def test_conformance_hub_folders_without_the_outer_configuration(hf_case: Case) -> None:
    """The published form alone gives the same tensors as the conformance form around it."""
    weights = hf_case.config["weights"]
    adapter = weights.get("adapter_folder")
    inner = load_checkpoint(
        hf_case.folder / weights["folder"],
        adapter=None if adapter is None else hf_case.folder / adapter,
    )
    outer = load_checkpoint(hf_case.folder)
    assert (inner.decoder, inner.memory) == (outer.decoder, outer.memory)
    for a, b in zip(inner.tensors(), outer.tensors(), strict=True):
        assert (a.slot, a.layer, a.dtype) == (b.slot, b.layer, b.dtype)
        assert np.array_equal(a.array, b.array)


# --------------------------------------------------------------------- LoRA


def with_lora(
    spec: RandomModel, names: list[str], *, r: int, scale: float
) -> tuple[RandomModel, dict[str, Array]]:
    """The model with merged weights, and the A and B matrices (``<module>.A``, ``.B``)."""
    weights, pairs = dict(spec.weights), dict[str, Array]()
    for seed, module in enumerate(names):
        a, b = lora_pair(spec, module, r, seed=seed)
        delta = lora_orientation(spec, scale * b @ a)
        weights[module + ".weight"] = spec.weights[module + ".weight"] + delta
        pairs |= {module + ".A": a, module + ".B": b}
    return RandomModel(spec.config, weights, spec.dtype), pairs


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("older_naming", [False, True])
@pytest.mark.parametrize(
    ("base", "endings"),
    [("gpt2", ("c_attn", "mlp.c_proj")), ("llama", ("k_proj", "up_proj", "o_proj"))],
)
def test_lora_inside(
    tmp_path: Path, base: str, endings: tuple[str, ...], older_naming: bool, rslora: bool
) -> None:
    spec = random_model(base=base, dtype="F16")
    scale = 6.0 / math.sqrt(3) if rslora else 2.0
    merged, pairs = with_lora(spec, modules(spec, *endings), r=3, scale=scale)
    adapted = {name[:-2] for name in pairs}
    tensors = {}
    for name, tensor in spec.weights.items():
        module, _, kind = name.rpartition(".")
        stored = f"{module}.base_layer.{kind}" if module in adapted and not older_naming else name
        tensors[stored] = tensor
    for name, tensor in pairs.items():
        tensors[f"{name[:-2]}.lora_{name[-1]}.default.weight"] = tensor
    wrapped = {
        n.replace("cell.model.", "cell.model.base_model.model."): t for n, t in tensors.items()
    }
    write_safetensors(tmp_path / "x.safetensors", wrapped, dtype="F32")
    facts = {k: spec.config[k] for k in ("dialect", "base_model")} | {"segment_size": 7}
    path = tmp_path / "x.safetensors"
    found = load_checkpoint(path, lora_alpha=6, use_rslora=rslora, **facts)
    assert (found.merged_lora, found.source_dtype) == (True, "float32")
    assert_reads(found, merged.reference(), MERGED)
    with pytest.raises(CheckpointError, match="lora_alpha"):
        load_checkpoint(path, **facts)


ADAPTERS: dict[str, tuple[int, dict[str, Any], float]] = {
    "plain": (2, {}, 3.0),
    "rslora": (2, {"use_rslora": True}, 6.0 / math.sqrt(2)),
    "rank by name": (4, {"rank_pattern": {"k_proj": 4}}, 1.5),
    "rank by expression": (4, {"rank_pattern": {r"layers\.\d.*k_proj": 4}}, 1.5),
    "alpha by ending": (2, {"alpha_pattern": {"q_proj": 1, "self_attn.k_proj": 10}}, 5.0),
    "alpha of something else": (2, {"alpha_pattern": {"proj": 10, "_proj": 11}}, 3.0),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_adapter_folder(tmp_path: Path, kind: str, dtype: str) -> None:
    r, config, scale = ADAPTERS[kind]
    spec = random_model(base="llama", dialect="modern", dtype=dtype)
    merged, pairs = with_lora(spec, modules(spec, "k_proj"), r=r, scale=scale)
    tensors = {f"{n[:-2]}.lora_{n[-1]}.weight": t for n, t in pairs.items()}
    replaced = next(name for name in spec.weights if name.endswith("W_mv.weight"))
    merged.weights[replaced] = tensors[replaced] = np.full(spec.weights[replaced].shape, 0.25)
    adapter = save_adapter(tmp_path / "adapter", tensors, modules_to_save=["W_mv"], **config)
    folder = save_hub(tmp_path / "model", spec)
    assert_reads(load_checkpoint(folder, adapter=adapter), merged.reference(), MERGED)
    if dtype == "F32":
        assert_reads(load_checkpoint(folder), spec.reference())


def test_adapter_over_a_bare_gpt2_state_dict_and_memory_maps(tmp_path: Path) -> None:
    spec = random_model()
    names = modules(spec, "attn.c_attn")
    merged, pairs = with_lora(spec, names, r=2, scale=3.0)
    maps = modules(spec, "W_mq")
    for module in maps:  # an ordinary [out, in] matrix in the midst of transposed ones
        rows, columns = spec.weights[module + ".weight"].shape
        a, b = np.full((2, columns), 0.5), np.full((rows, 2), 0.25)
        merged.weights[module + ".weight"] = spec.weights[module + ".weight"] + 3.0 * b @ a
        pairs |= {module + ".A": a, module + ".B": b}
    tensors = {f"{n[:-2]}.lora_{n[-1]}.weight": t for n, t in pairs.items()}
    adapter = save_adapter(tmp_path / "adapter", tensors, fan_in_fan_out=True)
    found = load_checkpoint(spec.save(tmp_path / "model"), adapter=adapter)
    assert_reads(found, merged.reference(), MERGED)


def test_an_adapted_head_unties_it(tmp_path: Path) -> None:
    spec = random_model(base="llama", dialect="modern", base_options={"tie_word_embeddings": True})
    embedding = next(n for n in spec.weights if n.endswith("embed_tokens.weight"))
    head = "armt.memory_cell.model.lm_head"
    rows, columns = spec.weights[embedding].shape
    a, b = np.full((2, columns), 0.5), np.full((rows, 2), 0.25)
    adapter = save_adapter(
        tmp_path / "adapter", {head + ".lora_A.weight": a, head + ".lora_B.weight": b}
    )
    merged = RandomModel(
        spec.config,
        spec.weights | {head + ".weight": spec.weights[embedding] + 3.0 * b @ a},
        spec.dtype,
    )
    found = load_checkpoint(save_hub(tmp_path / "model", spec), adapter=adapter)
    assert_reads(found, merged.reference(), MERGED)


def adapter_refusal(tmp_path: Path, changes: dict[str, Array], **config: Any) -> str:
    spec = random_model(base="llama", dialect="modern")
    module = modules(spec, "k_proj")[0]
    a, b = lora_pair(spec, module, 2)
    tensors = {module + ".lora_A.weight": a, module + ".lora_B.weight": b} | changes
    tensors = {name.replace("MODULE", module): t for name, t in tensors.items() if t.size}
    adapter = save_adapter(tmp_path / "adapter", tensors, **config)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(save_hub(tmp_path / "model", spec), adapter=adapter)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "config", "expected"),
    [
        ({}, {"use_dora": True}, "DoRA is not supported"),
        ({"MODULE.lora_magnitude_vector": np.ones(12)}, {}, "DoRA is not supported"),
        ({"MODULE.lora_embedding_A": np.ones((2, 3))}, {}, "kind of LoRA tensor"),
        ({}, {"lora_bias": True}, "biases of LoRA"),
        ({}, {"peft_type": "IA3"}, "expected LORA"),
        ({}, {"r": 3}, "rank 2, the adapter says 3"),
        ({}, {"rank_pattern": {"(a+)+b": 2}}, "too complicated"),
        ({}, {"rank_pattern": {"(": 2}}, "neither a module name"),
        ({}, {"alpha_pattern": {"k_proj": "x"}}, "a positive number"),
        ({}, {"lora_alpha": None}, "lora_alpha: found nothing"),
        ({}, {"modules_to_save": ["W_mv"]}, "no tensor for 'W_mv'"),
        ({"nowhere.weight": np.ones(2)}, {}, "replaces nothing"),
        ({"nowhere.lora_A.weight": np.ones((2, 3))}, {}, "missing: lora_B"),
        ({"MODULE.lora_A.weight": np.ones((2, 5))}, {}, r"found \[2, 5\], expected \[2, 24\]"),
        ({"MODULE.lora_B.weight": np.ones((7, 2))}, {}, r"found \[7, 2\], expected \[12, 2\]"),
        ({"armt.memory_cell.memory": np.ones((9, 9))}, {}, r"found \[9, 9\], expected \[3, 24\]"),
    ],
)
def test_adapter_faults(
    tmp_path: Path, changes: dict[str, Array], config: dict[str, Any], expected: str
) -> None:
    text = adapter_refusal(tmp_path, changes, **config)
    assert expected.replace("\\", "") in text


def test_all_adapter_faults_at_once(tmp_path: Path) -> None:
    text = adapter_refusal(
        tmp_path,
        {"MODULE.lora_A.weight": np.ones((2, 5)), "nowhere.weight": np.ones(2)},
        use_dora=True,
        modules_to_save=["W_mq"],
    )
    for part in ("DoRA", "found [2, 5]", "nowhere.weight", "W_mq"):
        assert part in text


def test_two_adapters_inside_are_refused(tmp_path: Path) -> None:
    spec = random_model(base="llama")
    module = modules(spec, "k_proj")[0]
    a, b = lora_pair(spec, module, 2)
    pairs = {
        f"{module}.lora_{kind}.{name}.weight": t
        for name in ("default", "second")
        for kind, t in (("A", a), ("B", b))
    }
    write_safetensors(tmp_path / "x.safetensors", spec.weights | pairs, dtype="F32")
    facts = {k: spec.config[k] for k in ("dialect", "base_model")} | {"segment_size": 7}
    with pytest.raises(CheckpointError, match="default, second"):
        load_checkpoint(tmp_path / "x.safetensors", lora_alpha=4, **facts)
