"""Refusals that are met seldom: what is said, and that nothing else happens."""

from __future__ import annotations

import json
import logging
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import armt
import state_format as sf
from armt import _core
from armt.checkpoint import load_checkpoint
from armt.errors import CheckpointError, InvalidArgument, StateError
from reference.random_models import RandomModel, random_model
from reference.safetensors import write_safetensors
from variants import VARIANTS, Zoo

VARIANT = next(v for v in VARIANTS if v.name == "modern-llama")
GPT2 = VARIANTS[0]


def saved(folder: Path, base: str = "llama", dialect: str = "paper", **changes: Any) -> RandomModel:
    """A small model's folder, with changes to its base configuration."""
    spec = random_model(base=base, dialect=dialect)
    spec.save(folder)
    config = spec.config | {"base_model": spec.config["base_model"] | changes}
    (folder / "config.json").write_text(json.dumps(config))
    return spec


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **options)
    return str(caught.value)


SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "more than a whole": ("gpt_neox", {"rotary_pct": 1.5}, "expected a share in (0, 1]"),
    "an odd number of features": ("gpt_neox", {"rotary_pct": 0.2}, "expected an even count"),
    "parts of heads": ("llama", {"partial_rotary_factor": 0.5}, "whole heads are rotated"),
    "a list of scalings": ("llama", {"rope_scaling": [1]}, "found list, expected an object"),
    "a long number": ("llama", {"rope_theta": 10**400}, "rope_theta: found"),
    "a fraction of layers": ("llama", {"num_hidden_layers": 2.5}, "expected a whole number"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_the_base_model(tmp_path: Path, case: str) -> None:
    base, changes, expected = SETTINGS[case]
    saved(tmp_path, base, **changes)
    assert expected in refusal(tmp_path)


def test_whole_numbers_may_be_written_with_a_point(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    layers = load_checkpoint(tmp_path / "a").decoder["n_layers"]
    saved(tmp_path / "b", num_hidden_layers=float(layers))
    assert load_checkpoint(tmp_path / "b").decoder == load_checkpoint(tmp_path / "a").decoder


def test_the_rotary_base_in_its_newer_place(tmp_path: Path) -> None:
    saved(tmp_path / "a", rope_theta=5000.0)
    saved(tmp_path / "b", rope_theta=1.0, rope_parameters={"rope_theta": 5000.0})
    expected = load_checkpoint(tmp_path / "a").decoder
    assert expected["rope_theta"] == 5000.0
    assert load_checkpoint(tmp_path / "b").decoder == expected


def test_folders_and_files_that_a_configuration_names(tmp_path: Path) -> None:
    spec = saved(tmp_path)
    for section, expected in (
        ({"folder": "absent"}, "is not a folder"),
        ({"file": "absent.safetensors"}, "does not exist"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(spec.config | {"weights": section}))
        assert expected in refusal(tmp_path)
    saved(tmp_path)
    with pytest.raises(InvalidArgument, match="base_model: found int"):
        load_checkpoint(tmp_path, base_model=3)


def test_the_only_weight_file_is_found_under_any_name(tmp_path: Path) -> None:
    spec = random_model(base="llama", dialect="paper")
    spec.save(tmp_path)
    expected = load_checkpoint(tmp_path).tensors
    (tmp_path / "model.safetensors").rename(tmp_path / "step-100.safetensors")
    config = {name: value for name, value in spec.config.items() if name != "weights"}
    prefix = spec.config["weights"].get("cell_prefix")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load_checkpoint(tmp_path, cell_prefix=prefix).tensors
    for a, b in zip(found(), expected(), strict=True):
        assert (a.slot, a.layer) == (b.slot, b.layer) and np.array_equal(a.array, b.array)


def test_an_old_torch_reads_no_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(1)}, path)
    facts = {"dialect": "paper", "base_model": random_model().config["base_model"]}
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    assert "CVE-2025-32434" in refusal(path, segment_size=4, **facts)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs PyTorch" in refusal(path, segment_size=4, **facts)


def adapter(folder: Path, tensors: dict[str, Any], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"r": 2, "lora_alpha": 4, "peft_type": "LORA", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(folder / "adapter_model.safetensors", tensors, dtype="F32")
    return folder


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    spec = saved(tmp_path / "model")
    name = next(n for n in spec.weights if n.endswith("q_proj.weight"))
    stem = "base_model.model." + name.removesuffix(".weight")
    rows, columns = spec.weights[name].shape
    a, b = np.ones((2, columns)), np.ones((rows, 2))
    whole = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    good = load_checkpoint(tmp_path / "model", adapter=adapter(tmp_path / "good", whole))
    assert good.merged_lora
    for number, (tensors, settings, expected) in enumerate(
        (
            ({f"{stem}.lora_A.weight": a}, {}, "missing: lora_B"),
            ({f"{stem}.lora_B.weight": b}, {}, "missing: lora_A"),
            (whole | {f"{stem}.lora_A.weight": np.ones(3)}, {}, "expected LoRA of a matrix"),
            (whole | {f"{stem}.lora_embedding_Q": a}, {}, "lora_embedding_Q"),
            (whole, {"rank_pattern": [1]}, "rank_pattern: expected an object"),
        )
    ):
        folder = adapter(tmp_path / f"a{number}", tensors, **settings)
        assert expected in refusal(tmp_path / "model", adapter=folder)
    (tmp_path / "good" / "adapter_model.safetensors").unlink()
    assert "expected adapter_model" in refusal(tmp_path / "model", adapter=tmp_path / "good")


# ---------------------------------------------------------------- the compiled part


@pytest.fixture(scope="module")
def engine(zoo: Zoo) -> armt.Engine:
    return zoo.engine(VARIANT, threads=1)


def facts_of(engine: armt.Engine) -> dict[str, Any]:
    return {"decoder": dict(engine.checkpoint.decoder), "memory": dict(engine.checkpoint.memory)}


def test_settings_of_the_engine(engine: armt.Engine) -> None:
    right = facts_of(engine)
    for section in right:
        for change, expected in (
            ({"bogus": 1, "other": 2}, "unknown fields: bogus, other"),
            ({"n_layers" if section == "decoder" else "d_mem": "many"}, "has the wrong type"),
        ):
            with pytest.raises(InvalidArgument, match=expected):
                _core.Engine(**(right | {section: right[section] | change}))
    for option in ({"dtype": "int3"}, {"schedule": "none"}, {"on_nonfinite": "maybe"}):
        with pytest.raises(InvalidArgument, match=re.escape(next(iter(option.values())))):
            _core.Engine(**right, **option)


def test_weights_that_are_missing_or_no_matrices(engine: armt.Engine) -> None:
    bare = _core.Engine(**facts_of(engine))
    with pytest.raises(CheckpointError, match="layer 1"):
        bare.finish_loading()
    for array, expected in (
        (np.zeros(3, np.float32), "1 dimensions, expected 2"),
        (np.zeros((3, 3), np.float64), "not of type float32"),
        (np.zeros((3, 4), np.float32), r"found shape \[3, 4\]"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            bare.load_matrix("embedding", 0, array, "float32")


def test_ids_that_are_no_rows_of_integers(engine: armt.Engine) -> None:
    session = engine.session()
    for ids, expected in (
        (np.zeros((2, 2), np.int32), "2"),
        (np.zeros(2, np.float32), "float32"),
        (np.array([1, engine.vocab_size], np.uint64), "position 1"),
        (np.array([0, 2**63 + 1], np.uint64), "position 1"),
        (np.array([2**40], np.int64), "position 0"),
    ):
        with pytest.raises(InvalidArgument, match=expected):
            session.feed(ids)
    for bad in (np.zeros((1, 1), np.int32), np.zeros(1, np.float32)):
        with pytest.raises(InvalidArgument, match="token ids"):
            session._core.score(bad, write=True)
    assert session.tokens == 0
    session.feed(np.arange(6, dtype=np.uint16)[::2])
    want = engine.session()
    want.feed([0, 2, 4])
    assert session.logits.tobytes() == want.logits.tobytes()


def test_batches_that_cannot_be(engine: armt.Engine) -> None:
    with pytest.raises(InvalidArgument, match=r"expected \[batch, tokens\]"):
        engine.forward(np.zeros((1, 1, 2), np.int32))
    with pytest.raises(InvalidArgument, match="max_new_tokens"):
        engine.generate([[1, 2]], max_new_tokens=-1)
    with pytest.raises(InvalidArgument, match="padding only"):
        engine.generate([[1, 2], [1, 2]], attention_mask=[[1, 1], [0, 0]], max_new_tokens=1)
    flat = engine.forward([1, 2, 3], attention_mask=[1, 1, 1]).logits
    assert flat.tobytes() == engine.forward([[1, 2, 3]]).logits.tobytes()


def test_sessions_of_two_engines_do_not_mix(engine: armt.Engine, zoo: Zoo) -> None:
    other = zoo.engine(GPT2, threads=1)
    mine, theirs = engine.session(), other.session()
    mine.feed([1])
    theirs.feed([1])
    for call in (
        lambda: engine.step_many([(mine, [1, 2]), (theirs, [1, 2])]),
        lambda: engine.generate_many([mine, theirs], 2),
    ):
        with pytest.raises(InvalidArgument, match="another engine"):
            call()
    with pytest.raises(InvalidArgument, match="another engine"):
        _core.choose([mine._core, theirs._core], [_core.SamplingParams()] * 2)
    with pytest.raises(InvalidArgument, match="params: found 1 entries for 2 sessions"):
        _core.choose([mine._core, theirs._core], [_core.SamplingParams()])
    with pytest.raises(StateError):
        other.session(state=mine.state)
    assert (mine.tokens, theirs.tokens) == (1, 1)


def test_a_state_shows_itself(engine: armt.Engine) -> None:
    session = engine.session()
    session.step(np.arange(engine.segment_size))
    loaded = armt.State.from_bytes(session.state.to_bytes())
    for state in (session.state, loaded):
        assert re.fullmatch(r"<armt\.State tokens=\d+ segments=1 bytes=[1-9]\d*>", repr(state))
        with pytest.raises(InvalidArgument, match=r"found shape \(2, 3\), expected \[heads"):
            state.recall(0, np.ones((2, 3), np.float32))
        with pytest.raises(InvalidArgument, match="layer"):
            state.memory(99)
    for layer in range(loaded.layers):
        for a, b in zip(loaded.memory(layer), session.state.memory(layer), strict=True):
            assert (a is None and b is None) or np.array_equal(a, b)


def test_blocks_of_a_state_in_another_order(engine: armt.Engine) -> None:
    session = engine.session()
    session.feed(np.arange(engine.segment_size + 2) % engine.vocab_size)
    blocks = sf.parse(session.state.to_bytes())
    assert armt.State.from_bytes(sf.seal(blocks)).tokens == session.tokens
    for i in range(len(blocks)):
        for changed in (
            [*blocks[: i + 1], *blocks[i:]],
            [*blocks[:i], *blocks[i + 1 :], blocks[i]] if i + 1 < len(blocks) else blocks[:-1],
        ):
            with pytest.raises(StateError):
                armt.State.from_bytes(sf.seal(changed))


ESCAPES = {
    r"\u0905": "\u0905",
    r"\u00E9\u20aC": "\u00e9\u20ac",
    r"\uD83D\uDE00": "\U0001f600",
    r"\"\\\/\b\f\n\r\t": '"\\/\b\f\n\r\t',
}


def header_of(written: str) -> str:
    return '{"' + written + '": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'


@pytest.mark.parametrize("written", ESCAPES)
def test_names_of_tensors_with_escapes(tmp_path: Path, written: str) -> None:
    text = header_of(written)
    data = struct.pack("<Q", len(text)) + text.encode() + struct.pack("<f", 1.5)
    (tmp_path / "x").write_bytes(data)
    file = _core.SafetensorsFile(tmp_path / "x")
    assert file.names() == [ESCAPES[written]] == list(json.loads(text))
    assert file.tensor(ESCAPES[written]).tolist() == [1.5]


@pytest.mark.parametrize("written", [r"\u12G4", r"\u12", r"\uD83D", r"\uDE00x", r"\x41", "\\"])
def test_escapes_that_are_none(tmp_path: Path, written: str) -> None:
    text = header_of(written)
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(4))
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "x"))):
        _core.SafetensorsFile(tmp_path / "x")


def test_positions_past_the_table(zoo: Zoo) -> None:
    engine = zoo.engine(GPT2, threads=1)
    session = engine.session()
    session.feed(np.ones(engine.segment_size, np.int32))
    before = session.state.to_bytes()
    with pytest.raises(InvalidArgument, match="position"):
        list(session.generate(1000, rollover=False, stop_ids=()))
    assert session.tokens >= engine.segment_size
    again = engine.session(state=armt.State.from_bytes(before))
    again.feed([1])
    assert again.segments == 1


# ---------------------------------------------------------------------------- log


def record_of(error: Exception | None) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("armt.server", logging.ERROR, "x.py", 1, "it failed", None, info)
    record.fields = {"route": "/v1/x", "status": 500}
    return record


def test_lines_of_the_servers_log() -> None:
    logs = pytest.importorskip("armt.server.logs", reason='needs the extra "server"')
    try:
        raise ValueError("why")
    except ValueError as error:
        failed = record_of(error)
    line = json.loads(logs.JsonLines().format(failed))
    assert (line["event"], line["level"], line["status"]) == ("it failed", "error", 500)
    assert "ValueError: why" in line["error"]
    plain = logs.PlainLines().format(failed)
    assert re.match(r"\d\d:\d\d:\d\d it failed route=/v1/x status=500\nTraceback", plain)
    assert "error" not in json.loads(logs.JsonLines().format(record_of(None)))
    assert "Traceback" not in logs.PlainLines().format(record_of(None))
