"""What a checkpoint is, in numbers: for `armt info`."""

from __future__ import annotations

import math
from typing import Any

from armt.checkpoint.arrays import ITEM_BYTES
from armt.checkpoint.checkpoint import Checkpoint

WRITE_STATISTICS = 4
"""Floats that the engine keeps behind each layer's memory."""
NOT_GEOMETRY = ("rope_factor", "rope_low_freq", "rope_high_freq", "rope_original_length")


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """A JSON-ready summary; sizes in bytes. Reads no weights but the memory's value maps."""
    decoder, memory = checkpoint.decoder, checkpoint.memory
    plain_rope = decoder["rope_scaling"] == "none"
    geometry = {k: v for k, v in decoder.items() if not (plain_rope and k in NOT_GEOMETRY)}
    sizes = [(plan, math.prod(plan.shape)) for plan in checkpoint.plans]
    in_memory = [n for plan, n in sizes if plan.slot.startswith("mem") or plan.slot == "sink"]
    return {
        "path": str(checkpoint.path),
        "origin": checkpoint.origin,
        "dialect": memory["dialect"],
        "segment_size": memory["segment_size"],
        "segment_alignment": checkpoint.segment_alignment,
        "geometry": geometry,
        "memory": dict(memory),
        "parameters": {
            "total": sum(n for _, n in sizes),
            "memory": sum(in_memory),
        },
        "weights": {
            "dtype": checkpoint.source_dtype,
            "bytes": sum(n * ITEM_BYTES[plan.dtype] for plan, n in sizes),
            "merged_lora": checkpoint.merged_lora,
        },
        "state": state_bytes(checkpoint),
        "tokenizer": None if checkpoint.tokenizer is None else str(checkpoint.tokenizer),
        "eos_token_ids": checkpoint.eos_token_ids,
        "assumed": list(checkpoint.assumed),
        "notes": _notes(checkpoint),
    }


def state_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes that one session holds on the CPU: float32, whatever the weights' type.

    memory: A [h, F, D / h], z [h, F] and statistics of each layer, or RMT's memory tokens [m, D];
    window: keys and values of the previous segment; open_segment: at most, for the segment that is
    being read.
    """
    decoder, memory = checkpoint.decoder, checkpoint.memory
    layers, width, heads = decoder["n_layers"], decoder["d_model"], memory["n_heads"]
    m, size = memory["memory_tokens"], memory["segment_size"]
    features = 2 * memory["rolls"] * memory["d_mem"] // heads
    if memory["dialect"] == "rmt":
        floats = m * width
    else:
        z = heads * features if memory["use_denom"] else 0
        floats = layers * (features * width + z + WRITE_STATISTICS)
    row = 2 * decoder["n_kv_heads"] * decoder["head_dim"] * layers
    front = m if memory["dialect"] == "rmt" else int(memory["use_sink"])
    return {
        "memory": 4 * floats,
        "window": 4 * row * size if memory["sliding_window"] else 0,
        "open_segment": 4 * row * (front + size + m),
    }


def _notes(checkpoint: Checkpoint) -> list[str]:
    notes = []
    maps = [plan for plan in checkpoint.plans if plan.slot == "mem_value"]
    if maps and not any(plan.read().any() for plan in maps):
        notes.append("all value maps are zero, as before training: the memory has no effect")
    table = checkpoint.decoder["learned_positions"]
    if table:
        notes.append(f"the position table has {table} rows, those of memory tokens included")
    return notes
