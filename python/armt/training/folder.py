"""What training leaves: a model folder that every loader reads, and what is needed to go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from armt.checkpoint import load_checkpoint
from armt.errors import CheckpointError, InvalidArgument
from armt.training.model import Armt

PROGRESS = "training.pt"
DATA_ALIGNMENT = 64


def write_model(folder: Path, model: Armt, facts: Mapping[str, Any]) -> None:
    """config.json (with ``facts``) and model.safetensors, each replaced as a whole."""
    tensors = {name: t.detach().float().cpu().numpy() for name, t in model.state_dict().items()}
    _replace(folder / "model.safetensors", lambda path: _write_tensors(path, tensors))
    text = json.dumps(model.shape.config() | dict(facts), indent=2) + "\n"
    _replace(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
    load_checkpoint(folder)  # a fault is better found now than by who uses it


def write_progress(folder: Path, progress: Mapping[str, Any]) -> None:
    """All that is needed to go on, in one file that is replaced as a whole."""
    _replace(folder / PROGRESS, lambda path: torch.save(dict(progress), path))


def read_progress(folder: Path) -> dict[str, Any]:
    """What :func:`write_progress` wrote; CheckpointError for anything else."""
    path = folder / PROGRESS
    if not path.is_file():
        raise InvalidArgument(f"{path}: no such file, expected the progress of a training")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler does
        raise CheckpointError(f"{path}: cannot be read: {type(error).__name__}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: found {type(found).__name__}, expected a dict")
    return found


def new_folder(folder: Path) -> None:
    """Makes ``folder``; InvalidArgument if anything is in it."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()) or _filled(folder):
        raise InvalidArgument(
            f"{folder}: exists already; expected a new or empty folder, or --resume to go on"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _replace(target: Path, write: Any) -> None:
    """The old file or the new one is there at any moment."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _write_tensors(path: Path, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, values in tensors.items():
        end = offset + values.nbytes
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values, dtype="<f4").data)
