"""A checkpoint in the engine's own terms: settings, and tensors that are read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from armt.checkpoint.arrays import Array


@dataclass(frozen=True)
class CanonicalTensor:
    """One tensor for the engine."""

    slot: str
    """A name of the engine's enumerations Matrix and Vector, such as "qkv" or "norm1_bias"."""
    layer: int
    """0 for tensors outside the layers."""
    array: Array
    """Matrices [out, in], perhaps a transposed view; vectors [n] float32. Not to be changed."""
    dtype: str
    """"float32", "bfloat16" (``array`` is uint16 then) or "float16"."""


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor comes about. Nothing is read before :meth:`read`."""

    slot: str
    layer: int
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load_checkpoint` found; files stay open (mapped) as long as it lives."""

    path: Path
    """What was asked for."""
    folder: Path
    """Where the weights lie."""
    origin: str
    """The kind of files, for people."""
    decoder: dict[str, Any]
    """The fields of DecoderConfig; enumerations as lower-case words."""
    memory: dict[str, Any]
    """The fields of MemoryConfig; enumerations as lower-case words."""
    segment_alignment: str
    """How a whole sequence is cut: "left", "right" or "center"."""
    source_dtype: str
    """The matrices' common type; "float32" if they differ or LoRA was merged."""
    plans: tuple[TensorPlan, ...]
    biases: tuple[str, ...]
    """Optional biases that the model has, such as "qkv_bias"."""
    generation: dict[str, Any] = field(default_factory=dict)
    """eos_token_ids (a list) and, where known, bos_token_id and pad_token_id."""
    tokenizer: Path | None = None
    """The folder's tokenizer.json."""
    assumed: tuple[str, ...] = ()
    """Settings that neither files nor caller gave: "correction = True"."""
    merged_lora: bool = False

    @property
    def eos_token_ids(self) -> list[int]:
        """Ids after which generation may stop; empty if the files name none."""
        return list(self.generation.get("eos_token_ids", []))

    def tensors(self) -> Iterator[CanonicalTensor]:
        """Every tensor, read when it is asked for: at most one layer's copy is alive at a time."""
        for plan in self.plans:
            yield CanonicalTensor(plan.slot, plan.layer, plan.read(), plan.dtype)


def common_dtype(plans: tuple[TensorPlan, ...]) -> str:
    """The type of all matrices, or float32 if they differ."""
    found = {plan.dtype for plan in plans if len(plan.shape) == 2}
    return found.pop() if len(found) == 1 else "float32"
