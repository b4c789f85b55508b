"""Hostile checkpoints through the whole load path: refused by a typed error, soon and in little
memory; no code runs, nothing outside the folder is shown, messages and logs hold no contents."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import armt
from reference.random_models import random_model

SECONDS, MEBIBYTES = 1.0, 200

LIMITED = """
import resource, sys, time
import armt
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.process_time()
try:
    armt.Engine.from_pretrained(sys.argv[1], device="cpu", threads=1)
    print("opened")
except (armt.CheckpointError, armt.InvalidArgument) as error:
    print("refused", len(str(error)))
seconds = time.process_time() - begin
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print(seconds, grown)
"""


def limited(path: Path) -> tuple[str, float, int]:
    """Loads in a process of its own: result, processor seconds, MiB."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result, figures = done.stdout.splitlines()
    seconds, grown = figures.split()
    return result.split()[0], float(seconds), int(grown)


def with_header(path: Path, text: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def many_tensors() -> bytes:
    return json.dumps({f"t.{i}": entry([1], 4 * i, 4 * i + 4) for i in range(100_000)}).encode()


def deep_brackets() -> bytes:
    return b'{"a":' + b"[" * 1_000_000


def long_name() -> bytes:
    return b'{"' + b"a" * 50_000_000 + b'":{}}'


def repeated_faults() -> bytes:
    """As long as a header may be, every entry wrong."""
    one = b',"%07d":{"dtype":"X","shape":[],"data_offsets":[0,4]}'
    count = 99_000_000 // len(one % 0)
    return b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}' + b"".join(
        one % i for i in range(count)
    )


HEADERS: dict[str, Callable[[], bytes]] = {
    "a hundred thousand tensors": many_tensors,
    "overlapping": lambda: json.dumps({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}).encode(),
    "duplicate": lambda: (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    ),
    "huge dimensions": lambda: json.dumps({"a": entry([2**62, 2**62, 0], 0, 0)}).encode(),
    "product that wraps to 16": lambda: json.dumps({"a": entry([2**32, 2**32 + 1], 0, 4)}).encode(),
    "huge offsets": lambda: json.dumps({"a": entry([1], 2**62, 2**62 + 4)}).encode(),
    "brackets": deep_brackets,
    "a name of fifty megabytes": long_name,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model().save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", HEADERS)
def test_header_bombs(folder: Path, name: str) -> None:
    with_header(folder / "model.safetensors", HEADERS[name](), b"\0" * 400_000)
    result, seconds, grown = limited(folder)
    assert result == "refused"
    assert seconds < SECONDS
    assert grown < MEBIBYTES


def test_a_header_of_a_hundred_megabytes(folder: Path) -> None:
    with_header(folder / "model.safetensors", repeated_faults() + b"}", b"\0" * 4)
    result, seconds, grown = limited(folder)
    assert result == "refused"
    assert seconds < SECONDS
    assert grown < MEBIBYTES


@pytest.mark.parametrize("claim", [2**63 - 1, 2**64 - 1, 100_000_001, 99_999_999])
def test_sparse_files_that_claim_much(folder: Path, claim: int) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write(claim.to_bytes(8, "little"))
        file.truncate(2**36)
    result, seconds, grown = limited(folder)
    assert result == "refused"
    assert seconds < SECONDS
    assert grown < MEBIBYTES


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("base_model", "n_embd", 2**40),
        ("base_model", "n_layer", 10**9),
        ("base_model", "vocab_size", 2**62),
        ("base_model", "n_positions", 2**62),
        ("armt", "d_mem", 2**40),
        ("armt", "segment_size", 2**62),
        ("armt", "num_mem_tokens", 2**40),
    ],
)
def test_huge_sizes_in_the_configuration(folder: Path, part: str, key: str, value: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    result, seconds, grown = limited(folder)
    assert result == "refused"
    assert seconds < SECONDS
    assert grown < MEBIBYTES


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_no_pickle_runs(tmp_path: Path, name: str) -> None:
    """With torch or without, plain or in the archive that torch.save writes."""
    model = tmp_path / "model"
    random_model().save(model)
    (model / "model.safetensors").unlink()
    config = json.loads((model / "config.json").read_text())
    config["weights"]["file"] = name
    (model / "config.json").write_text(json.dumps(config))
    sprung = tmp_path / "sprung"
    payload = pickle.dumps({"memory": Trap(sprung)})
    (model / name).write_bytes(payload)
    with pytest.raises(armt.CheckpointError):
        armt.Engine.from_pretrained(model, device="cpu")
    with zipfile.ZipFile(model / name, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(armt.CheckpointError):
        armt.Engine.from_pretrained(model, device="cpu")
    assert not sprung.exists()
    with pytest.raises(armt.StateError):
        armt.State.from_bytes(payload)
    assert not sprung.exists()


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    """A folder that brings its own Python files, as Hugging Face folders may."""
    random_model().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    config["base_model"]["auto_map"] = config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    sprung = tmp_path / "sprung"
    for name in ("modeling.py", "__init__.py", "sitecustomize.py"):
        (tmp_path / name).write_text(f"open({str(sprung)!r}, 'w')\n")
    with contextlib.suppress(armt.CheckpointError):  # an unknown setting may be refused too
        armt.Engine.from_pretrained(tmp_path, device="cpu").step([1])
    assert not sprung.exists()


def test_links_and_pipes_in_a_folder(folder: Path) -> None:
    secret = folder / "secret"
    secret.write_text("a line that nobody may see")
    weights = folder / "model.safetensors"
    for make in (
        lambda: weights.symlink_to(secret),
        lambda: weights.symlink_to(weights.name),  # to itself
        lambda: weights.symlink_to("/dev/zero"),
        lambda: weights.symlink_to("/proc/self/mem"),
        lambda: os.mkfifo(weights),
        lambda: weights.mkdir(),
    ):
        if weights.is_dir() and not weights.is_symlink():
            weights.rmdir()
        else:
            weights.unlink()
        make()
        with pytest.raises(armt.CheckpointError) as caught:
            armt.Engine.from_pretrained(folder, device="cpu")
        assert "nobody may see" not in str(caught.value)


def test_logs_and_messages_hold_no_contents(
    folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    engine = armt.Engine.from_pretrained(folder, device="cpu", threads=1)
    ids = [19, 17, 19, 17, 13]
    session = engine.session()
    session.feed(ids)
    list(session.generate(3))
    with pytest.raises(armt.InvalidArgument) as caught:
        session.feed([*ids, 10**6])
    session.close()
    shown = caplog.text + "".join(capfd.readouterr())
    assert shown == ""
    assert "19" not in str(caught.value).replace(str(engine.vocab_size - 1), "")
    assert "17" not in repr(session)


def test_close_wipes_on_request(folder: Path) -> None:
    engine = armt.Engine.from_pretrained(folder, device="cpu", threads=1)
    session = engine.session()
    session.feed(np.arange(3 * engine.segment_size) % engine.vocab_size)
    kept = session.checkpoint()
    expected = kept.to_bytes()
    session.close(wipe=True)
    assert session.closed
    with pytest.raises(armt.StateError, match="closed"):
        session.feed([1])
    assert kept.to_bytes() == expected  # shared with a checkpoint: left alone
    session.close(wipe=True)
    assert engine.session(state=kept).tokens == 3 * engine.segment_size
