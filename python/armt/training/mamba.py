"""Mamba in its second form (state space duality, arXiv 2405.21060), in plain PyTorch: a system to
compare with. It needs no segments; here it reads in pieces and hands its state on.

Letters: B rows of a batch, G sequences that begin at the same state, T tokens, D width, E = 2 D
inner channels in H heads of P, n values of state a channel.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from armt.training.decoder import Asks, answers
from armt.training.shape import Shape

EPS = 1e-5
REACH = 4
"""Tokens that the convolution sees."""
HEAD = 32
CHUNK = 256
"""Tokens that are taken at once; longer pieces go one after another."""
STEP = (1e-3, 1e-1)
"""Range of the time steps at the start."""

State: TypeAlias = tuple[Tensor, ...]


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) * w"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return functional.rms_norm(x, self.weight.shape, self.weight, EPS)


class MambaLayer(nn.Module):
    """One layer: a short convolution, the state space, a gate."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.inner, self.values = 2 * shape.width, shape.state_size
        self.heads = self.inner // HEAD
        mixed = self.inner + 2 * self.values
        self.norm = RmsNorm(shape.width)
        self.in_proj = nn.Linear(shape.width, self.inner + mixed + self.heads, bias=False)
        self.conv = nn.Conv1d(mixed, mixed, REACH, groups=mixed)
        low, high = (math.log(x) for x in STEP)
        step = torch.exp(low + (high - low) * torch.rand(self.heads))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus gives step
        self.A_log = nn.Parameter(torch.log(1 + 15 * torch.rand(self.heads)))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.gate_norm = RmsNorm(self.inner)
        self.out_proj = nn.Linear(self.inner, shape.width, bias=False)
        nn.init.normal_(self.out_proj.weight, std=(self.inner * 2 * shape.layers) ** -0.5)

    def forward(self, x: Tensor, tail: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, G, T, D], tail [B, 3, E + 2 n] and h [B, H, P, n], from which all G sequences
        begin; -> x, and the tail and h behind the first sequence."""
        batch, group = x.shape[:2]
        gate, mixed, dt = self.in_proj(self.norm(x)).split(
            (self.inner, self.inner + 2 * self.values, self.heads), dim=-1
        )
        before = tail[:, None].expand(batch, group, -1, -1).to(mixed.dtype)
        mixed = torch.cat((before, mixed), dim=2)
        tail = mixed[:, 0, -(REACH - 1) :].float()
        flat = functional.silu(self.conv(mixed.flatten(0, 1).transpose(1, 2))).transpose(1, 2)
        rows = flat.reshape(batch, group, -1, self.inner + 2 * self.values)
        u, b, c = torch.split(rows, [self.inner, self.values, self.values], dim=-1)
        u = u.reshape(*u.shape[:3], self.heads, HEAD)
        dt = functional.softplus(dt.float() + self.dt_bias)
        y, h = self._space(u, b, c, dt, h)
        y = (y + self.D[:, None] * u).flatten(-2)
        x = x + self.out_proj(self.gate_norm(y * functional.silu(gate)))
        return x, tail, h

    def _space(
        self, u: Tensor, b: Tensor, c: Tensor, dt: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor]:
        """u [B, G, T, H, P], b and c [B, G, T, n], dt [B, G, T, H] -> y as u, and h behind the
        first sequence."""
        count = u.shape[2]
        total = (dt * -self.A_log.exp()).cumsum(dim=2)
        kept = total[:, :, :, None] - total[:, :, None]
        later = torch.ones(count, count, dtype=torch.bool, device=u.device).tril()
        kept = torch.where(later[..., None], kept, -math.inf).exp()
        near = torch.einsum("bgin,bgjn->bgij", c, b)[..., None] * kept * dt[:, :, None]
        y = torch.einsum("bgijh,bgjhp->bgihp", near.to(u.dtype), u)
        far = torch.einsum("bgin,bhpn->bgihp", c, h.to(c.dtype))
        y = y + far * total.exp()[..., None]
        left = (total[:, 0, -1:] - total[:, 0]).exp() * dt[:, 0]
        new = torch.einsum("bjhp,bjn->bhpn", u[:, 0] * left[..., None].to(u.dtype), b[:, 0])
        return y, total[:, 0, -1].exp()[..., None, None] * h + new


class Mamba(nn.Module):
    """The whole model; its head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.wte = nn.Embedding(shape.vocab_size, shape.width)
        nn.init.normal_(self.wte.weight, std=0.5)
        self.layers = nn.ModuleList(MambaLayer(shape) for _ in range(shape.layers))
        self.norm = RmsNorm(shape.width)

    @property
    def decoder(self) -> Mamba:
        """What gives the logits."""
        return self

    def logits(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V]"""
        return functional.linear(self.norm(x), self.wte.weight)

    def empty(self, batch: int) -> State:
        """Tails of all layers, then the h of all layers."""
        s, like = self.shape, self.wte.weight
        inner = 2 * s.width
        tail = (batch, REACH - 1, inner + 2 * s.state_size)
        space = (batch, inner // HEAD, HEAD, s.state_size)
        return tuple(like.new_zeros(size) for size in (tail, space) for _ in range(s.layers))

    def segment(
        self, tokens: Tensor, state: State, asks: Asks | None = None, *, write: bool = True
    ) -> tuple[Tensor, Tensor | None, State, Tensor]:
        """As :meth:`armt.training.model.Armt.segment`, but that questions see no token of the
        segment: ``asks.seen`` is taken as 0."""
        found = None
        if asks is not None:
            rows, _ = self._run(self.wte(asks.ids), state)
            found = answers(rows.flatten(1, 2), asks)
        outs = []
        new = state
        for part in torch.split(tokens, CHUNK, dim=1):
            if part.shape[1]:
                rows, new = self._run(self.wte(part)[:, None], new)
                outs.append(rows[:, 0])
        x = torch.cat(outs, dim=1) if outs else self.wte(tokens)
        zero = x.new_zeros(len(x), 2, dtype=torch.float32)
        return x, found, new if write else state, zero

    def _run(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        half = len(state) // 2
        tails, spaces = list(state[:half]), list(state[half:])
        for i, layer in enumerate(self.layers):
            x, tails[i], spaces[i] = layer(x, tails[i], spaces[i])
        return x, (*tails, *spaces)
