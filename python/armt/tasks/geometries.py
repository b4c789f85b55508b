"""Models of a given size with random weights, for measuring speed without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from armt.checkpoint.arrays import Array
from armt.checkpoint.checkpoint import Checkpoint, TensorPlan
from armt.checkpoint.native import DECODER_FIELDS
from armt.checkpoint.slots import BIASES, Slot, all_slots
from armt.errors import InvalidArgument

_ZERO: dict[str, Any] = dict.fromkeys(DECODER_FIELDS, 0)
_GPT2 = _ZERO | {
    "norm": "layer",
    "norm_eps": 1e-5,
    "activation": "gelu_tanh",
    "gated_mlp": False,
    "parallel_residual": False,
    "qk_norm": False,
    "scale_by_inverse_layer": False,
    "rope_theta": 10000.0,
    "rope_scaling": "none",
    "rope_factor": 1.0,
    "rope_low_freq": 1.0,
    "rope_high_freq": 4.0,
    "rope_original_length": 8192,
}
_LLAMA = _GPT2 | {"norm": "rms", "activation": "silu", "gated_mlp": True, "rope_theta": 500000.0}

# layers, width, heads, key/value heads, head width, inner width, vocabulary, segment, memory
# tokens, width of a memory key
GEOMETRIES: dict[str, tuple[int, ...]] = {
    "retrieval": (4, 128, 4, 4, 32, 512, 104, 10, 4, 64),
    "gpt2": (12, 768, 12, 12, 64, 3072, 50257, 512, 16, 64),
    "llama-1b": (16, 2048, 32, 8, 64, 8192, 128256, 1024, 128, 64),
}


def random_checkpoint(name: str, *, seed: int = 0) -> Checkpoint:
    """A checkpoint of geometry ``name``; its tensors are drawn when they are read."""
    if name not in GEOMETRIES:
        raise InvalidArgument(f"geometry: found {name}, expected one of {', '.join(GEOMETRIES)}")
    layers, width, heads, kv, c, ff, vocab, segment, m, d_mem = GEOMETRIES[name]
    llama = name.startswith("llama")
    sizes = {
        "vocab_size": vocab,
        "d_model": width,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": kv,
        "head_dim": c,
        "d_ff": ff,
        "learned_positions": 0 if llama else segment + 2 * m,
        "rotary_dims": c if llama else 0,
    }
    decoder = (_LLAMA if llama else _GPT2) | sizes
    memory = {
        "dialect": "paper",
        "memory_tokens": m,
        "d_mem": d_mem,
        "n_heads": 1,
        "rolls": 3,
        "normalise_keys": False,
        "use_denom": True,
        "correction": True,
        "gating": False,
        "use_sink": False,
        "sliding_window": False,
        "wrap_positions": False,
        "segment_size": segment,
    }
    biases = () if llama else BIASES
    slots = all_slots(decoder, memory, biases=biases, head=False)
    plans = tuple(
        TensorPlan(slot.slot, slot.layer, slot.shape, "float32", _draw(slot, i, seed, layers))
        for i, slot in enumerate(slots)
    )
    place = Path(f"{name} (random weights)")
    return Checkpoint(
        path=place,
        folder=place,
        origin="random weights",
        decoder=decoder,
        memory=memory,
        segment_alignment="left",
        source_dtype="float32",
        plans=plans,
        biases=biases,
    )


def _draw(slot: Slot, index: int, seed: int, layers: int) -> Callable[[], Array]:
    """Values that keep activations of a sane size: norms are one, biases zero."""
    deep = 0.02 / (2 * layers) ** 0.5
    special = {"embedding": 0.5, "memory": 0.5, "mem_value": 0.002}
    scale = special.get(slot.slot, deep if slot.slot in ("attn_out", "mlp_down") else 0.02)

    def read() -> Array:
        if len(slot.shape) == 1:
            return np.full(slot.shape, float("norm" in slot.slot and "bias" not in slot.slot), "f4")
        rng = np.random.default_rng([seed, index])
        values: Array = rng.standard_normal(slot.shape, np.float32)
        values *= np.float32(scale)
        return values

    return read
