"""The three systems behind one face: what they read, and what they carry on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from armt.training.decoder import Asks
from armt.training.mamba import Mamba
from armt.training.model import Armt, Rmt
from armt.training.shape import Shape

__all__ = ["Armt", "Mamba", "Rmt", "Shape", "System", "build"]


class Head(Protocol):
    """What turns rows into logits."""

    def logits(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V]"""
        ...


class System(Protocol):
    """A model that reads segment by segment."""

    shape: Shape

    @property
    def decoder(self) -> Head:
        """What turns rows into logits."""
        ...

    def empty(self, batch: int) -> tuple[Tensor, ...]:
        """The state before any segment."""
        ...

    def segment(
        self,
        tokens: Tensor,
        state: tuple[Tensor, ...],
        asks: Asks | None = None,
        *,
        write: bool = True,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...], Tensor]:
        """Rows of the tokens, rows of the answers, the new state, how much was written."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All weights."""
        ...


def build(shape: Shape) -> Armt | Rmt | Mamba:
    """A fresh model."""
    if shape.system == "mamba":
        return Mamba(shape)
    return Rmt(shape) if shape.system == "rmt" else Armt(shape)
