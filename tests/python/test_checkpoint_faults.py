"""What does not load: one CheckpointError that lists everything, and every refusal."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from armt.checkpoint import load_checkpoint
from armt.errors import CheckpointError
from checkpoint_files import hub_config, save_hub, write_index
from reference.random_models import random_model
from reference.safetensors import write_safetensors


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **options)
    return str(caught.value)


def test_missing_extra_and_misshapen_tensors_in_one_error(tmp_path: Path) -> None:
    spec = random_model(base="llama", dialect="modern")
    at = "armt.memory_cell.model.model.layers."
    tensors = dict(spec.weights)
    del tensors[at + "0.layer.mlp.up_proj.weight"], tensors["armt.memory_cell.memory"]
    del tensors[at + "1.W_mb.bias"]
    tensors[at + "1.layer.self_attn.k_proj.weight"] = np.ones((7, 24))
    tensors[at + "0.W_mq.weight"] = np.ones((24, 8))
    tensors[at + "2.layer.mlp.up_proj.weight"] = np.ones((40, 24))
    tensors[at + "0.mlp.up_proj.weight"] = np.ones((40, 24))
    tensors["something.else"] = np.ones(3)
    tensors["armt.memory_cell.layers.7.W_mb.bias"] = np.ones(1)
    tensors[at + "0.layer.self_attn.rotary_emb.inv_freq"] = np.ones(3)
    spec.save(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", tensors, dtype="F32")
    text = refusal(tmp_path)
    for line in (
        "missing: armt.memory_cell.memory, expected [3, 24]",
        f"missing: {at}0.layer.mlp.up_proj.weight, expected [40, 24]",
        f"missing: {at}1.W_mb.bias, expected [1]",
        f"shape: {at}1.layer.self_attn.k_proj.weight in model.safetensors,"
        " found [7, 24], expected [12, 24]",
        f"shape: {at}0.W_mq.weight in model.safetensors, found [24, 8], expected [8, 24]",
        f"extra: {at}2.layer.mlp.up_proj.weight in model.safetensors, found float32 [40, 24]",
        f"extra: {at}0.mlp.up_proj.weight",
        "extra: something.else",
        "extra: armt.memory_cell.layers.7.W_mb.bias",
        f"extra: {at}0.layer.self_attn.rotary_emb.inv_freq",
    ):
        assert line in text
    assert "10 problems" in text
    assert str(tmp_path / "config.json") in text.splitlines()[-1]


@pytest.mark.parametrize("base", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("dialect", ["paper", "rmt"])
def test_every_tensor_is_missed_and_measured(tmp_path: Path, base: str, dialect: str) -> None:
    spec = random_model(base=base, dialect=dialect)
    spec.save(tmp_path)
    for name, tensor in spec.weights.items():
        others = {n: t for n, t in spec.weights.items() if n != name}
        write_safetensors(tmp_path / "model.safetensors", others, dtype="F32")
        if name not in ("memory_cell.model.lm_head.weight", "memory_cell.model.embed_out.weight"):
            assert f"missing: {name}, expected" in refusal(tmp_path)
        wrong = others | {name: np.concatenate([tensor, tensor[:1]])}
        write_safetensors(tmp_path / "model.safetensors", wrong, dtype="F32")
        text = refusal(tmp_path)
        assert f"shape: {name} in model.safetensors, found" in text
        assert "1 problem\n" in text


def test_integers_and_unknown_types(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    spec = random_model()
    state = {name: torch.from_numpy(t) for name, t in spec.weights.items()}
    state["memory_cell.memory"] = state["memory_cell.memory"].to(torch.int32)
    name = "memory_cell.model.transformer.ln_f.bias"
    state[name] = state[name].to(torch.complex64)
    torch.save(state, tmp_path / "x.pt")
    facts = {k: spec.config[k] for k in ("dialect", "base_model")}
    text = refusal(tmp_path / "x.pt", segment_size=7, **facts)
    assert "dtype: memory_cell.memory in x.pt, found int32" in text
    assert f"dtype: {name} in x.pt, found complex64" in text


def test_what_else_a_pickle_may_hold(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    spec = random_model()
    facts = {k: spec.config[k] for k in ("dialect", "base_model")} | {"segment_size": 7}
    for content, expected in (
        ([1, 2], "found list"),
        ({}, "found dict"),
        ({"optimizer": {"lr": 1.0}, "step": 3}, "'optimizer': dict, 'step': int"),
        ({"memory": torch.ones(2, 2).to_sparse()}, "dense tensor"),
        ({"memory": torch.ones(2, 2, device="meta")}, "dense tensor"),
    ):
        torch.save(content, tmp_path / "x.pt")
        assert expected in refusal(tmp_path / "x.pt", **facts)
    (tmp_path / "x.pt").write_bytes(b"not a pickle")
    assert "torch.save" in refusal(tmp_path / "x.pt", **facts)


REFUSED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], str]] = {
    "no memory tokens": ("gpt2", "paper", {}, {"num_mem_tokens": 0}, "num_mem_tokens: found 0"),
    "previous input": (
        "llama",
        "modern",
        {},
        {"attend_to_previous_input": True},
        "attend_to_previous_input",
    ),
    "adaptive": ("llama", "modern", {}, {"act_on": True}, "adaptive computation"),
    "wrap and sink": ("gpt2", "modern", {}, {"wrap_pos": True, "use_sink": True}, "with a sink"),
    "wrap and rotary": ("llama", "modern", {}, {"wrap_pos": True}, "learned position table"),
    "wrap and inner": ("gpt2", "modern-inner", {}, {"wrap_pos": True}, "inner loop has none"),
    "inner, right": (
        "llama",
        "modern-inner",
        {},
        {"segment_alignment": "right"},
        "inner loop has only left",
    ),
    "heads and d_mem": ("llama", "modern", {}, {"n_heads": 3}, "do not divide d_mem 8"),
    "heads and width": ("llama", "modern", {}, {"n_heads": 16, "d_mem": 16}, "divide width 24"),
    "paper with heads": ("gpt2", "paper", {}, {"n_heads": 2}, "paper dialect has no such"),
    "paper with gating": ("gpt2", "paper", {}, {"gating": True}, "paper dialect has no such"),
    "paper with a sink": ("gpt2", "paper", {}, {"use_sink": True}, "paper dialect has no such"),
    "paper, no denominator": ("gpt2", "paper", {}, {"use_denom": False}, "paper dialect has no"),
    "rmt with a sink": ("gpt2", "rmt", {}, {"use_sink": True}, "RMT has no sink"),
    "long segments": ("gpt2", "paper", {}, {"segment_size": 62}, "61 tokens at most"),
    "alignment": ("gpt2", "paper", {}, {"segment_alignment": "middle"}, "found 'middle'"),
    "misspelt": ("gpt2", "paper", {}, {"corection": False}, "armt.corection: unknown setting"),
    "not a number": ("gpt2", "paper", {}, {"segment_size": "7"}, "found '7', expected a whole"),
    "not a flag": ("gpt2", "paper", {}, {"correction": "yes"}, "expected true or false"),
    "too many rolls": ("gpt2", "paper", {}, {"nu": 1000}, "nu: found 1000"),
    "base window": ("mistral", "paper", {"sliding_window": 9}, {}, "10 rows to see"),
    "window of two": (
        "mistral",
        "paper",
        {"sliding_window": 16},
        {"sliding_window": True},
        "17 rows to see",
    ),
    "unknown base": ("gpt2", "paper", {"model_type": "mamba"}, {}, "found 'mamba'"),
    "activation": ("gpt2", "paper", {"activation_function": "tanh"}, {}, "found 'tanh'"),
    "rope scaling": ("llama", "paper", {"rope_scaling": {"type": "yarn"}}, {}, "'yarn'"),
    "rope factor": (
        "llama",
        "paper",
        {"rope_scaling": {"type": "linear"}},
        {},
        "rope_scaling.factor: found nothing",
    ),
    "rope frequencies": (
        "llama",
        "paper",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 1,
                "original_max_position_embeddings": 64,
            }
        },
        {},
        "above low_freq_factor",
    ),
    "heads and width of gpt2": ("gpt2", "paper", {"n_head": 5}, {}, "do not divide the width"),
    "quantised": ("llama", "paper", {"quantization_config": {"bits": 4}}, {}, "quantised"),
    "cross attention": ("gpt2", "paper", {"add_cross_attention": True}, {}, "cross-attention"),
    "layers without end": ("gpt2", "paper", {"n_layer": 10**9}, {}, "n_layer: found 1000000000"),
    "huge number": ("gpt2", "paper", {"vocab_size": 10**5000}, {}, "vocab_size: found int"),
    "infinite": ("llama", "paper", {"rope_theta": 1e999}, {}, "found Infinity"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_settings(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, dialect, base_changes, armt_changes, expected = REFUSED[case]
    spec = random_model(base=base, dialect=dialect)
    spec.save(tmp_path / "bare")
    config = dict(spec.config)
    config["base_model"] = spec.config["base_model"] | base_changes
    config["armt"] = spec.config["armt"] | armt_changes
    if case == "huge number":
        text = json.dumps(config | {"base_model": config["base_model"] | {"vocab_size": 0}})
        text = text.replace('"vocab_size": 0', '"vocab_size": ' + "9" * 5000)
        expected = "not a valid JSON file"
    else:
        text = json.dumps(config)
    (tmp_path / "bare" / "config.json").write_text(text)
    assert expected in refusal(tmp_path / "bare")
    in_hub = dialect.startswith("modern") and not case.startswith(("heads", "misspelt"))
    if in_hub:
        changes = armt_changes | {"base_model_config": config["base_model"]}
        assert expected in refusal(save_hub(tmp_path / "hub", spec, **changes))


def test_a_hundred_thousand_unknown_tensors(tmp_path: Path) -> None:
    count = 100_000
    header = {
        f"memory_cell.model.transformer.h.{i}.layer.x": {
            "dtype": "F32",
            "shape": [],
            "data_offsets": [4 * i, 4 * i + 4],
        }
        for i in range(count)
    }
    spec = random_model()
    spec.save(tmp_path)
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + b"\0" * (4 * count)
    (tmp_path / "model.safetensors").write_bytes(data)
    started = time.process_time()
    assert "found more than 3000 tensors" in refusal(tmp_path)
    assert time.process_time() - started < 1.0


def test_long_lists_are_cut(tmp_path: Path) -> None:
    spec = random_model()
    spec.save(tmp_path)
    tensors = {f"other.{i}": np.ones(1) for i in range(500)}
    write_safetensors(tmp_path / "model.safetensors", spec.weights | tensors, dtype="F32")
    text = refusal(tmp_path)
    assert "500 problems" in text
    assert text.splitlines()[-2].endswith("and 300 more")


def test_all_settings_are_judged_at_once(tmp_path: Path) -> None:
    spec = random_model(base="gpt2", dialect="modern")
    changes = {
        "act_on": True,
        "attend_to_previous_input": True,
        "wrap_pos": True,
        "use_sink": True,
        "n_heads": 5,
        "segment_size": -1,
    }
    text = refusal(save_hub(tmp_path, spec, **changes))
    assert "6 problems" in text
    for name in changes:
        assert f"armt.{name}" in text or name == "use_sink"  # a part of wrap_pos's line


def test_facts_that_nobody_gave(tmp_path: Path) -> None:
    spec = random_model()
    path = tmp_path / "x.safetensors"
    write_safetensors(path, spec.weights, dtype="F32")
    assert "no dialect and no base_model" in refusal(path)
    facts = {"dialect": "paper", "base_model": spec.config["base_model"]}
    assert "segment_size: found nothing" in refusal(path, **facts)
    assert "found 'newest'" in refusal(path, **(facts | {"dialect": "newest"}))


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    assert "nothing is downloaded" in refusal(tmp_path / "org" / "model")
    assert "found the weight files: none" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "regular file" in refusal(tmp_path / "pipe.safetensors")
    for name in ("a.safetensors", "b.safetensors"):
        write_safetensors(tmp_path / name, {"a": np.ones(2)}, dtype="F32")
    assert "a.safetensors, b.safetensors" in refusal(tmp_path)


BROKEN_JSON = {
    "cut": b'{"dialect": "paper"',
    "a list": b"[]",
    "a key twice": b'{"dialect": "paper", "dialect": "rmt"}',
    "deep": b'{"dialect": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "not a number": b'{"dialect": NaN}',
    "not UTF-8": b'{"dialect": "\xff\xfe"}',
    "empty": b"",
    "wrong section": b'{"dialect": "paper", "base_model": [1]}',
    "wrong weights": b'{"dialect": "paper", "base_model": {"model_type": "gpt2"}, "weights": 3}',
}


@pytest.mark.parametrize("kind", BROKEN_JSON)
def test_broken_configuration_files(tmp_path: Path, kind: str) -> None:
    random_model().save(tmp_path)
    (tmp_path / "config.json").write_bytes(BROKEN_JSON[kind])
    assert "config.json" in refusal(tmp_path)


def test_configuration_files_that_are_no_files(tmp_path: Path) -> None:
    random_model().save(tmp_path)
    (tmp_path / "base").mkdir()
    os.mkfifo(tmp_path / "base" / "pipe.json")
    assert "regular file" in refusal(tmp_path, base_model=tmp_path / "base" / "pipe.json")
    assert "cannot be opened" in refusal(tmp_path, base_model=tmp_path / "absent.json")


ESCAPES = ["/etc/passwd", "../outside.safetensors", "a/../../outside.safetensors", "", ".", "..", 7]


@pytest.mark.parametrize("name", [*ESCAPES, "a\0b", "..\\outside.safetensors"])
def test_file_names_do_not_lead_out_of_the_folder(tmp_path: Path, name: Any) -> None:
    spec = random_model(base="llama", dialect="modern")
    folder = tmp_path / "model"
    spec.save(folder)
    write_safetensors(tmp_path / "outside.safetensors", spec.weights, dtype="F32")
    for section in ({"file": name}, {"folder": name}, {"adapter_folder": name}):
        (folder / "config.json").write_text(json.dumps(spec.config | {"weights": section}))
        assert "expected one inside" in refusal(folder)
    save_hub(folder, spec, shards=2)
    (folder / "model.safetensors").unlink()
    write_index(folder, dict.fromkeys(spec.weights, name))
    text = refusal(folder)
    assert "expected one inside" in text or "is missing" in text


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    change(index)
    write_index(folder, index)
    return folder


def test_faults_of_an_index_are_listed_at_once(tmp_path: Path) -> None:
    spec = random_model(base="llama", dialect="modern")
    folder = save_hub(tmp_path, spec, shards=4)
    first, second, third, fourth = sorted(p.name for p in folder.glob("*.safetensors"))
    names = sorted(spec.weights)
    (folder / first).unlink()
    (folder / second).write_bytes(b"12345678")

    def change(index: dict[str, str]) -> None:
        index[names[2]] = fourth  # lies in the third
        index["armt.memory_cell.ghost"] = fourth
        index["armt.memory_cell.stray"] = "absent.safetensors"

    text = refusal(edit_index(folder, change))
    assert f"the shard {first} is missing" in text
    assert "the shard absent.safetensors is missing" in text
    assert f"{folder / second}: " in text
    assert f"missing: {names[2]}, which the index expects in {fourth}" in text
    assert f"extra: {names[2]} in {third}" in text
    assert f"missing: armt.memory_cell.ghost, which the index expects in {fourth}" in text


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_map(tmp_path: Path, index: dict[str, Any]) -> None:
    spec = random_model(base="llama", dialect="modern")
    (tmp_path / "config.json").write_text(json.dumps(hub_config(spec)))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "expected the object weight_map" in refusal(tmp_path)


def test_unknown_architecture(tmp_path: Path) -> None:
    spec = random_model(base="llama", dialect="modern")
    folder = save_hub(tmp_path, spec, architectures=["LlamaForCausalLM"])
    assert "architectures: found ['LlamaForCausalLM']" in refusal(folder)


def test_the_same_tensor_under_two_names(tmp_path: Path) -> None:
    spec = random_model(base="llama")
    name = "memory_cell.model.model.norm.weight"
    second = "memory_cell.model.base_model.model.model.norm.weight"
    spec.save(tmp_path)
    tensors = spec.weights | {second: spec.weights[name]}
    write_safetensors(tmp_path / "model.safetensors", tensors, dtype="F32")
    assert "stored twice" in refusal(tmp_path)
