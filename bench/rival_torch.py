"""The rival: ARMT of the paper dialect over GPT-2 in plain eager PyTorch, as a researcher runs it.

It streams: the memory is carried from call to call, one segment at a time through all layers, and
generation keeps keys and values. It uses what PyTorch offers (fused attention, `addmm`, in-place
updates, preallocated caches, no autograd), computes logits only where the engine is asked for them
too, and keeps the memory in float32 as the published code does. Weights and activations are
float32 or bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from models import PREFIX, Geometry

Tensor = torch.Tensor
EPSILON = 1e-5
ROLLS = 3


@dataclass
class Block:
    """Weights of one layer; matrices as [in, out] for addmm, memory maps as [in, out] too."""

    ln_1: tuple[Tensor, Tensor]
    c_attn: tuple[Tensor, Tensor]
    attn_proj: tuple[Tensor, Tensor]
    ln_2: tuple[Tensor, Tensor]
    c_fc: tuple[Tensor, Tensor]
    mlp_proj: tuple[Tensor, Tensor]
    query: Tensor
    key: Tensor
    value: Tensor
    gate: tuple[Tensor, Tensor]


@dataclass
class Memory:
    """A [F, D] and z [F] of one layer, float32; none before the first write."""

    matrix: Tensor | None = None
    normaliser: Tensor | None = None


def feature_map(x: Tensor) -> Tensor:
    """DPFP: [.., d] -> [.., 2 ROLLS d], float32."""
    u = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return torch.cat([u * u.roll(j, dims=-1) for j in range(1, ROLLS + 1)], dim=-1)


class TorchArmt:
    """One stream. `dtype` is that of weights and activations."""

    def __init__(
        self,
        geometry: Geometry,
        weights: Mapping[str, npt.NDArray[np.float32]],
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.geometry = geometry
        self.dtype = dtype
        self.device = device
        model = PREFIX + "model.transformer."

        def get(name: str) -> Tensor:
            return torch.from_numpy(weights[name].copy()).to(dtype).to(device)

        def pair(name: str) -> tuple[Tensor, Tensor]:
            return get(name + ".weight"), get(name + ".bias")

        self.embedding = get(model + "wte.weight")
        self.positions = get(model + "wpe.weight")
        self.memory_tokens = get(PREFIX + "memory")
        self.final = pair(model + "ln_f")
        self.blocks = []
        for i in range(geometry.layers):
            at = f"{model}h.{i}."
            gate, gate_bias = pair(at + "W_mb")
            self.blocks.append(
                Block(
                    ln_1=pair(at + "layer.ln_1"),
                    c_attn=pair(at + "layer.attn.c_attn"),
                    attn_proj=pair(at + "layer.attn.c_proj"),
                    ln_2=pair(at + "layer.ln_2"),
                    c_fc=pair(at + "layer.mlp.c_fc"),
                    mlp_proj=pair(at + "layer.mlp.c_proj"),
                    query=get(at + "W_mq.weight").t(),
                    key=get(at + "W_mk.weight").t(),
                    value=get(at + "W_mv.weight").t(),
                    gate=(gate.t(), gate_bias),
                )
            )
        self.reset()

    def reset(self) -> None:
        self.memories = [Memory() for _ in self.blocks]
        self.cache: list[tuple[Tensor, Tensor]] = []
        self.cached = 0

    # ------------------------------------------------------------------ memory

    def read(self, block: Block, memory: Memory, x: Tensor) -> Tensor:
        if memory.matrix is None or memory.normaliser is None:
            return x
        phi = feature_map((x @ block.query).float())
        denominator = phi @ memory.normaliser + EPSILON
        return x + (phi @ memory.matrix / denominator[:, None]).to(x.dtype)

    def write(self, block: Block, memory: Memory, y: Tensor) -> None:
        phi = feature_map((y @ block.key).float())
        values = (y @ block.value).float()
        beta = torch.sigmoid(torch.addmm(block.gate[1], y, block.gate[0])).float()
        if memory.matrix is None or memory.normaliser is None:
            memory.matrix = phi.t() @ (beta * values)
            memory.normaliser = phi.sum(0)
            return
        denominator = phi @ memory.normaliser + EPSILON
        old = phi @ memory.matrix / denominator[:, None]
        gamma = (1 - denominator / (phi.square().sum(-1) + EPSILON)).clamp(0, 1)
        memory.matrix.addmm_(phi.t(), beta * (values - old))
        memory.normaliser.addmv_(phi.t(), gamma)

    # ------------------------------------------------------------------- block

    def split(self, x: Tensor) -> Tensor:
        """[rows, D] -> [1, heads, rows, head_dim]"""
        g = self.geometry
        return x.view(1, -1, g.heads, g.head_dim).transpose(1, 2)

    def block(self, index: int, x: Tensor, cached: bool) -> Tensor:
        block, width = self.blocks[index], self.geometry.width
        hidden = F.layer_norm(x, (width,), *block.ln_1)
        qkv = torch.addmm(block.c_attn[1], hidden, block.c_attn[0])
        q, k, v = (self.split(part) for part in qkv.split(width, dim=1))
        if cached:
            k, v = self.remember(index, k, v)
        causal = q.shape[2] > 1
        context = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        context = context.transpose(1, 2).reshape(-1, width)
        x = x + torch.addmm(block.attn_proj[1], context, block.attn_proj[0])
        hidden = F.layer_norm(x, (width,), *block.ln_2)
        hidden = torch.addmm(block.c_fc[1], hidden, block.c_fc[0])
        hidden = F.gelu(hidden, approximate="tanh")
        return x + torch.addmm(block.mlp_proj[1], hidden, block.mlp_proj[0])

    def remember(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache[index]
        end = self.cached + k.shape[2]
        keys[:, :, self.cached : end] = k
        values[:, :, self.cached : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def layers(self, x: Tensor, *, cached: bool = False, write: bool = True) -> Tensor:
        for index, (block, memory) in enumerate(zip(self.blocks, self.memories, strict=True)):
            x = self.read(block, memory, x)
            x = self.block(index, x, cached)
            if write:
                self.write(block, memory, x[-self.geometry.memory :])
        return x

    def logits(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (self.geometry.width,), *self.final)
        return (x @ self.embedding.t()).float()

    def embed(self, ids: Tensor, first: int = 0) -> Tensor:
        return self.embedding[ids] + self.positions[first : first + len(ids)]

    # ------------------------------------------------------------------- calls

    @torch.no_grad()
    def step(self, ids: npt.NDArray[Any], logits: str = "none") -> Tensor | None:
        """One whole segment, memory written. Logits: none, last [vocab], all [tokens, vocab]."""
        tokens = torch.from_numpy(ids.astype(np.int64)).to(self.device)
        first = len(tokens)
        memory = self.memory_tokens + self.positions[first : first + self.geometry.memory]
        x = self.layers(torch.cat([self.embed(tokens), memory]))
        if logits == "none":
            return None
        found = self.logits(x[:first] if logits == "all" else x[first - 1 : first])
        return found if logits == "all" else found[0]

    @torch.no_grad()
    def prefill(self, ids: npt.NDArray[Any], logits: str = "none") -> list[Tensor]:
        """Whole segments one after another; the logits asked for, a tensor a segment."""
        size = self.geometry.segment
        steps = (self.step(ids[at : at + size], logits) for at in range(0, len(ids), size))
        return [found for found in steps if found is not None]

    @torch.no_grad()
    def open_segment(self, ids: npt.NDArray[Any], room: int) -> Tensor:
        """Begins the last segment with `ids`, keys and values kept; returns logits [vocab]."""
        g = self.geometry
        shape = (1, g.heads, len(ids) + room, g.head_dim)
        self.cache = [
            (
                torch.zeros(shape, dtype=self.dtype, device=self.device),
                torch.zeros(shape, dtype=self.dtype, device=self.device),
            )
            for _ in self.blocks
        ]
        self.cached = 0
        return self.extend(ids)

    @torch.no_grad()
    def extend(self, ids: npt.NDArray[Any]) -> Tensor:
        """One more token (or the first ones) of the open segment; logits of the last, [vocab]."""
        tokens = torch.from_numpy(np.asarray(ids, np.int64)).to(self.device)
        x = self.layers(self.embed(tokens, self.cached), cached=True, write=False)
        self.cached += len(tokens)
        return self.logits(x[-1:])[0]

    @torch.no_grad()
    def generate(self, count: int, last: Tensor) -> list[int]:
        """Greedy continuation of the open segment."""
        found = []
        for _ in range(count):
            found.append(int(last.argmax()))
            last = self.extend(np.array(found[-1:]))
        return found
