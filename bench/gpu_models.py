"""Models with random weights for the CUDA benchmarks, straight into a compiled engine.

Conditioned as trained models are: embeddings are large, memory values small. All layers share their
values, so that a model of any size is made in seconds.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from armt import _core

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model; `segment` tokens and `memory` memory tokens make a segment's rows."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    segment: int
    memory: int
    d_mem: int
    llama: bool

    @property
    def rows(self) -> int:
        return self.segment + self.memory

    @property
    def outputs(self) -> int:
        """Weights of a layer's dense products, divided by the width."""
        heads = 2 * (self.heads + self.kv_heads)
        return heads * self.head_dim + (3 if self.llama else 2) * self.ffn

    def decoder(self) -> dict[str, Any]:
        common = {
            "vocab_size": self.vocab,
            "d_model": self.width,
            "n_layers": self.layers,
            "n_heads": self.heads,
            "n_kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "d_ff": self.ffn,
        }
        if self.llama:
            return common | {
                "norm": "rms",
                "activation": "silu",
                "gated_mlp": True,
                "rotary_dims": self.head_dim,
                "rope_theta": 500000.0,
            }
        positions = self.rows + self.memory
        return common | {"norm": "layer", "activation": "gelu_tanh", "learned_positions": positions}

    def memory_settings(self) -> dict[str, Any]:
        return {
            "dialect": "paper",
            "memory_tokens": self.memory,
            "d_mem": self.d_mem,
            "segment_size": self.segment,
        }

    def floor_flops(self, tokens: int) -> tuple[float, float]:
        """Full arithmetic of a prefill: (matrix products, attention), in operations."""
        segments = -(-tokens // self.segment)
        features = 6 * self.d_mem
        read = self.d_mem + features
        write = self.memory * (self.width + self.d_mem + 2 * features)
        products = 2.0 * self.width * (self.rows * (self.outputs + read) + write)
        attention = 2.0 * self.rows * self.rows * self.heads * self.head_dim  # causal half
        return products * self.layers * segments, attention * self.layers * segments

    def decoded_bytes(self) -> float:
        """Weights that a decoded token reads, 16 bits each; the head too."""
        return 2.0 * self.width * (self.layers * self.outputs + self.vocab)


GEOMETRIES = {
    "1b": Geometry("1b", 16, 2048, 32, 8, 64, 8192, 128256, 1024, 128, 64, True),
    "gpt2": Geometry("gpt2", 12, 768, 12, 12, 64, 3072, 50257, 512, 16, 64, False),
}


def bf16(values: Array) -> Array:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@functools.cache
def random_matrix(slot: str, rows: int, cols: int, std: float) -> Array:
    """bfloat16 bits; the same ones for the next engine."""
    rng = np.random.default_rng(zlib.crc32(slot.encode()))
    return bf16(rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(std))


def make_engine(
    geometry: Geometry,
    *,
    dtype: str = "bfloat16",
    schedule: str = "auto",
    prefill_dtype: str = "same",
    memory_limit: int = 0,
) -> Any:
    """An engine with random weights; all layers share their values."""
    g = geometry
    core = _core.Engine(
        decoder=g.decoder(),
        memory=g.memory_settings(),
        device="cuda",
        dtype=dtype,
        schedule=schedule,
        prefill_dtype=prefill_dtype,
        memory_limit=memory_limit,
    )

    def load(slot: str, layers: int, rows: int, cols: int, std: float) -> None:
        values = random_matrix(slot, rows, cols, std)
        for layer in range(layers):
            core.load_matrix(slot, layer, values, "bfloat16")

    def fill(slot: str, layers: int, size: int, value: float) -> None:
        for layer in range(layers):
            core.load_vector(slot, layer, np.full(size, value, np.float32))

    width, qkv = g.width, (g.heads + 2 * g.kv_heads) * g.head_dim
    deep = 0.02 / (2 * g.layers) ** 0.5
    load("qkv", g.layers, qkv, width, 0.02)
    load("attn_out", g.layers, width, g.heads * g.head_dim, deep)
    load("mlp_up", g.layers, g.ffn * (2 if g.llama else 1), width, 0.02)
    load("mlp_down", g.layers, width, g.ffn, deep)
    load("mem_query", g.layers, g.d_mem, width, 0.02)
    load("mem_key", g.layers, g.d_mem, width, 0.02)
    load("mem_value", g.layers, width, width, 0.002)
    load("mem_gate", g.layers, 1, width, 0.02)
    load("embedding", 1, g.vocab, width, 0.5)
    load("memory", 1, g.memory, width, 0.5)
    fill("mem_gate_bias", g.layers, 1, 0.0)
    for norm in ("norm1", "norm2"):
        fill(norm, g.layers, width, 1.0)
    fill("final_norm", 1, width, 1.0)
    if not g.llama:
        load("positions", 1, g.rows + g.memory, width, 0.02)
        sizes = {
            "qkv_bias": qkv,
            "attn_out_bias": width,
            "mlp_up_bias": g.ffn,
            "mlp_down_bias": width,
        }
        for slot, size in sizes.items():
            fill(slot, g.layers, size, 0.01)
        for norm in ("norm1_bias", "norm2_bias"):
            fill(norm, g.layers, width, 0.01)
        fill("final_norm_bias", 1, width, 0.01)
    core.finish_loading()
    return core


def random_ids(geometry: Geometry, count: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).integers(0, geometry.vocab, count).astype(np.int32)


def feed(session: Any, ids: Array, logits: str = "none") -> None:
    _core.run_many([(session, ids)], logits, False, True, False, None)
