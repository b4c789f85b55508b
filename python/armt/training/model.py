"""ARMT and RMT over a GPT-2 decoder, in plain PyTorch.

Letters as in :mod:`armt.training.decoder`; m memory tokens, d width of a memory key, F = 6 d
features. A state is a tuple of tensors, all zero before the first segment.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from armt.training.decoder import Asks, Block, Cell, Decoder, answers, visible_to
from armt.training.shape import Shape

ROLLS = 3
EPS = 1e-5
SHORTEST = 1e-12

State: TypeAlias = tuple[Tensor, ...]


def features(x: Tensor, of_length_one: bool) -> Tensor:
    """[..., d] -> [..., 6 d]: products of the rectified values with their rolls by 1 .. 3."""
    u = torch.cat((x.relu(), (-x).relu()), dim=-1)
    phi = torch.cat([u * u.roll(j, dims=-1) for j in range(1, ROLLS + 1)], dim=-1)
    return functional.normalize(phi, dim=-1, eps=SHORTEST) if of_length_one else phi


class AssociativeLayer(nn.Module):
    """A layer with its memory: read before, write behind."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.paper = shape.dialect == "paper"
        self.divided = shape.divided
        self.memory_tokens = shape.memory_tokens
        self.layer = Block(shape)
        self.W_mq = nn.Linear(shape.width, shape.d_mem, bias=False)
        self.W_mk = nn.Linear(shape.width, shape.d_mem, bias=False)
        self.W_mv = nn.Linear(shape.width, shape.width, bias=False)
        self.W_mb = nn.Linear(shape.width, 1)

    def forward(
        self, x: Tensor, a: Tensor, z: Tensor, asked: int, visible: Tensor | None, write: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, N, D], A [B, F, D], z [B, F] -> x, A, z, and what :meth:`write` says."""
        x = x + self.read(x, a, z)
        x = self.layer(x, asked, visible)
        if not write:
            return x, a, z, x.new_zeros(len(x), 2)
        end = x.shape[1] - asked
        return x, *self.write(x[:, end - self.memory_tokens : end], a, z)

    def read(self, x: Tensor, a: Tensor, z: Tensor) -> Tensor:
        """A^T phi(W_q x), over z . phi(W_q x) + 1e-5 where reads are divided: [B, N, D]"""
        phi = features(self.W_mq(x), not self.paper)
        found = phi @ a
        return found / (phi @ z[..., None] + EPS) if self.divided else found

    def write(self, y: Tensor, a: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Writes all rows of y [B, m, D] at once by the delta rule, against the old memory; also
        gives [B, 2]: how much was written, and how much more than is good (the logarithms of what
        is beyond a row of ordinary length)."""
        k = features(self.W_mk(y), not self.paper)
        v, beta = self.W_mv(y), self.W_mb(y).sigmoid()
        old = k @ a
        if self.divided:
            den = k @ z[..., None] + EPS
            old = old / den
            length = k.square().sum(-1, keepdim=True) + (EPS if self.paper else 0.0)
            gamma = (1 - den / length).clamp(0, 1)
            first = (z.sum(-1) == 0)[:, None, None]
            z = z + (torch.where(first, 1.0, gamma) * k).sum(dim=1)
        change = beta * (v - old)
        size = (change.float().square().sum(-1) + SHORTEST).sqrt()
        beyond = (size / y.shape[-1] ** 0.5).log().relu()
        written = torch.stack((size.sum(-1), beyond.sum(-1)), dim=-1)
        return a + k.transpose(1, 2) @ change, z, written


class _OverDecoder(nn.Module):
    """Memory tokens and a decoder with layers of one kind."""

    def __init__(self, shape: Shape, layer: type[AssociativeLayer] | type[Block]) -> None:
        super().__init__()
        self.shape = shape
        self.memory_cell = Cell(shape, [layer(shape) for _ in range(shape.layers)])

    @property
    def decoder(self) -> Decoder:
        """The layers."""
        found = self.memory_cell.model.transformer
        assert isinstance(found, Decoder)
        return found


class Armt(_OverDecoder):
    """A decoder whose layers have an associative memory each."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, AssociativeLayer)

    def empty(self, batch: int) -> State:
        """The state before any segment: A of every layer, then z of every layer."""
        s, like = self.shape, self.memory_cell.memory
        a = [like.new_zeros(batch, 2 * ROLLS * s.d_mem, s.width) for _ in range(s.layers)]
        return (*a, *[like.new_zeros(batch, 2 * ROLLS * s.d_mem) for _ in range(s.layers)])

    def segment(
        self, tokens: Tensor, state: State, asks: Asks | None = None, *, write: bool = True
    ) -> tuple[Tensor, Tensor | None, State, Tensor]:
        """Reads one segment: tokens [B, T] -> their rows [B, T, D], the questions' answering rows
        [B, Q, D], the new state and, of all layers, [B, 2] what was written into it."""
        decoder, count = self.decoder, tokens.shape[1]
        parts = [decoder.wte(tokens) + decoder.wpe.weight[:count]]
        if write:
            own = self.memory_cell.memory + decoder.wpe.weight[self.shape.segment_size :]
            parts.append(own.expand(len(tokens), -1, -1))
        visible, asked = None, 0
        if asks is not None:
            parts.append(question_rows(decoder, asks, 0))
            visible, asked = visible_to(asks, 0, count), asks.ids[0].numel()
        x = torch.cat(parts, dim=1)
        half = len(state) // 2
        a, z = list(state[:half]), list(state[half:])
        written = x.new_zeros(len(x), 2, dtype=torch.float32)
        for i, layer in enumerate(decoder.h):
            x, a[i], z[i], more = layer(x, a[i], z[i], asked, visible, write)
            written = written + more
        found = answers(x[:, x.shape[1] - asked :], asks) if asks is not None else None
        return x[:, :count], found, (*a, *z), written


class Rmt(_OverDecoder):
    """A decoder that hands its memory tokens' last rows to the next segment."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, Block)

    def empty(self, batch: int) -> State:
        """Rows [B, m, D] of memory; those of zeros stand for the learned ones."""
        s = self.shape
        return (self.memory_cell.memory.new_zeros(batch, s.memory_tokens, s.width),)

    def segment(
        self, tokens: Tensor, state: State, asks: Asks | None = None, *, write: bool = True
    ) -> tuple[Tensor, Tensor | None, State, Tensor]:
        """As :meth:`Armt.segment`."""
        decoder, count, m = self.decoder, tokens.shape[1], self.shape.memory_tokens
        table = decoder.wpe.weight
        fresh = (state[0] == 0).all(dim=-1).all(dim=-1)[:, None, None]
        memory = torch.where(fresh, self.memory_cell.memory, state[0])
        parts = [memory + table[:m], decoder.wte(tokens) + table[m : m + count]]
        if write:
            parts.append(memory + table[len(table) - m :])
        visible, asked = None, 0
        if asks is not None:
            parts.append(question_rows(decoder, asks, m))
            visible, asked = visible_to(asks, m, count), asks.ids[0].numel()
        x = torch.cat(parts, dim=1)
        for layer in decoder.h:
            x = layer(x, asked, visible)
        found = answers(x[:, x.shape[1] - asked :], asks) if asks is not None else None
        if write:
            state = (decoder.ln_f(x[:, m + count : 2 * m + count]),)
        return x[:, m : m + count], found, state, x.new_zeros(len(x), 2, dtype=torch.float32)


def question_rows(decoder: Decoder, asks: Asks, before: int) -> Tensor:
    """[B, Q t, D]: questions at the places where they stand in the segment."""
    length = asks.ids.shape[2]
    places = before + asks.seen[..., None] + torch.arange(length, device=asks.ids.device)
    rows: Tensor = decoder.wte(asks.ids) + decoder.wpe(places)
    return rows.flatten(1, 2)
