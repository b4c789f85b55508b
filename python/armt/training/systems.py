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


SMALL = 8000
"""Rows of a cell, below which a GPU is not filled by one."""


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


def read_window(
    model: System, tokens: Tensor, state: tuple[Tensor, ...], asks: Asks
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Reads segments [B, S, T] with questions [B, S, ...]: the answering rows [B, S, Q, D], the new
    state, and [B, S, 2] what was written. By waves where cells are too small for the device."""
    rows = len(tokens) * (tokens.shape[2] + asks.ids[0, 0].numel())
    if isinstance(model, Armt) and tokens.is_cuda and rows < SMALL:
        return model.window(tokens, state, asks)
    answers, written = [], []
    for segment in range(tokens.shape[1]):
        own = Asks(*(part[:, segment] for part in vars(asks).values()))
        _, found, state, more = model.segment(tokens[:, segment], state, own)
        assert found is not None
        answers.append(found)
        written.append(more)
    return torch.stack(answers, dim=1), state, torch.stack(written, dim=1)


def build(shape: Shape) -> Armt | Rmt | Mamba:
    """A fresh model."""
    if shape.system == "mamba":
        return Mamba(shape)
    return Rmt(shape) if shape.system == "rmt" else Armt(shape)
