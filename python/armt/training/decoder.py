"""A GPT-2 decoder whose rows are one segment and questions beside it, in plain PyTorch.

Modules are named so that ``state_dict()`` has the published tensor names. Letters: B rows of a
batch, T tokens of a segment, R rows of its own (tokens and memory tokens), Q questions of t tokens,
N = R + Q t, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from armt.training.shape import Shape

EPS = 1e-5


@dataclass(frozen=True)
class Asks:
    """Questions about one segment: each is read as if it stood behind the segment's first ``seen``
    tokens, over the memory before the segment, and leaves no trace."""

    ids: Tensor
    """[B, Q, t] token ids, filled up behind the question's end."""
    seen: Tensor
    """[B, Q] tokens of the segment that stand before the question."""
    last: Tensor
    """[B, Q] index of the question's last token, whose logits are the answer."""


class Conv1D(nn.Module):
    """A linear map whose weight is stored as GPT-2 stores it: [in, out]."""

    def __init__(self, inputs: int, outputs: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * scale)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return functional.linear(x, self.weight.T, self.bias)


class Attention(nn.Module):
    """Own rows see one another causally; questions see what the mask says, and themselves."""

    def __init__(self, shape: Shape, scale: float) -> None:
        super().__init__()
        self.heads = shape.heads
        self.c_attn = Conv1D(shape.width, 3 * shape.width, scale)
        self.c_proj = Conv1D(shape.width, shape.width, scale)

    def forward(self, x: Tensor, asked: int, visible: Tensor | None) -> Tensor:
        """x [B, N, D], the last ``asked`` rows questions; visible [B, asked, K + asked] bool, where
        K of the own rows can be seen by questions -> [B, N, D]"""
        batch, rows, width = x.shape
        own = rows - asked
        parts = self.c_attn(x).view(batch, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        found = []
        if own:
            found.append(
                functional.scaled_dot_product_attention(
                    q[:, :, :own], k[:, :, :own], v[:, :, :own], is_causal=True
                )
            )
        if visible is not None:
            seen = visible.shape[-1] - asked
            keys, values = (torch.cat((y[:, :, :seen], y[:, :, own:]), dim=2) for y in (k, v))
            found.append(
                functional.scaled_dot_product_attention(
                    q[:, :, own:], keys, values, attn_mask=visible[:, None]
                )
            )
        out = torch.cat(found, dim=2) if len(found) > 1 else found[0]
        mixed: Tensor = self.c_proj(out.transpose(1, 2).reshape(batch, rows, width))
        return mixed


class Mlp(nn.Module):
    """D -> 4 D -> D."""

    def __init__(self, shape: Shape, scale: float, deep: float) -> None:
        super().__init__()
        self.c_fc = Conv1D(shape.width, 4 * shape.width, scale)
        self.c_proj = Conv1D(4 * shape.width, shape.width, deep / 2)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        out: Tensor = self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """A layer of GPT-2."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        scale = shape.width**-0.5
        self.ln_1 = nn.LayerNorm(shape.width, eps=EPS)
        self.attn = Attention(shape, scale)
        self.ln_2 = nn.LayerNorm(shape.width, eps=EPS)
        self.mlp = Mlp(shape, scale, scale / (2 * shape.layers) ** 0.5)

    def forward(self, x: Tensor, asked: int, visible: Tensor | None) -> Tensor:
        """[B, N, D] -> [B, N, D]"""
        x = x + self.attn(self.ln_1(x), asked, visible)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Decoder(nn.Module):
    """GPT-2 without its head, which is the embedding."""

    def __init__(self, shape: Shape, layers: list[nn.Module]) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.width)
        self.wpe = nn.Embedding(shape.positions, shape.width)
        for table in (self.wte, self.wpe):  # large: heads that match must be able to begin
            nn.init.normal_(table.weight, std=0.5)
        self.h = nn.ModuleList(layers)
        self.ln_f = nn.LayerNorm(shape.width, eps=EPS)

    def logits(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V]"""
        out: Tensor = functional.linear(self.ln_f(x), self.wte.weight)
        return out


class Cell(nn.Module):
    """The memory tokens and the decoder, under their published names."""

    def __init__(self, shape: Shape, layers: list[nn.Module]) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(shape.memory_tokens, shape.width) * 0.5)
        self.model = nn.Module()
        self.model.transformer = Decoder(shape, layers)


def visible_to(asks: Asks, before: int, tokens: int) -> Tensor:
    """[B, Q t, before + tokens + Q t] bool: each question sees the ``before`` rows of memory, the
    tokens that stand before it, and itself."""
    batch, count, length = asks.ids.shape
    device = asks.ids.device
    places = torch.arange(before + tokens, device=device)
    text = places < (before + asks.seen)[..., None]
    text = text[:, :, None].expand(batch, count, length, before + tokens)
    itself = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    own = torch.block_diag(*[itself] * count).bool()  # type: ignore[no-untyped-call]
    own = own.expand(batch, count * length, count * length)
    return torch.cat((text.reshape(batch, count * length, -1), own), dim=-1)


def answers(x: Tensor, asks: Asks) -> Tensor:
    """The rows [B, Q, D] of ``x`` [B, Q t, D] where the answers are."""
    batch, count, length = asks.ids.shape
    rows = asks.last + torch.arange(count, device=x.device) * length
    return x.gather(1, rows[..., None].expand(batch, count, x.shape[-1]))
