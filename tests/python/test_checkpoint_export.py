"""The project's own folder: written whole or not at all, and read back bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from armt._core import SafetensorsFile
from armt.checkpoint import Checkpoint, describe, export_folder, load_checkpoint
from armt.checkpoint.arrays import from_float32, to_float32
from armt.errors import CheckpointError, InvalidArgument
from checkpoint_files import save_adapter, save_hub
from conformance import Case
from reference.random_models import BASES, PREFIXES, random_model
from reference.safetensors import read_safetensors, round_to, write_safetensors

SETTINGS = (
    "decoder",
    "memory",
    "segment_alignment",
    "source_dtype",
    "biases",
    "generation",
)


def assert_equal(a: Checkpoint, b: Checkpoint) -> None:
    for name in SETTINGS:
        assert getattr(a, name) == getattr(b, name), name
    for x, y in zip(a.tensors(), b.tensors(), strict=True):
        assert (x.slot, x.layer, x.dtype) == (y.slot, y.layer, y.dtype)
        assert np.array_equal(x.array, y.array)


def test_conformance_round_trips(conformance_case: Case, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(conformance_case.folder)
    folder = export_folder(checkpoint, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    found = load_checkpoint(folder)
    if checkpoint.merged_lora:  # the merge is done: what is left are plain tensors
        checkpoint = dataclasses.replace(checkpoint, source_dtype=found.source_dtype)
    assert_equal(found, checkpoint)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dialect", PREFIXES)
def test_round_trips(tmp_path: Path, base: str, dialect: str, dtype: str) -> None:
    spec = random_model(base=base, dialect=dialect, dtype=dtype)
    checkpoint = load_checkpoint(spec.save(tmp_path / "in"), eos_token_id=[3, 4])
    once = load_checkpoint(export_folder(checkpoint, tmp_path / "once"))
    assert_equal(once, checkpoint)
    twice = export_folder(once, tmp_path / "twice")
    for name in ("model.safetensors", "config.json"):
        first = (tmp_path / "once" / name).read_bytes()
        if name == "model.safetensors":
            assert (twice / name).read_bytes() == first


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", ["F32", "BF16", "F16"])
def test_conversion(tmp_path: Path, source: str, dtype: str) -> None:
    spec = random_model(base="llama", dialect="modern", dtype=source)
    checkpoint = load_checkpoint(spec.save(tmp_path / "in"))
    folder = export_folder(checkpoint, tmp_path / "out", dtype=dtype)  # type: ignore[arg-type]
    found = load_checkpoint(folder)
    assert found.source_dtype == dtype
    short = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    for a, b in zip(checkpoint.tensors(), found.tensors(), strict=True):
        before, after = to_float32(a.array, a.dtype), to_float32(b.array, b.dtype)
        expected = round_to(before.astype(np.float64), short) if a.array.ndim == 2 else before
        assert np.array_equal(after, expected)


def test_the_files_are_what_the_documentation_says(tmp_path: Path) -> None:
    spec = random_model(base="llama", dialect="modern", armt_options={"use_sink": True})
    folder = export_folder(load_checkpoint(save_hub(tmp_path / "in", spec)), tmp_path / "out")
    tensors = read_safetensors(folder / "model.safetensors")
    assert {"embedding", "memory", "sink", "head", "final_norm", "layers.1.mem_gate_bias"} <= set(
        tensors
    )
    at = "armt.memory_cell.model.model.layers.1."
    parts = [spec.weights[f"{at}layer.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert np.array_equal(tensors["layers.1.qkv"], np.concatenate(parts))
    assert np.array_equal(tensors["layers.1.mem_value"], spec.weights[at + "W_mv.weight"])
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == "armt-1"
    assert config["decoder"]["norm"] == "rms"
    assert config["memory"]["dialect"] == "modern"
    raw = (folder / "model.safetensors").read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 64 == 0


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    """bfloat16 matrices of odd sizes stand behind all float32 vectors."""
    spec = random_model(base="gpt2", dtype="BF16", base_options={"vocab_size": 61, "n_inner": 51})
    folder = export_folder(load_checkpoint(spec.save(tmp_path / "in")), tmp_path / "out")
    file = SafetensorsFile(folder / "model.safetensors")
    assert not any(file.tensor(name).flags.owndata for name in file.names())


def test_merged_lora_is_stored_merged(tmp_path: Path) -> None:
    spec = random_model(base="llama", dialect="modern")
    module = "armt.memory_cell.model.model.layers.0.layer.self_attn.k_proj"
    pair = {
        module + ".lora_A.weight": np.ones((2, 24)),
        module + ".lora_B.weight": np.ones((12, 2)),
    }
    adapter = save_adapter(tmp_path / "adapter", pair)
    merged = load_checkpoint(save_hub(tmp_path / "in", spec), adapter=adapter)
    found = load_checkpoint(export_folder(merged, tmp_path / "out"))
    assert_equal(found, merged)
    with pytest.raises(InvalidArgument, match="takes no adapter"):
        load_checkpoint(tmp_path / "out", adapter=adapter)


def test_tokenizer_files_go_along(tmp_path: Path) -> None:
    folder = random_model().save(tmp_path / "in")
    for name in ("tokenizer.json", "merges.txt", "notes.txt", "optimizer.pt"):
        (folder / name).write_text(name)
    checkpoint = load_checkpoint(folder / "model.safetensors")
    out = export_folder(checkpoint, tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert load_checkpoint(out).tokenizer == out / "tokenizer.json"


def test_float16_range(tmp_path: Path) -> None:
    spec = random_model()
    spec.weights["memory_cell.memory"][0, 0] = 1e5
    checkpoint = load_checkpoint(spec.save(tmp_path / "in"))
    with pytest.raises(CheckpointError, match=r"memory: 1 values exceed the range of float16"):
        export_folder(checkpoint, tmp_path / "out", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    export_folder(checkpoint, tmp_path / "out", dtype="bfloat16")


def test_bfloat16_of_special_numbers() -> None:
    bits = np.array([0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 0x7F800000, 0x80000000, 0x00000001])
    special = bits.astype(np.uint32).view(np.float32)
    back = to_float32(from_float32(special, "bfloat16"), "bfloat16")
    assert np.isnan(back[:2]).all()
    assert back[2:].tolist() == [np.inf, np.inf, 0.0, 0.0]
    assert np.signbit(back[4])


def test_nan_weights_pass_unchanged(tmp_path: Path) -> None:
    spec = random_model()
    spec.weights["memory_cell.memory"][0, 0] = np.nan
    checkpoint = load_checkpoint(spec.save(tmp_path / "in"))
    found = load_checkpoint(export_folder(checkpoint, tmp_path / "out", dtype="float16"))
    (memory,) = [t.array for t in found.tensors() if t.slot == "memory"]
    assert np.isnan(memory[0, 0])


def test_existing_folders_stay(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(random_model().save(tmp_path / "in"))
    (tmp_path / "empty").mkdir()
    export_folder(checkpoint, tmp_path / "empty")
    export_folder(checkpoint, tmp_path / "new" / "deep")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("in", "empty", "file", "link"):
        with pytest.raises(InvalidArgument, match="exists already"):
            export_folder(checkpoint, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(InvalidArgument, match="int8"):
        export_folder(checkpoint, tmp_path / "x", dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_folder(checkpoint, tmp_path / "file" / "below")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_broken_off_export_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    checkpoint = load_checkpoint(random_model().save(tmp_path / "in"))

    def fail() -> Any:
        raise error

    last = dataclasses.replace(checkpoint.plans[-1], read=fail)
    broken = dataclasses.replace(checkpoint, plans=(*checkpoint.plans[:-1], last))
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        export_folder(broken, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    spec = random_model(base="llama", dialect="modern", armt_options={"n_heads": 2})
    return export_folder(load_checkpoint(spec.save(tmp_path / "in")), tmp_path / "out")


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, **options)
    return str(caught.value)


def test_faults_of_an_exported_folder(exported: Path) -> None:
    tensors = read_safetensors(exported / "model.safetensors")
    del tensors["layers.1.qkv"]
    tensors["layers.0.norm1"] = np.ones(25)
    tensors["layers.2.norm1"] = np.ones(24)
    write_safetensors(exported / "model.safetensors", tensors, dtype="F32")
    text = refusal(exported)
    assert "missing: layers.1.qkv, expected [48, 24]" in text
    assert "shape: layers.0.norm1 in model.safetensors, found [25], expected [24]" in text
    assert "extra: layers.2.norm1, found float32 [24]" in text


def edit(folder: Path, path: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    *sections, name = path.split(".")
    section = config
    for part in sections:
        section = section[part]
    section[name] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("format", "armt-2", "another version"),
        ("decoder", None, "decoder: found NoneType"),
        ("decoder.d_model", "24", "decoder.d_model: found '24'"),
        ("decoder.n_layers", 10**9, "decoder.n_layers"),
        ("decoder.norm", "batch", "expected one of layer, rms"),
        ("decoder.colour", 1, "decoder.colour: unknown setting"),
        ("memory.n_heads", 3, "3 memory heads do not divide d_mem"),
        ("memory.memory_tokens", 0, "memory.memory_tokens: found 0"),
        ("memory.d_mem", 0, "memory.d_mem: found 0"),
        ("memory.use_sink", None, "memory.use_sink: found nothing"),
        ("memory", [], "memory: found list"),
        ("biases", ["norm1_bias"], "biases: expected a list"),
        ("head", "yes", "expected true or false"),
        ("segment_alignment", "up", "left, right, center"),
    ],
)
def test_edited_configurations(exported: Path, path: str, value: Any, expected: str) -> None:
    edit(exported, path, value)
    assert expected in refusal(exported)


def test_settings_of_an_exported_folder_that_may_change(exported: Path) -> None:
    found = load_checkpoint(exported, segment_size=9, correction=False, segment_alignment="right")
    assert (found.memory["segment_size"], found.memory["correction"]) == (9, False)
    assert found.segment_alignment == "right"
    with pytest.raises(InvalidArgument, match="segment_size"):
        load_checkpoint(exported, d_mem=4)
    assert "whole number" in refusal(exported, segment_size="9")


def test_description(tmp_path: Path) -> None:
    options = {"n_heads": 2, "use_sink": True, "sliding_window": True}
    spec = random_model(base="llama", dialect="modern", dtype="BF16", armt_options=options)
    folder = spec.save(tmp_path)
    facts = describe(load_checkpoint(folder))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["dialect"] == "modern"
    assert facts["parameters"]["total"] == sum(w.size for w in spec.weights.values())
    maps = [
        w.size for n, w in spec.weights.items() if ".W_m" in n or n.endswith(("memory", "sink"))
    ]
    assert facts["parameters"]["memory"] == sum(maps)
    assert facts["weights"]["dtype"] == "bfloat16"
    # 2 layers of A [2, 24, 12], z [2, 24] and 4 statistics; keys and values [2, 2 heads, 6].
    assert facts["state"]["memory"] == 4 * 2 * (2 * 24 * 12 + 2 * 24 + 4)
    assert facts["state"]["window"] == 4 * 2 * 2 * 12 * 7
    assert facts["state"]["open_segment"] == 4 * 2 * 2 * 12 * (1 + 7 + 3)
    assert facts["notes"] == []


def test_description_tells_what_was_assumed_and_what_has_no_effect(tmp_path: Path) -> None:
    spec = random_model(dialect="paper", memory_gain=0.0)
    del spec.config["armt"]["correction"]
    facts = describe(load_checkpoint(spec.save(tmp_path)))
    assert facts["assumed"] == ["correction = True"]
    assert any("no effect" in note for note in facts["notes"])
    rmt = describe(load_checkpoint(random_model(dialect="rmt").save(tmp_path / "rmt")))
    assert rmt["state"]["memory"] == 4 * 3 * 24


def test_description_reads_the_mapped_files_only(tmp_path: Path) -> None:
    """Nothing is left open once a checkpoint is gone."""
    folder = random_model().save(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    describe(load_checkpoint(folder))
    assert len(os.listdir("/proc/self/fd")) == before
