"""ARMT in its 2024 form over a GPT-2 decoder, in plain PyTorch.

Modules are named so that ``state_dict()`` has the published tensor names. Letters: B rows of a
batch, R rows of a segment, T tokens, m memory tokens, D width, d width of a memory key, F = 6 d
features.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from armt.errors import InvalidArgument

ROLLS = 3
EPS = 1e-5

Memory: TypeAlias = tuple[Tensor, Tensor]
"""A [B, F, D] and z [B, F] of one layer."""
State: TypeAlias = list[Memory | None]
"""One memory a layer; None before the first write."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    vocab_size: int
    segment_size: int
    width: int = 128
    layers: int = 4
    heads: int = 4
    memory_tokens: int = 4
    d_mem: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise InvalidArgument(f"{name}: found {value}, expected 1 or more")
        if self.width % self.heads:
            raise InvalidArgument(
                f"heads: found {self.heads}, expected a divisor of the width {self.width}"
            )

    def config(self) -> dict[str, Any]:
        """The ``config.json`` that tells a loader what the tensors do not."""
        return {
            "dialect": "paper",
            "base_model": {
                "model_type": "gpt2",
                "vocab_size": self.vocab_size,
                "n_embd": self.width,
                "n_layer": self.layers,
                "n_head": self.heads,
                "n_positions": self.segment_size,
                "n_inner": None,
                "activation_function": "gelu_new",
                "layer_norm_epsilon": 1e-5,
                "scale_attn_weights": True,
                "tie_word_embeddings": True,
            },
            "armt": {
                "num_mem_tokens": self.memory_tokens,
                "d_mem": self.d_mem,
                "nu": ROLLS,
                "correction": True,
                "segment_size": self.segment_size,
                "segment_alignment": "left",
                "wrap_pos": True,
                "sliding_window": False,
                "layers_attr": "transformer.h",
            },
            "weights": {"file": "model.safetensors", "cell_prefix": "memory_cell."},
        }


def features(x: Tensor) -> Tensor:
    """[..., d] -> [..., 6 d]: products of the rectified values with their rolls by 1 .. 3."""
    u = torch.cat((x.relu(), (-x).relu()), dim=-1)
    return torch.cat([u * u.roll(j, dims=-1) for j in range(1, ROLLS + 1)], dim=-1)


class Conv1D(nn.Module):
    """A linear map whose weight is stored as GPT-2 stores it: [in, out]."""

    def __init__(self, inputs: int, outputs: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * scale)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return x @ self.weight + self.bias


class Attention(nn.Module):
    """Attention with heads; who sees whom is the caller's matter."""

    def __init__(self, shape: Shape, scale: float, deep: float) -> None:
        super().__init__()
        self.heads = shape.heads
        self.c_attn = Conv1D(shape.width, 3 * shape.width, scale)
        self.c_proj = Conv1D(shape.width, shape.width, deep)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """x [B, R, D], visible [R, R] bool -> [B, R, D]"""
        batch, rows, width = x.shape
        parts = self.c_attn(x).view(batch, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        mixed: Tensor = self.c_proj(out.transpose(1, 2).reshape(batch, rows, width))
        return mixed


class Mlp(nn.Module):
    """D -> 4 D -> D."""

    def __init__(self, shape: Shape, scale: float, deep: float) -> None:
        super().__init__()
        self.c_fc = Conv1D(shape.width, 4 * shape.width, scale)
        self.c_proj = Conv1D(4 * shape.width, shape.width, deep)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        out: Tensor = self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """A layer of GPT-2."""

    def __init__(self, shape: Shape, scale: float, deep: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.width, eps=1e-5)
        self.attn = Attention(shape, scale, deep)
        self.ln_2 = nn.LayerNorm(shape.width, eps=1e-5)
        self.mlp = Mlp(shape, scale, deep)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """[B, R, D] -> [B, R, D]"""
        x = x + self.attn(self.ln_1(x), visible)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class AssociativeLayer(nn.Module):
    """A layer with its memory: read before, write behind."""

    def __init__(self, shape: Shape, scale: float, deep: float) -> None:
        super().__init__()
        self.layer = Block(shape, scale, deep)
        self.W_mq = nn.Linear(shape.width, shape.d_mem, bias=False)
        self.W_mk = nn.Linear(shape.width, shape.d_mem, bias=False)
        self.W_mv = nn.Linear(shape.width, shape.width, bias=False)
        self.W_mb = nn.Linear(shape.width, 1)

    def read(self, x: Tensor, memory: Memory) -> Tensor:
        """A^T phi(W_q x) / (z . phi(W_q x) + 1e-5): [B, R, D]"""
        a, z = memory
        phi = features(self.W_mq(x))
        return phi @ a / (phi @ z[..., None] + EPS)

    def write(self, y: Tensor, memory: Memory | None) -> Memory:
        """Writes all rows of y [B, m, D] at once by the delta rule, against the old memory."""
        k, v, beta = features(self.W_mk(y)), self.W_mv(y), self.W_mb(y).sigmoid()
        if memory is None:
            return k.transpose(1, 2) @ (beta * v), k.sum(dim=1)
        a, z = memory
        den = k @ z[..., None] + EPS
        gamma = (1 - den / (k.square().sum(-1, keepdim=True) + EPS)).clamp(0, 1)
        change = beta * (v - k @ a / den)
        return a + k.transpose(1, 2) @ change, z + (gamma * k).sum(dim=1)


class Decoder(nn.Module):
    """GPT-2 without its head, which is the embedding."""

    def __init__(self, shape: Shape, scale: float, deep: float) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.width)
        self.wpe = nn.Embedding(shape.segment_size + shape.memory_tokens, shape.width)
        self.h = nn.ModuleList(AssociativeLayer(shape, scale, deep) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width, eps=1e-5)


class _Named(nn.Module):
    """A step in a tensor's name."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Armt(nn.Module):
    """The whole model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        scale = shape.width**-0.5
        deep = scale / (2 * shape.layers) ** 0.5
        decoder = Decoder(shape, scale, deep)
        for table in (decoder.wte, decoder.wpe):  # large: heads that match must be able to begin
            nn.init.normal_(table.weight, std=0.5)
        self.memory_cell = _Named(model=_Named(transformer=decoder))
        memory = nn.Parameter(torch.randn(shape.memory_tokens, shape.width) * 0.5)
        self.memory_cell.register_parameter("memory", memory)

    @property
    def decoder(self) -> Decoder:
        """The layers."""
        found = self.get_submodule("memory_cell.model.transformer")
        assert isinstance(found, Decoder)
        return found

    @property
    def memory_tokens(self) -> Tensor:
        """[m, D]"""
        return self.get_parameter("memory_cell.memory")

    def empty(self) -> State:
        """A state before any segment."""
        return [None] * self.shape.layers

    def segment(
        self, tokens: Tensor, state: State, questions: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, State]:
        """Reads one segment; the logits of its tokens, those of the questions, the new state.

        tokens [B, T] -> logits [B, T, V]. questions [B, Q, t] are Q short texts, each beginning a
        segment of its own over the memory as it was before this one, and leaving no trace: logits
        [B, Q, t, V]. With T = 0 nothing is written.
        """
        batch, count = tokens.shape
        memory = self.shape.memory_tokens if count else 0
        asked = questions.shape[1:] if questions is not None else (0, 0)
        x = self._embed(tokens, memory, questions)
        visible = _who_sees_whom(count + memory, *asked, device=tokens.device)
        new: State = []
        for layer, old in zip(self.decoder.h, state, strict=True):
            assert isinstance(layer, AssociativeLayer)
            if old is not None:
                x = x + layer.read(x, old)
            x = layer.layer(x, visible)
            new.append(layer.write(x[:, count : count + memory], old) if memory else old)
        own, rest = x[:, :count], x[:, count + memory :]
        answers = self._head(rest).view(batch, *asked, -1) if questions is not None else None
        return self._head(own), answers, new

    def forward(self, tokens: Tensor) -> tuple[Tensor, State]:
        """tokens [B, N] cut into segments from the left -> logits [B, N, V], the last state."""
        state, logits = self.empty(), []
        for part in torch.split(tokens, self.shape.segment_size, dim=1):
            out, _, state = self.segment(part, state)
            logits.append(out)
        return torch.cat(logits, dim=1), state

    def _embed(self, tokens: Tensor, memory: int, questions: Tensor | None) -> Tensor:
        """[B, T + m + Q t, D]"""
        table, positions = self.decoder.wte, self.decoder.wpe.weight
        size = self.shape.segment_size
        parts = [table(tokens) + positions[: tokens.shape[1]]]
        if memory:
            own = self.memory_tokens + positions[size:]
            parts.append(own.expand(len(tokens), -1, -1))
        if questions is not None:
            rows = table(questions) + positions[: questions.shape[2]]
            parts.append(rows.flatten(1, 2))
        return torch.cat(parts, dim=1)

    def _head(self, x: Tensor) -> Tensor:
        logits: Tensor = self.decoder.ln_f(x) @ self.decoder.wte.weight.T
        return logits


def _who_sees_whom(rows: int, questions: int, length: int, *, device: torch.device) -> Tensor:
    """[R, R] bool: the segment's rows in order, and each question by itself."""
    visible = torch.zeros(rows + questions * length, rows + questions * length, device=device)
    visible[:rows, :rows] = 1
    for start in range(rows, len(visible), length or 1):
        visible[start : start + length, start : start + length] = 1
    return visible.tril().bool()
