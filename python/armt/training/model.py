"""ARMT and RMT over a GPT-2 decoder, in plain PyTorch.

Letters as in :mod:`armt.training.decoder`; m memory tokens, d width of a memory key, F = 6 d
features, L layers, S segments. A state is a tuple of tensors, all zero before the first segment.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from armt.training.decoder import (
    Asks,
    Block,
    Cell,
    Decoder,
    Weights,
    answers,
    run_block,
    visible_to,
    weights_of,
)
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
    """Weights of a layer with its memory."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layer = Block(shape)
        self.W_mq = nn.Linear(shape.width, shape.d_mem, bias=False)
        self.W_mk = nn.Linear(shape.width, shape.d_mem, bias=False)
        self.W_mv = nn.Linear(shape.width, shape.width, bias=False)
        self.W_mb = nn.Linear(shape.width, 1)


def run_cells(
    shape: Shape,
    weights: Weights,
    x: Tensor,
    a: Tensor,
    z: Tensor,
    asked: int,
    visible: Tensor | None,
    writes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """C cells side by side, each of another layer: read before the layer, write behind it.

    x [C, B, N, D], A [C, B, F, D], z [C, B, F], writes [C]: 0 for cells that write nothing, None
    if all do not -> x, A, z and [C, B, 2]: how much was written, and how much more than is good
    (the logarithms of what is beyond a row of ordinary length)."""
    x = x + read_memory(shape, weights, x, a, z)
    x = run_block(x, weights, "layer.", shape.heads, asked, visible)
    if writes is None:
        return x, a, z, x.new_zeros(*x.shape[:2], 2)
    end = x.shape[2] - asked
    return x, *write_memory(shape, weights, x[:, :, end - shape.memory_tokens : end], a, z, writes)


def run_wave(
    shape: Shape,
    weights: Weights,
    first: Tensor,
    x: Tensor,
    a: Tensor,
    z: Tensor,
    asked: int,
    visible: Tensor,
    writes: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A cell of every layer: the first one reads ``first`` [B, N, D], the others what the layer
    below gave in the wave before, x [L, B, N, D] -> x, the last layer's rows of questions
    [B, asked, D], A, z and what was written."""
    x = torch.cat((first[None], x[:-1]))
    x, a, z, written = run_cells(shape, weights, x, a, z, asked, visible, writes)
    return x, x[-1, :, x.shape[2] - asked :], a, z, written


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """[C, B, N, I] times [C, O, I] -> [C, B, N, O]"""
    return torch.bmm(x.flatten(1, 2), weight.transpose(1, 2)).reshape(*x.shape[:3], -1)


def read_memory(shape: Shape, weights: Weights, x: Tensor, a: Tensor, z: Tensor) -> Tensor:
    """A^T phi(W_q x), over z . phi(W_q x) + 1e-5 where reads are divided: [C, B, N, D]"""
    phi = features(_linear(x, weights["W_mq.weight"]), shape.dialect == "modern")
    found = phi @ a
    return found / (phi @ z[..., None] + EPS) if shape.divided else found


def write_memory(
    shape: Shape, weights: Weights, y: Tensor, a: Tensor, z: Tensor, writes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes all rows of y [C, B, m, D] at once by the delta rule, against the old memory."""
    k = features(_linear(y, weights["W_mk.weight"]), shape.dialect == "modern")
    v = _linear(y, weights["W_mv.weight"])
    beta = _linear(y, weights["W_mb.weight"]) + weights["W_mb.bias"][:, None, None]
    on = writes[:, None, None, None]
    old = k @ a
    if shape.divided:
        den = k @ z[..., None] + EPS
        old = old / den
        length = k.square().sum(-1, keepdim=True) + (EPS if shape.dialect == "paper" else 0.0)
        gamma = (1 - den / length).clamp(0, 1)
        first = (z.sum(-1) == 0)[..., None, None]
        z = z + (on * torch.where(first, 1.0, gamma) * k).sum(dim=2)
    change = on * beta.sigmoid() * (v - old)
    size = (change.float().square().sum(-1) + SHORTEST).sqrt()
    beyond = (size / y.shape[-1] ** 0.5).log().relu()
    written = torch.stack((size.sum(-1), beyond.sum(-1)), dim=-1)
    return a + k.transpose(2, 3) @ change, z, written


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
        self.run: Any = run_cells
        self.run_wave: Any = run_wave
        """Both can be replaced by compiled ones."""

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
        x, visible = self._rows(tokens, asks, write)
        asked = visible.shape[1] if visible is not None else 0
        see = visible[None] if visible is not None else None
        writes = x.new_ones(1) if write else None
        half = len(state) // 2
        a, z = list(state[:half]), list(state[half:])
        written = x.new_zeros(len(x), 2, dtype=torch.float32)
        for i, layer in enumerate(self.decoder.h):
            cell = x[None], a[i][None], z[i][None]
            found = self.run(self.shape, weights_of([layer]), *cell, asked, see, writes)
            x, a[i], z[i], more = (part[0] for part in found)
            written = written + more
        answer = answers(x[:, x.shape[1] - asked :], asks) if asks is not None else None
        return x[:, : tokens.shape[1]], answer, (*a, *z), written

    def window(self, tokens: Tensor, state: State, asks: Asks) -> tuple[Tensor, State, Tensor]:
        """Reads some segments by waves: the cells (segment, layer) of equal sum run side by side.
        tokens [B, S, T], asks [B, S, ...] -> the answering rows [B, S, Q, D], the new state and
        [B, S, 2] what was written; the same as :meth:`segment` gives in turn."""
        batch, segments, _ = tokens.shape
        layers, device = self.shape.layers, tokens.device
        flat = Asks(*(part.transpose(0, 1).flatten(0, 1) for part in vars(asks).values()))
        rows, visible = self._rows(tokens.transpose(0, 1).flatten(0, 1), flat, True)
        assert visible is not None
        asked = visible.shape[1]
        rows = rows.reshape(segments, batch, *rows.shape[1:])
        visible = visible.reshape(segments, batch, *visible.shape[1:])
        weights, order = weights_of(self.decoder.h), torch.arange(layers, device=device)
        # All waves alike for the compiler: what enters the first one has a gradient too.
        nothing = 0.0 * self.memory_cell.memory.sum()
        x = rows[:1].expand(layers, *rows.shape[1:])  # ordinary rows: their gradients are finite
        a, z = (nothing + torch.stack(part) for part in (state[:layers], state[layers:]))
        found, written = [], []
        for wave in range(segments + layers - 1):
            at = wave - order
            x, last, a, z, more = self.run_wave(
                self.shape,
                weights,
                rows[min(wave, segments - 1)],
                x,
                a,
                z,
                asked,
                visible.index_select(0, at.clamp(0, segments - 1)),
                ((at >= 0) & (at < segments)).to(x.dtype),
            )
            found.append(last)
            written.append(more)
        ends = torch.stack(found[layers - 1 :]).flatten(0, 1)
        wave_of = torch.arange(segments, device=device)[:, None] + order
        total = torch.stack(written)[wave_of, order].sum(dim=1)
        answer = answers(ends, flat).reshape(segments, batch, -1, self.shape.width)
        return answer.transpose(0, 1), (*a.unbind(), *z.unbind()), total.transpose(0, 1)

    def _rows(self, tokens: Tensor, asks: Asks | None, write: bool) -> tuple[Tensor, Tensor | None]:
        """What enters the first layer [B, N, D], and what the questions see."""
        decoder, count = self.decoder, tokens.shape[1]
        parts = [decoder.wte(tokens) + decoder.wpe.weight[:count]]
        if write:
            own = self.memory_cell.memory + decoder.wpe.weight[self.shape.segment_size :]
            parts.append(own.expand(len(tokens), -1, -1))
        if asks is None:
            return torch.cat(parts, dim=1), None
        parts.append(question_rows(decoder, asks, 0))
        return torch.cat(parts, dim=1), visible_to(asks, 0, count)


class Rmt(_OverDecoder):
    """A decoder that hands its memory tokens' last rows to the next segment."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, Block)
        self.run: Any = run_block
        """Can be replaced by a compiled one."""

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
        see = visible[None] if visible is not None else None
        for layer in decoder.h:
            x = self.run(x[None], weights_of([layer]), "", self.shape.heads, asked, see)[0]
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
