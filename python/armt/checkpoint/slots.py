"""The engine's tensor slots: which exist for a model, and their shapes.

Letters: V vocabulary, D width, c head width, Hq and Hkv query and key/value heads, m memory tokens,
d width of a memory key, h memory heads. Matrices are [out, in], row-major.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

Config = Mapping[str, Any]

BIASES = ("qkv_bias", "attn_out_bias", "mlp_up_bias", "mlp_down_bias")
"""Biases that some base models have and others have not."""


class Slot(NamedTuple):
    """One tensor of the engine; those outside the layers have layer 0."""

    slot: str
    layer: int
    shape: tuple[int, ...]


LAYER_FREE = (
    "embedding",
    "positions",
    "memory",
    "sink",
    "final_norm",
    "final_norm_bias",
    "head",
)


def gate_rows(decoder: Config, memory: Config) -> int:
    """Rows of the write gate: one value per memory head, or one per channel with gating."""
    return int(decoder["d_model"] if memory["gating"] else memory["n_heads"])


def all_slots(
    decoder: Config, memory: Config, *, biases: Collection[str], head: bool
) -> Iterator[Slot]:
    """Every tensor of a model, in the order in which the engine is given them."""
    width = decoder["d_model"]
    yield Slot("embedding", 0, (decoder["vocab_size"], width))
    if decoder["learned_positions"]:
        yield Slot("positions", 0, (decoder["learned_positions"], width))
    yield Slot("memory", 0, (memory["memory_tokens"], width))
    if memory["use_sink"]:
        yield Slot("sink", 0, (1, width))
    layer = list(_layer_slots(decoder, memory, biases))
    for index in range(decoder["n_layers"]):
        yield from (Slot(name, index, shape) for name, shape in layer)
    yield Slot("final_norm", 0, (width,))
    if decoder["norm"] == "layer":
        yield Slot("final_norm_bias", 0, (width,))
    if head:
        yield Slot("head", 0, (decoder["vocab_size"], width))


def _layer_slots(
    decoder: Config, memory: Config, biases: Collection[str]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, ff, c = decoder["d_model"], decoder["d_ff"], decoder["head_dim"]
    queries, keys = decoder["n_heads"] * c, decoder["n_kv_heads"] * c
    matrices = {
        "qkv": (queries + 2 * keys, width),
        "attn_out": (width, queries),
        "mlp_up": (2 * ff if decoder["gated_mlp"] else ff, width),
        "mlp_down": (width, ff),
    }
    for norm in ("norm1", "norm2"):
        yield norm, (width,)
        if decoder["norm"] == "layer":
            yield norm + "_bias", (width,)
    if decoder["qk_norm"]:
        yield "q_norm", (c,)
        yield "k_norm", (c,)
    for name, shape in matrices.items():
        yield name, shape
        if name + "_bias" in biases:
            yield name + "_bias", shape[:1]
    if memory["dialect"] != "rmt":
        rows = gate_rows(decoder, memory)
        yield "mem_query", (memory["d_mem"], width)
        yield "mem_key", (memory["d_mem"], width)
        yield "mem_value", (width, width)
        yield "mem_gate", (rows, width)
        yield "mem_gate_bias", (rows,)
