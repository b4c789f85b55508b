"""Weight files as lazy tensors: safetensors, whole or in shards, and PyTorch pickles."""

from __future__ import annotations

import functools
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from armt._core import SafetensorsFile
from armt.checkpoint.arrays import Array
from armt.checkpoint.files import inner_path, read_json
from armt.checkpoint.problems import Problems
from armt.errors import CheckpointError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
STANDARD_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
MAX_SHARDS = 10_000
OLDEST_TORCH = (2, 6)
"""Earlier releases could run code from a file in spite of ``weights_only`` (CVE-2025-32434)."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file; nothing is read before :meth:`read`."""

    name: str
    dtype: str
    """Such as "float32" or "bfloat16"."""
    shape: tuple[int, ...]
    file: str
    read: Callable[[], Array]
    """The values, read-only or not to be changed; bfloat16 as uint16."""


def find_weights(folder: Path) -> Path:
    """The weight file or index of a folder: a standard name, or the only file of its kind."""
    for name in STANDARD_NAMES:
        if (folder / name).is_file():
            return folder / name
    suffixes = (".safetensors", *PICKLE_SUFFIXES)
    others = sorted(p for p in folder.iterdir() if p.suffix in suffixes and p.is_file())
    if len(others) == 1:
        return others[0]
    found = ", ".join(p.name for p in others[:5]) or "none"
    raise CheckpointError(
        f"{folder}: found the weight files: {found}; expected {' or '.join(STANDARD_NAMES)},"
        " or a single .safetensors, .bin, .pt or .pth file; give the path of the file itself"
    )


def open_weights(path: Path) -> Iterator[Stored]:
    """All tensors of a weight file, or of all shards of an index."""
    if path.name.endswith(".index.json"):
        return iter(_open_shards(path))
    if path.suffix in PICKLE_SUFFIXES:
        return _open_pickle(path)
    return _open_safetensors(path)


def _open_safetensors(path: Path) -> Iterator[Stored]:
    file = SafetensorsFile(path)
    for name in file.names():
        dtype, shape = file.info(name)
        yield Stored(name, dtype, shape, path.name, functools.partial(file.tensor, name))


def _open_shards(index: Path) -> list[Stored]:
    """Every fault of the index and of its shards is reported at once."""
    problems = Problems(str(index))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected the object weight_map: {{tensor: file}}")
    files = set(map(str, weight_map.values()))
    if len(files) > MAX_SHARDS:
        raise CheckpointError(f"{index}: found {len(files)} shards, expected at most {MAX_SHARDS}")
    found: dict[str, list[Stored]] = {}
    for file in sorted(files):
        try:
            shard = inner_path(index.parent, file, where=str(index))
            if shard.is_file():
                found[file] = list(open_weights(shard))
            else:
                problems.add(f"the shard {file} is missing")
        except CheckpointError as error:
            problems.add(str(error).replace("\n", "\n  "))
    tensors = []
    for file, stored in found.items():
        for tensor in stored:
            if weight_map.get(tensor.name) == file:
                tensors.append(tensor)
            else:
                problems.add(f"extra: {tensor.name} in {file}, which the index does not say")
    present = {tensor.name for tensor in tensors}
    for name, file in weight_map.items():
        if name not in present and file in found:
            problems.add(f"missing: {name}, which the index expects in {file}")
    problems.raise_if_any("Copy or download the whole folder again.")
    return tensors


def _open_pickle(path: Path) -> Iterator[Stored]:
    state = _load_pickle(path)
    if isinstance(state, dict) and isinstance(state.get("model_state_dict"), dict):
        state = state["model_state_dict"]
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path}: found {type(state).__name__}, expected a state dict")
    torch = _torch(path)
    foreign = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if foreign:
        kinds = ", ".join(f"{key!r}: {type(state[key]).__name__}" for key in foreign[:10])
        raise CheckpointError(
            f"{path}: found {{{kinds}{', ...' if len(foreign) > 10 else ''}}}, expected only"
            " tensors by name, or these under the key 'model_state_dict'; save model.state_dict()"
        )
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            raise CheckpointError(f"{path}: {name}: expected a dense tensor with stored values")
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield Stored(
            str(name), dtype, tuple(tensor.shape), path.name, functools.partial(_numpy, tensor)
        )


def _numpy(tensor: Any) -> Array:
    """A view of a CPU tensor; NumPy has no bfloat16, so that goes by its bits."""
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":
        import torch

        bits: Array = tensor.view(torch.int16).numpy().view(np.uint16)
        return bits
    values: Array = tensor.numpy()
    return values


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path}: a PyTorch file needs PyTorch to be read, which is not installed;"
            ' pip install "armt[torch]", or convert the file to safetensors elsewhere'
        ) from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise CheckpointError(
            f"{path}: found PyTorch {torch.__version__}, which can run code hidden in such a file"
            ' (CVE-2025-32434); pip install -U "torch>=2.6"'
        )
    return torch


def _load_pickle(path: Path) -> Any:
    """torch.load that runs no code from the file and maps it where its format allows."""
    torch = _torch(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a regular file")
    try:
        return torch.load(
            os.fspath(path),
            map_location="cpu",
            weights_only=True,
            mmap=zipfile.is_zipfile(path),
        )
    except Exception as error:  # torch.load raises whatever its parsers do
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path}: cannot be read as a PyTorch state dict without running code from it:"
            f" {reason[0] if reason else type(error).__name__};"
            " expected a file written by torch.save(model.state_dict(), path)"
        ) from error
