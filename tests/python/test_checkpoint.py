"""Every checkpoint format gives the tensors and the settings that its files mean."""

from __future__ import annotations

import builtins
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from armt.checkpoint import load_checkpoint
from armt.errors import CheckpointError, InvalidArgument
from canonical import assert_reads, stored_values
from conformance import Case
from reference import load_folder
from reference.arrays import Array
from reference.random_models import BASES, PREFIXES, RandomModel, random_model
from reference.safetensors import write_safetensors
from tolerances import EXACT, Tolerance

MERGED = Tolerance(relative=1e-6)


def test_conformance_folders(conformance_case: Case) -> None:
    model = load_folder(conformance_case.folder)
    checkpoint = load_checkpoint(conformance_case.folder)
    assert_reads(checkpoint, model, MERGED if checkpoint.merged_lora else EXACT)
    armt, memory = conformance_case.armt, checkpoint.memory
    assert memory["memory_tokens"] == armt["num_mem_tokens"]
    assert memory["segment_size"] == armt["segment_size"]
    assert checkpoint.segment_alignment == armt["segment_alignment"]
    assert memory["wrap_positions"] == armt["wrap_pos"]
    for name in ("d_mem", "n_heads", "correction", "use_denom", "gating", "use_sink"):
        if name in armt:
            assert memory[name] == armt[name]
    assert checkpoint.assumed == ()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dialect", PREFIXES)
def test_every_base_dialect_and_type(tmp_path: Path, base: str, dialect: str, dtype: str) -> None:
    spec = random_model(base=base, dialect=dialect, dtype=dtype, seed=3)
    checkpoint = load_checkpoint(spec.save(tmp_path))
    if dtype == "F64":  # the engine's widest type is float32
        spec = RandomModel(
            spec.config, {n: w.astype(np.float32) for n, w in spec.weights.items()}, "F32"
        )
    assert_reads(checkpoint, spec.reference())
    names = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    assert checkpoint.source_dtype == names[dtype]
    dialects = {"modern-inner": "inner"}
    assert checkpoint.memory["dialect"] == dialects.get(dialect, dialect)
    assert checkpoint.memory["normalise_keys"] == dialect.startswith("modern")


OPTIONS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "tied llama": ("llama", "modern", {"tie_word_embeddings": True}, {}),
    "biases": ("llama", "paper", {"attention_bias": True, "mlp_bias": True}, {}),
    "wide heads": ("llama", "modern", {"head_dim": 10}, {}),
    "one kv head": ("llama", "modern", {"num_key_value_heads": 1}, {}),
    "tied neox": ("gpt_neox", "paper", {"tie_word_embeddings": True}, {}),
    "wrap": ("gpt2", "paper", {}, {"wrap_pos": True}),
    "wrap rmt": ("gpt2", "rmt", {}, {"wrap_pos": True}),
    "inner width": ("gpt2", "paper", {"n_inner": 52}, {}),
    "sink and heads": ("gpt_neox", "modern", {}, {"use_sink": True, "n_heads": 4}),
    "gating": ("llama", "modern", {}, {"gating": True, "n_heads": 2}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(tmp_path: Path, option: str) -> None:
    base, dialect, base_options, armt_options = OPTIONS[option]
    spec = random_model(
        base=base, dialect=dialect, base_options=base_options, armt_options=armt_options
    )
    assert_reads(load_checkpoint(spec.save(tmp_path)), spec.reference())


def test_decoder_fields(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    spec = random_model(base="qwen3", dialect="modern", base_options={"rope_scaling": scaling})
    decoder = load_checkpoint(spec.save(tmp_path / "a")).decoder
    assert decoder == {
        "vocab_size": 59,
        "d_model": 24,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 6,
        "d_ff": 40,
        "norm": "rms",
        "norm_eps": 1e-5,
        "activation": "silu",
        "gated_mlp": True,
        "parallel_residual": False,
        "qk_norm": True,
        "attention_scale": 0.0,
        "scale_by_inverse_layer": False,
        "learned_positions": 0,
        "rotary_dims": 6,
        "rope_theta": 10000.0,
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_low_freq": 1.5,
        "rope_high_freq": 4.0,
        "rope_original_length": 64.0,
    }
    options = {"scale_attn_weights": False, "activation_function": "relu"}
    spec = random_model(base="gpt2", base_options=options, armt_options={"wrap_pos": True})
    decoder = load_checkpoint(spec.save(tmp_path / "b")).decoder
    assert decoder["learned_positions"] == 64 + 3
    assert (decoder["attention_scale"], decoder["activation"]) == (1.0, "relu")
    spec = random_model(base="gpt_neox")
    decoder = load_checkpoint(spec.save(tmp_path / "c")).decoder
    assert (decoder["rotary_dims"], decoder["parallel_residual"]) == (4, True)
    assert decoder["activation"] == "gelu_erf"


def bare_facts(spec: RandomModel) -> dict[str, Any]:
    return {"dialect": spec.config["dialect"], "base_model": spec.config["base_model"]}


@pytest.mark.parametrize(
    ("base", "dialect", "options"),
    [
        ("gpt2", "paper", {"wrap_pos": True}),
        ("gpt2", "paper", {}),
        ("gpt2", "rmt", {"wrap_pos": True}),
        ("gpt2", "rmt", {}),
        ("llama", "modern", {"n_heads": 4, "use_sink": True, "num_mem_tokens": 5, "d_mem": 12}),
        ("llama", "modern-inner", {"n_heads": 2}),
    ],
)
def test_shapes_tell_what_is_not_given(
    tmp_path: Path, base: str, dialect: str, options: dict[str, Any]
) -> None:
    spec = random_model(base=base, dialect=dialect, armt_options=options)
    told = load_checkpoint(spec.save(tmp_path / "a"))
    write_safetensors(tmp_path / "b.safetensors", spec.weights, dtype="F32")
    found = load_checkpoint(tmp_path / "b.safetensors", segment_size=7, **bare_facts(spec))
    assert found.memory == told.memory
    assert found.decoder == told.decoder
    assert_reads(found, spec.reference())
    assumed = {"segment_alignment = left", "sliding_window = False"}
    assert set(found.assumed) == assumed | (set() if dialect == "rmt" else {"correction = True"})


def test_gating_is_seen_but_needs_the_heads(tmp_path: Path) -> None:
    options = {"gating": True, "n_heads": 2}
    spec = random_model(base="llama", dialect="modern", armt_options=options)
    write_safetensors(tmp_path / "x.safetensors", spec.weights, dtype="F32")
    facts = bare_facts(spec) | {"segment_size": 7}
    with pytest.raises(CheckpointError, match=r"armt\.n_heads"):
        load_checkpoint(tmp_path / "x.safetensors", **facts)
    memory = load_checkpoint(tmp_path / "x.safetensors", n_heads=2, **facts).memory
    assert (memory["gating"], memory["n_heads"]) == (True, 2)


def test_keywords_win_over_the_file(tmp_path: Path) -> None:
    spec = random_model()
    path = spec.save(tmp_path)
    changed = load_checkpoint(
        path, segment_size=5, correction=False, segment_alignment="right", sliding_window=True, nu=2
    )
    assert changed.memory["segment_size"] == 5
    assert changed.memory["rolls"] == 2
    assert changed.segment_alignment == "right"
    assert (changed.memory["correction"], changed.memory["sliding_window"]) == (False, True)
    assert load_checkpoint(path, segment_size=None).memory["segment_size"] == 7
    with pytest.raises(InvalidArgument, match="segmentsize"):
        load_checkpoint(path, segmentsize=5)


def test_a_file_and_its_configuration_file_are_the_folder(tmp_path: Path) -> None:
    spec = random_model()
    spec.save(tmp_path)
    for path in (tmp_path / "model.safetensors", str(tmp_path / "config.json")):
        assert_reads(load_checkpoint(path), spec.reference())


def test_a_base_configuration_beside_the_weights(tmp_path: Path) -> None:
    spec = random_model()
    spec.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(spec.config["base_model"]))
    found = load_checkpoint(tmp_path, dialect="paper", segment_size=7)
    assert_reads(found, spec.reference())
    (tmp_path / "config.json").rename(tmp_path / "base.json")
    found = load_checkpoint(
        tmp_path, dialect="paper", segment_size=7, base_model=tmp_path / "base.json"
    )
    assert_reads(found, spec.reference())


# ------------------------------------------------------------------ pickles


def save_pickle(path: Path, tensors: Mapping[str, Array], *, wrap: bool = False) -> None:
    import torch

    state = {n: torch.from_numpy(t.astype(np.float32)) for n, t in tensors.items()}
    torch.save({"model_state_dict": state, "step": 3} if wrap else state, path)


def with_copies(spec: RandomModel) -> dict[str, Array]:
    """Second names of all layer tensors, the tied head and old buffers, as older code saves."""
    tensors = dict(spec.weights)
    for name, tensor in spec.weights.items():
        if ".transformer.h." in name:
            tensors[name.replace("model.transformer.h.", "layers.")] = tensor
    for layer in range(2):
        at = f"memory_cell.model.transformer.h.{layer}.layer.attn."
        tensors |= {at + "bias": np.ones((1, 1, 64, 64)), at + "masked_bias": np.array(-1e4)}
        at = f"memory_cell.layers.{layer}.layer.attn."
        tensors |= {at + "bias": np.ones((1, 1, 64, 64)), at + "masked_bias": np.array(-1e4)}
    tensors["memory_cell.model.lm_head.weight"] = spec.weights[
        "memory_cell.model.transformer.wte.weight"
    ]
    return tensors


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model_best.pt"])
@pytest.mark.parametrize("wrap", [False, True])
def test_pickles_with_copies_and_buffers(tmp_path: Path, name: str, wrap: bool) -> None:
    pytest.importorskip("torch")
    spec = random_model(armt_options={"wrap_pos": True})
    (tmp_path / "config.json").write_text(json.dumps(spec.config | {"weights": {"file": name}}))
    save_pickle(tmp_path / name, with_copies(spec), wrap=wrap)
    assert_reads(load_checkpoint(tmp_path), spec.reference())
    assert_reads(load_checkpoint(tmp_path / name), spec.reference())


def test_bfloat16_and_legacy_pickles(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    spec = random_model(dtype="BF16")
    state = {n: torch.from_numpy(t).to(torch.bfloat16) for n, t in spec.weights.items()}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    found = load_checkpoint(tmp_path / "x.pt", segment_size=7, **bare_facts(spec))
    assert found.source_dtype == "bfloat16"
    assert_reads(found, spec.reference())


def test_sharded_pickles(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    spec = random_model()
    spec.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for k in range(2):
        part = {name: spec.weights[name] for name in sorted(spec.weights)[k::2]}
        save_pickle(tmp_path / f"part-{k}.bin", part)
        weight_map |= dict.fromkeys(part, f"part-{k}.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    config = dict(spec.config, weights={"cell_prefix": "memory_cell."})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_reads(load_checkpoint(tmp_path), spec.reference())


def test_no_code_runs_from_a_pickle(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"a": torch.ones(2), "b": Trap()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="without running code"):
        load_checkpoint(tmp_path / "x.pt", segment_size=7, **bare_facts(random_model()))
    assert not (tmp_path / "sprung").exists()


def test_pickles_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    (tmp_path / "x.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r'pip install "armt\[torch\]"'):
        load_checkpoint(tmp_path / "x.bin", segment_size=7, **bare_facts(random_model()))


def test_mixed_types(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    spec = random_model(base="llama", dialect="modern", dtype="BF16")
    half = torch.bfloat16
    state = {
        name: torch.from_numpy(t).to(torch.float32 if "q_proj" in name else half)
        for name, t in spec.weights.items()
    }
    torch.save(state, tmp_path / "x.pt")
    found = load_checkpoint(tmp_path / "x.pt", segment_size=7, **bare_facts(spec))
    assert found.source_dtype == "float32"
    dtypes = {tensor.slot: tensor.dtype for tensor in found.tensors() if tensor.array.ndim == 2}
    assert (dtypes["qkv"], dtypes["mlp_up"]) == ("float32", "bfloat16")
    assert_reads(found, spec.reference())


def test_gpt2_matrices_are_transposed_views(tmp_path: Path) -> None:
    """The tall order of a stored [in, out] matrix is kept: no copy of the weights is made."""
    found = load_checkpoint(random_model().save(tmp_path))
    for tensor in found.tensors():
        if tensor.slot in ("qkv", "attn_out", "mlp_up", "mlp_down"):
            assert tensor.array.flags.f_contiguous
            assert not tensor.array.flags.owndata


def test_a_head_that_differs_from_the_tied_embedding_is_kept(tmp_path: Path) -> None:
    spec = random_model()
    head = "memory_cell.model.lm_head.weight"
    own = np.full_like(spec.weights["memory_cell.model.transformer.wte.weight"], 0.5)
    write_safetensors(tmp_path / "x.safetensors", spec.weights | {head: own}, dtype="F32")
    found = load_checkpoint(tmp_path / "x.safetensors", segment_size=7, **bare_facts(spec))
    assert np.array_equal(stored_values(found)["head", 0], own)
