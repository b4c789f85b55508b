"""A start from which retrieval is learned in few steps. Nothing in it is frozen or special later.

From an ordinary start a model first learns to name any of the values that it has read, and takes
long to find out that the key says which. So positions begin in dimensions of their own; the heads
of the first layer begin by looking at one place of the segment each, wherever they stand, and copy
what they find there; and queries of the memory begin with the map of the keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from armt.training.model import Armt, AssociativeLayer

POSITION = 2.0
SHARP = 4.0
"""Score of a head for its place is about this times its gain."""
COPY = 2.0


@torch.no_grad()
def start(model: Armt, looked_at: Sequence[int]) -> None:
    """Gives a fresh model its start; models that are too narrow for it keep the ordinary one.

    The heads of the first layer look at the places ``looked_at`` of the segment, in turn.
    """
    shape, decoder = model.shape, model.decoder
    places = shape.segment_size + shape.memory_tokens
    first, inner = decoder.h[0], shape.width // shape.heads
    if 2 * places > shape.width:
        return
    decoder.wpe.weight.zero_()
    decoder.wpe.weight[:, :places] = torch.eye(places) * POSITION
    decoder.wte.weight[:, :places] = 0
    model.memory_tokens[:, :places] = 0
    assert isinstance(first, AssociativeLayer)
    maps, bias = first.layer.attn.c_attn.weight, first.layer.attn.c_attn.bias
    for head in range(shape.heads):
        q = slice(head * inner, (head + 1) * inner)
        k = slice(shape.width + q.start, shape.width + q.stop)
        maps[:, q] = 0
        maps[:, k] = 0
        bias[q.start] = SHARP
        maps[looked_at[head % len(looked_at)], k.start] = inner**0.5
    first.layer.attn.c_attn.weight[:places, 2 * shape.width :] = 0
    first.layer.attn.c_proj.weight.mul_(COPY * (2 * shape.layers) ** 0.5)
    for layer in decoder.h:
        assert isinstance(layer, AssociativeLayer)
        layer.W_mk.weight[:, :places] = 0
        layer.W_mq.weight.copy_(layer.W_mk.weight)
