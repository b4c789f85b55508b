"""Writing the project's own folder: config.json and model.safetensors (docs/formats.md)."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from armt.checkpoint.arrays import KEPT, Array, convert, to_float32
from armt.checkpoint.checkpoint import Checkpoint, TensorPlan
from armt.checkpoint.native import FORMAT, WEIGHTS, tensor_name
from armt.checkpoint.weights_file import Entry, write_tensors
from armt.errors import CheckpointError, InvalidArgument

DType: TypeAlias = Literal["float32", "bfloat16", "float16"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def export_folder(
    checkpoint: Checkpoint, out_dir: str | os.PathLike[str], *, dtype: DType | None = None
) -> Path:
    """Writes ``checkpoint`` as a folder of the project's own format; returns its path.

    ``dtype`` converts all matrices; by default they keep their types. Tokenizer files are copied.
    The folder appears complete or not at all. Raises InvalidArgument if ``out_dir`` exists and is
    not an empty folder, CheckpointError if it cannot be written.
    """
    if dtype is not None and dtype not in KEPT:
        raise InvalidArgument(f"dtype: found {dtype!r}, expected one of {', '.join(KEPT)}")
    out = Path(os.path.abspath(out_dir))
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise InvalidArgument(
            f"{out}: exists already; expected a new or empty folder: choose another or remove it"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _complete_or_absent(out) as folder:
            _write_weights(folder / WEIGHTS, checkpoint.plans, dtype)
            _write_config(folder / "config.json", checkpoint)
            _copy_tokenizer(checkpoint, folder)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error}") from error
    return out


@contextlib.contextmanager
def _complete_or_absent(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place if the body succeeds and vanishes if not."""
    partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        partial.rename(out)
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stored_dtype(plan: TensorPlan, dtype: str | None) -> str:
    return plan.dtype if dtype is None or len(plan.shape) == 1 else dtype


def _write_weights(path: Path, plans: Sequence[TensorPlan], dtype: str | None) -> None:
    entries = []
    for plan in plans:
        stored = _stored_dtype(plan, dtype)
        read = functools.partial(_read_as, plan, stored)
        entries.append(Entry(tensor_name(plan.slot, plan.layer), stored, plan.shape, read))
    write_tensors(path, entries, FORMAT)


def _read_as(plan: TensorPlan, dtype: str) -> Array:
    array = plan.read()
    with np.errstate(over="ignore"):
        stored = convert(array, plan.dtype, dtype)
    if dtype == "float16" and plan.dtype != "float16":
        _check_range(plan, array, stored)
    return stored


def _check_range(plan: TensorPlan, array: Array, stored: Array) -> None:
    lost = np.isinf(stored) & np.isfinite(to_float32(array, plan.dtype))
    if lost.any():
        raise CheckpointError(
            f"{tensor_name(plan.slot, plan.layer)}: {int(lost.sum())} values exceed the range of"
            " float16 (65504); use dtype='bfloat16' or 'float32'"
        )


def _write_config(path: Path, checkpoint: Checkpoint) -> None:
    config = {
        "format": FORMAT,
        "decoder": checkpoint.decoder,
        "memory": checkpoint.memory,
        "segment_alignment": checkpoint.segment_alignment,
        "biases": list(checkpoint.biases),
        "head": any(plan.slot == "head" for plan in checkpoint.plans),
        "generation": checkpoint.generation,
        "source": {"origin": checkpoint.origin, "merged_lora": checkpoint.merged_lora},
    }
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    source = checkpoint.folder if checkpoint.tokenizer is None else checkpoint.tokenizer.parent
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
