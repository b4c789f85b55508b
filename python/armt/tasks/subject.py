"""What is measured: a model by name, on the compiled engine or in PyTorch."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from armt.engine import Engine
from armt.errors import CheckpointError, InvalidArgument
from armt.models import resolve
from armt.tasks.reading import EngineReader, Reader

SYSTEMS = ("armt", "rmt", "mamba")
ANSWER_TOKENS = 8
MIB = 1 << 20
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class Subject:
    """A model that can be asked, and what is known about it."""

    system: str
    folder: Path
    reader: Reader
    tokenizer: Path
    """The tokenizer.json, or the folder that should hold one."""
    stop_ids: tuple[int, ...]
    answer_tokens: int
    """Longest answer, where config.json says one (``text``: ``answer_tokens``)."""
    runs_on: dict[str, str]
    """device, description, dtype, implementation"""


def system_of(folder: Path, wanted: str = "auto") -> str:
    """armt, rmt or mamba: what a checkpoint's config.json says. CheckpointError if that is not
    what was ``wanted``."""
    if wanted not in ("auto", *SYSTEMS):
        raise InvalidArgument(
            f"system: found {wanted!r}, expected auto or one of {', '.join(SYSTEMS)}"
        )
    config = _config(folder)
    named = str(config.get("system") or config.get("dialect") or "armt")
    found = named if named in SYSTEMS else "armt"
    if wanted not in ("auto", found):
        raise CheckpointError(f"{folder}: found a checkpoint of {found}, expected one of {wanted}")
    return found


def on_engine(engine: Engine, wanted: str = "auto") -> Subject:
    """A model on the engine."""
    checkpoint = engine.checkpoint
    found = "rmt" if checkpoint.memory["dialect"] == "rmt" else "armt"
    if wanted not in ("auto", found):
        raise CheckpointError(
            f"{checkpoint.folder}: found a checkpoint of {found}, expected one of {wanted}"
        )
    return Subject(
        found,
        checkpoint.folder,
        EngineReader(engine),
        checkpoint.tokenizer or checkpoint.folder,
        tuple(checkpoint.eos_token_ids),
        _answer_tokens(checkpoint.folder),
        {
            "implementation": "engine",
            "device": engine.device,
            "description": engine.description,
            "dtype": engine.dtype,
        },
    )


def in_torch(model: str, device: str, wanted: str = "auto") -> Subject:
    """A model in PyTorch, in float32; needs the extra "torch"."""
    folder = resolve(model)
    system = system_of(folder, wanted)
    longest = _answer_tokens(folder)
    try:
        module = importlib.import_module("armt.training.reader")
    except ImportError as error:
        raise InvalidArgument(
            f'system {system} in PyTorch: {error}; run pip install "armt[torch]"'
        ) from error
    make = cast("Callable[[Path, str], Reader]", module.TorchReader)
    place = _torch_device(device)
    stop = _config(folder).get("eos_token_id", [])
    return Subject(
        system,
        folder,
        make(folder, place),
        folder,
        tuple(stop) if isinstance(stop, list) else (int(stop),),
        longest,
        {
            "implementation": "PyTorch",
            "device": place,
            "description": f"PyTorch on {place}",
            "dtype": "float32",
        },
    )


def fingerprint(folder: Path) -> str:
    """Tells one checkpoint from another: of its config.json, and of the names, sizes and first and
    last mebibytes of its weights."""
    found = hashlib.sha256()
    files = [folder] if folder.is_file() else sorted({f for p in WEIGHTS for f in folder.glob(p)})
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as source:
            found.update(source.read(MIB))
            source.seek(max(size - MIB, 0))
            found.update(source.read(MIB))
    config = folder / "config.json"
    if config.is_file():
        found.update(config.read_bytes())
    return found.hexdigest()[:16]


def _torch_device(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _answer_tokens(folder: Path) -> int:
    text = _config(folder).get("text", {})
    found = text.get("answer_tokens", ANSWER_TOKENS) if isinstance(text, dict) else 0
    if not isinstance(found, int) or found < 1:
        raise CheckpointError(
            f"{folder / 'config.json'}: text.answer_tokens: found {found!r}, expected 1 or more"
        )
    return found


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; expected a checkpoint's configuration") from error
    return found if isinstance(found, dict) else {}
