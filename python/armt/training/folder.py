"""What training leaves: a model folder that every loader reads, and what is needed to go on."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from armt.checkpoint import load_checkpoint
from armt.checkpoint.arrays import to_float32
from armt.checkpoint.sources import find_weights, open_weights
from armt.checkpoint.weights_file import Entry, write_tensors
from armt.errors import CheckpointError, InvalidArgument
from armt.files import whole_file

if TYPE_CHECKING:
    from armt.training.trainer import Report

PROGRESS = "training.pt"
METRICS = "metrics.jsonl"


def write_model(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    files: Mapping[str, Path] | None = None,
    *,
    dtype: str = "float32",
) -> None:
    """config.json, model.safetensors (float32 or float16) and copies of ``files``, each replaced as
    a whole."""
    entries = [
        Entry(name, dtype, tuple(t.shape), functools.partial(_values, t, dtype))
        for name, t in tensors.items()
    ]
    with whole_file(folder / "model.safetensors") as path:
        write_tensors(path, entries, "pt")
    with whole_file(folder / "config.json") as path:
        path.write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    for name, source in (files or {}).items():
        with whole_file(folder / name) as path:
            shutil.copyfile(source, path)
    if config["dialect"] != "mamba":
        load_checkpoint(folder)  # a fault is better found now than by who uses it


def _values(tensor: torch.Tensor, dtype: str) -> npt.NDArray[Any]:
    return tensor.detach().float().cpu().numpy().astype(dtype)


class Metrics:
    """One JSON line a report in metrics.jsonl; those behind the step one goes on from are cut."""

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / METRICS
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        text = "".join(line + "\n" for line in kept)
        with whole_file(self._path) as path:
            path.write_text(text, encoding="utf-8")

    def __enter__(self) -> Metrics:
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, report: Report, **facts: float) -> None:
        """One line."""
        self._file.write(json.dumps(asdict(report) | facts) + "\n")
        self._file.flush()


def _step_of(line: str) -> float:
    """The step of a line; one that was torn counts as the future."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Gives ``model`` the weights of a folder; InvalidArgument where they do not fit."""
    path = find_weights(folder)
    tensors = {
        stored.name: torch.from_numpy(np.array(to_float32(stored.read(), stored.dtype)))
        for stored in open_weights(path)
    }
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InvalidArgument(f"{path}: does not fit: {error}") from error


def write_progress(folder: Path, progress: Mapping[str, Any]) -> None:
    """All that is needed to go on, in one file that is replaced as a whole."""
    with whole_file(folder / PROGRESS) as path:
        torch.save(dict(progress), path)


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
