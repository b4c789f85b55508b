"""A start from which recall is learned in few steps. Nothing in it is frozen or special later.

From an ordinary start a model first learns to name any of the answers that it has seen, and takes
long to find out which. So positions begin as waves in dimensions of their own; in even layers the
heads begin by looking one, two, three ... tokens back, in odd layers at rows that hold something
alike, the newer the better; queries of the memory begin with the map of its keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from armt.training.decoder import Block, Cell, Decoder
from armt.training.model import Armt, AssociativeLayer, Rmt

FASTEST, SLOWER = 2.0, 0.6
"""Radians a token of the waves, each so much slower than the one before."""
AMPLITUDE = 1.0
BACK, ALIKE, NEWER = 16.0, 10.0, 6.0
"""Scores of the heads at their place, for an equal row, and for the newest row over the oldest."""
COPY = 0.5
"""Share of what a head finds that is added to its row."""
TOGETHER, VALUES = 2.0, 4.0
"""How much all memory tokens write, and the scale of all that they write, in sum. Their keys
overlap, so what one writes the others read: with more the memory grows without an end, and a
training saves itself by putting its deeper layers to sleep."""


@torch.no_grad()
def start(model: Armt | Rmt, words: Sequence[int] = (), places: Sequence[int] = ()) -> None:
    """Gives a fresh model its start. Memory tokens begin like the tokens ``words``, in turn; heads
    of even layers look at the ``places`` of the segment, where some are given, instead of back."""
    shape, decoder, cell = model.shape, model.decoder, model.memory_cell
    waves = min(shape.width // 8, 16)
    content = shape.width - 2 * waves
    decoder.wpe.weight.zero_()
    table = _waves(shape.positions, waves, shape.positions)
    decoder.wpe.weight[:, content:] = table
    decoder.wte.weight[:, content:] = 0
    assert isinstance(cell, Cell)
    cell.memory[:, content:] = 0
    for i in range(shape.memory_tokens if words else 0):
        cell.memory[i, :content] = decoder.wte.weight[words[i % len(words)], :content]
    for number, layer in enumerate(decoder.h):
        block = layer.layer if isinstance(layer, AssociativeLayer) else layer
        assert isinstance(block, Block)
        _copy(block, content)
        if number % 2 == 0:
            _look_back(block, decoder, content, places)
        else:
            _look_for_alike(block, decoder, content)
        if isinstance(layer, AssociativeLayer):
            layer.W_mk.weight[:, content:] = 0
            layer.W_mq.weight.copy_(layer.W_mk.weight)
            often = min(TOGETHER / shape.memory_tokens, 0.5)
            layer.W_mb.weight.zero_()
            layer.W_mb.bias.fill_(math.log(often / (1 - often)))
            torch.nn.init.eye_(layer.W_mv.weight).mul_(min(VALUES / shape.memory_tokens, 1.0))


def _waves(positions: int, count: int, period: int) -> Tensor:
    """[positions, 2 count]: cosines and sines; the last wave is so slow that it only grows."""
    speeds = torch.tensor([FASTEST * SLOWER**i for i in range(count - 1)] + [math.pi / period / 2])
    angles = torch.arange(positions)[:, None] * speeds
    return AMPLITUDE * torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1)


def _gain(decoder: Decoder) -> float:
    """How much the first norm enlarges a row, about."""
    square = decoder.wte.weight.square().sum(-1).mean() + decoder.wpe.weight.square().sum(-1).mean()
    return float((decoder.wte.weight.shape[1] / square).sqrt())


def _maps(block: Block, head: int) -> tuple[Tensor, Tensor]:
    """Views of a head's maps of queries and keys, each [D, head width]."""
    weight = block.attn.c_attn.weight
    width = weight.shape[0]
    inner = width // block.attn.heads
    q = weight[:, head * inner : (head + 1) * inner]
    return q, weight[:, width + head * inner : width + (head + 1) * inner]


def _copy(block: Block, content: int) -> None:
    """What heads find arrives in the dimensions where it stood, a random part of it by each head:
    so a row is alike to those that found the same, and finds out more from layer to layer."""
    width = block.attn.c_proj.weight.shape[0]
    inner = width // block.attn.heads
    values = block.attn.c_attn.weight[:, 2 * width :]
    values.zero_()
    block.attn.c_proj.weight.zero_()
    for head in range(block.attn.heads):
        part = slice(head * inner, (head + 1) * inner)
        basis, _ = torch.linalg.qr(torch.randn(content, min(inner, content)))
        values[:content, part][:, : basis.shape[1]] = basis
        block.attn.c_proj.weight[part, :content][: basis.shape[1]] = COPY * basis.T


def _look_back(block: Block, decoder: Decoder, content: int, places: Sequence[int]) -> None:
    """Head h looks h + 1 tokens back, or at one of the places."""
    inner = block.attn.c_attn.weight.shape[0] // block.attn.heads
    count = min(inner // 2, (block.attn.c_attn.weight.shape[0] - content) // 2 - 1)
    size = math.sqrt(BACK * math.sqrt(inner) / count) / (AMPLITUDE * _gain(decoder))
    for head in range(block.attn.heads):
        q, k = _maps(block, head)
        q.zero_()
        k.zero_()
        for wave in range(count):
            angle = (head + 1) * FASTEST * SLOWER**wave
            cos, sin = size * math.cos(angle), size * math.sin(angle)
            rows, columns = content + 2 * wave, 2 * wave
            k[rows, columns] = k[rows + 1, columns + 1] = size
            if places:
                at = decoder.wpe.weight[places[head % len(places)], rows : rows + 2]
                block.attn.c_attn.bias[head * inner + columns : head * inner + columns + 2] = (
                    at * size * _gain(decoder)
                )
                continue
            # the query's wave, turned back by the distance
            q[rows, columns], q[rows + 1, columns] = cos, sin
            q[rows, columns + 1], q[rows + 1, columns + 1] = -sin, cos


def _look_for_alike(block: Block, decoder: Decoder, content: int) -> None:
    """Equal contents match; of several, the newer ones more."""
    inner = block.attn.c_attn.weight.shape[0] // block.attn.heads
    norm = math.sqrt(float(decoder.wte.weight.square().sum(-1).mean())) * _gain(decoder)
    for head in range(block.attn.heads):
        q, k = _maps(block, head)
        q.zero_()
        k.zero_()
        same = torch.randn(content, inner - 1) / norm
        same *= math.sqrt(ALIKE * math.sqrt(inner) / (inner - 1))
        q[:content, : inner - 1] = same
        k[:content, : inner - 1] = same
        bias = block.attn.c_attn.bias
        bias[head * inner + inner - 1] = NEWER * math.sqrt(inner) / (AMPLITUDE * _gain(decoder))
        k[-1, inner - 1] = 1.0
