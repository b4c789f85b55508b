"""Mamba in its second form (state space duality, arXiv 2405.21060), in plain PyTorch: a system to
compare with. It needs no segments; here it reads in pieces and hands its state on.

Letters: B rows of a batch, G sequences a row (the text, or Q questions), T tokens, D width,
E = 2 D inner channels in H heads of P, n values of state a channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
CHUNK = 64
"""Tokens that see each other directly; the state stands for what lies before them."""
STEP = (1e-3, 1e-1)
"""Range of the time steps at the start."""

State: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Signals:
    """What the state space sees of G sequences."""

    u: Tensor
    """[B, G, T, H, P] values"""
    b: Tensor
    """[B, G, T, n] where they are written"""
    c: Tensor
    """[B, G, T, n] where is read"""
    dt: Tensor
    """[B, G, T, H] time steps"""
    total: Tensor
    """[B, G, T, H] logarithm of what is left, behind each token, of what was there before"""


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

    def forward(
        self, x: Tensor, tail: Tensor, h: Tensor, asked: Tensor | None, seen: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x [B, T, D], tail [B, 3, E + 2 n] and h [B, H, P, n] -> x, and the tail and h behind it.
        asked [B, Q, t, D] are read as if behind the first seen [B, Q] tokens of x."""
        gate, mixed, dt = self._project(x[:, None])
        mixed = torch.cat((tail[:, None].to(mixed.dtype), mixed), dim=2)
        text = self._signals(mixed, dt)
        y, new = self._scan(text, h)
        out = x + self._close(text, y, gate)[:, 0]
        if asked is not None and seen is not None:
            gate, own, dt = self._project(asked)
            question = self._signals(torch.cat((_window(mixed[:, 0], seen), own), dim=2), dt)
            y = self._near(question) + _behind(question, text, seen, h)
            asked = asked + self._close(question, y, gate)
        return out, mixed[:, 0, -(REACH - 1) :].float(), new, asked

    def _scan(self, text: Signals, h: Tensor) -> tuple[Tensor, Tensor]:
        """y [B, 1, T, H, P] of one sequence that begins at h [B, H, P, n], and h behind it."""
        count = text.u.shape[2]
        size = min(count, CHUNK)
        u, b, c, dt = (_chunks(part[:, 0], size) for part in (text.u, text.b, text.c, text.dt))
        total = _sums(dt * -self.A_log.exp())
        left = (total[:, :, -1:] - total).exp() * dt
        added = torch.einsum("bgjhp,bgjn->bghpn", u * left[..., None].to(u.dtype), b)
        starts = []
        for kept, new in zip(total[:, :, -1].exp().unbind(1), added.unbind(1), strict=True):
            starts.append(h)
            h = kept[..., None, None] * h + new
        far = torch.einsum("bgin,bghpn->bgihp", c, torch.stack(starts, dim=1).to(c.dtype))
        y = self._near(Signals(u, b, c, dt, total)) + far * total.exp()[..., None]
        return y.flatten(1, 2)[:, None, :count], h

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, G, T, D] -> gate [B, G, T, E], what is convolved [.., E + 2 n], time steps [.., H]"""
        parts = (self.inner, self.inner + 2 * self.values, self.heads)
        gate, mixed, dt = self.in_proj(self.norm(x)).split(parts, dim=-1)
        return gate, mixed, functional.softplus(dt.float() + self.dt_bias)

    def _signals(self, mixed: Tensor, dt: Tensor) -> Signals:
        """mixed [B, G, 3 + T, E + 2 n]; dt [B, G, T, H]"""
        flat = functional.silu(self.conv(mixed.flatten(0, 1).transpose(1, 2))).transpose(1, 2)
        rows = flat.reshape(*mixed.shape[:2], *flat.shape[1:])
        u, b, c = torch.split(rows, [self.inner, self.values, self.values], dim=-1)
        u = u.reshape(*u.shape[:3], self.heads, HEAD)
        return Signals(u, b, c, dt, _sums(dt * -self.A_log.exp()))

    @staticmethod
    def _near(s: Signals) -> Tensor:
        """What a sequence's tokens leave for its later ones: [B, G, T, H, P]"""
        count = s.u.shape[2]
        kept = s.total[:, :, :, None] - s.total[:, :, None]
        later = torch.ones(count, count, dtype=torch.bool, device=s.u.device).tril()
        kept = torch.where(later[..., None], kept, -math.inf).exp()
        scores = torch.einsum("bgin,bgjn->bgij", s.c, s.b)[..., None]
        weights = scores * kept * s.dt[:, :, None]
        return torch.einsum("bgijh,bgjhp->bgihp", weights.to(s.u.dtype), s.u)

    def _close(self, s: Signals, y: Tensor, gate: Tensor) -> Tensor:
        """y [B, G, T, H, P] -> what is added to the rows [B, G, T, D]"""
        y = (y + self.D[:, None] * s.u).flatten(-2)
        rows: Tensor = self.out_proj(self.gate_norm(y * functional.silu(gate)))
        return rows


def _chunks(x: Tensor, size: int) -> Tensor:
    """[B, T, ...] -> [B, G, size, ...], filled up with zeros: time steps that change nothing."""
    filled = functional.pad(x, (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % size))
    return filled.reshape(len(x), -1, size, *x.shape[2:])


def _sums(x: Tensor) -> Tensor:
    """[..., T, H] -> sums over the tokens up to each. A product: PyTorch's compiler fails on some
    cumulative sums over few rows."""
    count = x.shape[-2]
    with torch.autocast(x.device.type, enabled=False):
        return torch.ones(count, count, device=x.device).tril() @ x.float()


def _window(mixed: Tensor, seen: Tensor) -> Tensor:
    """mixed [B, 3 + T, C] -> the three tokens before each place, [B, Q, 3, C]"""
    places = seen[..., None] + torch.arange(REACH - 1, device=seen.device)
    index = places.flatten(1)[..., None].expand(-1, -1, mixed.shape[-1])
    return mixed.gather(1, index).reshape(*places.shape, mixed.shape[-1])


def _behind(question: Signals, text: Signals, seen: Tensor, h: Tensor) -> Tensor:
    """What h, then the first seen [B, Q] tokens of the text leave for questions: [B, Q, t, H, P]"""
    total = functional.pad(text.total[:, 0], (0, 0, 1, 0))
    reached = total.gather(1, seen[..., None].expand(-1, -1, total.shape[-1]))  # [B, Q, H]
    there = torch.arange(text.u.shape[2], device=seen.device) < seen[..., None]
    kept = reached[:, :, None] - text.total
    kept = torch.where(there[..., None], kept, -math.inf).exp() * text.dt  # [B, Q, T, H]
    scores = torch.einsum("bqin,bjn->bqij", question.c, text.b[:, 0])[..., None]
    weights = scores * kept[:, :, None].to(scores.dtype)
    y = torch.einsum("bqijh,bjhp->bqihp", weights, text.u[:, 0])
    far = torch.einsum("bqin,bhpn->bqihp", question.c, h.to(question.c.dtype))
    y = y + far * reached.exp()[:, :, None, :, None]
    return y * question.total.exp()[..., None]


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
        """As :meth:`armt.training.model.Armt.segment`."""
        if asks is None:
            x, new, _ = self._run(self.wte(tokens), state)
            found = None
        else:
            x, new, asked = self._run(self.wte(tokens), state, self.wte(asks.ids), asks.seen)
            assert asked is not None
            found = answers(asked.flatten(1, 2), asks)
        nothing = x.new_zeros(len(x), 2, dtype=torch.float32)
        return x, found, new if write else state, nothing

    def _run(
        self, x: Tensor, state: State, asked: Tensor | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, State, Tensor | None]:
        half = len(state) // 2
        tails, spaces = list(state[:half]), list(state[half:])
        for i, layer in enumerate(self.layers):
            x, tails[i], spaces[i], asked = layer(x, tails[i], spaces[i], asked, seen)
        return x, (*tails, *spaces), asked
