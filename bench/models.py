"""Random-weight models in the sizes that the benchmarks measure, as checkpoint folders.

The weights are conditioned as a trained model's are, so that float32 and bfloat16 stay comparable
over many segments: embeddings are large (25 times the usual 0.02), memory values small (0.002).
Everything else is GPT-2's own initialisation, with the biases and norms moved off 0 and 1 so that
a forgotten one shows.
"""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import armt
from armt.checkpoint.weights_file import Entry, write_tensors

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]

EMBEDDING_STD = 0.5
MEMORY_VALUE_STD = 0.002
PREFIX = "memory_cell."


@dataclass(frozen=True)
class Geometry:
    """Sizes of a GPT-2 with the paper dialect's memory."""

    name: str
    layers: int
    width: int
    heads: int
    vocab: int
    segment: int
    memory: int
    d_mem: int

    @property
    def rows(self) -> int:
        """Rows of one segment: tokens, then memory tokens."""
        return self.segment + self.memory

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def features(self) -> int:
        return 6 * self.d_mem

    def config(self) -> dict[str, Any]:
        """`config.json` of a raw paper-dialect checkpoint."""
        base = {
            "model_type": "gpt2",
            "vocab_size": self.vocab,
            "n_embd": self.width,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_positions": max(self.rows, 2 * self.segment),
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
        }
        memory = {
            "num_mem_tokens": self.memory,
            "d_mem": self.d_mem,
            "nu": 3,
            "correction": True,
            "segment_size": self.segment,
            "segment_alignment": "left",
            "wrap_pos": False,
            "sliding_window": False,
            "layers_attr": "transformer.h",
        }
        weights = {
            "file": "model.safetensors",
            "cell_prefix": PREFIX,
            "output_embedding_stored": False,
        }
        return {"dialect": "paper", "base_model": base, "armt": memory, "weights": weights}

    def token_flops(self) -> float:
        """Arithmetic for one token of a whole segment read without logits, nothing left out."""
        w, rows = self.width, self.rows
        products = 2.0 * rows * (12 * w * w + w * self.d_mem + self.features * w / 4)
        attention = 2.0 * rows * rows * w  # the causal half of scores and values
        write = 2.0 * self.memory * (w * (w + self.d_mem) + self.features * w / 2)
        return self.layers * (products + attention + write) / self.segment


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        Geometry("gpt2", 12, 768, 12, 50257, 512, 16, 64),
        Geometry("retrieval", 4, 128, 4, 104, 10, 4, 64),
        Geometry("tiny", 2, 64, 2, 61, 16, 4, 8),
    )
}


def random_weights(geometry: Geometry, *, seed: int = 0) -> dict[str, FloatArray]:
    """Tensors under the official names, float32 that bfloat16 holds exactly.

    So the bfloat16 and the float32 engine have the very same weights, and their difference is
    that of the arithmetic.
    """
    rng = np.random.default_rng(seed)
    g, w = geometry, geometry.width

    def normal(*shape: int, std: float, mean: float = 0.0) -> FloatArray:
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(std) + np.float32(mean)
        return from_bf16(to_bf16(values))

    model = PREFIX + "model.transformer."
    positions = g.config()["base_model"]["n_positions"]
    weights = {
        PREFIX + "memory": normal(g.memory, w, std=EMBEDDING_STD),
        model + "wte.weight": normal(g.vocab, w, std=EMBEDDING_STD),
        model + "wpe.weight": normal(positions, w, std=0.02),
        model + "ln_f.weight": normal(w, std=0.02, mean=1.0),
        model + "ln_f.bias": normal(w, std=0.02),
    }
    deep = 0.02 / (2 * g.layers) ** 0.5
    for i in range(g.layers):
        at = f"{model}h.{i}."
        for norm in ("ln_1", "ln_2"):
            weights[f"{at}layer.{norm}.weight"] = normal(w, std=0.02, mean=1.0)
            weights[f"{at}layer.{norm}.bias"] = normal(w, std=0.02)
        for name, rows, columns, std in (
            ("attn.c_attn", w, 3 * w, 0.02),
            ("attn.c_proj", w, w, deep),
            ("mlp.c_fc", w, 4 * w, 0.02),
            ("mlp.c_proj", 4 * w, w, deep),
        ):
            weights[f"{at}layer.{name}.weight"] = normal(rows, columns, std=std)
            weights[f"{at}layer.{name}.bias"] = normal(columns, std=0.02)
        weights[at + "W_mq.weight"] = normal(g.d_mem, w, std=0.02)
        weights[at + "W_mk.weight"] = normal(g.d_mem, w, std=0.02)
        weights[at + "W_mv.weight"] = normal(w, w, std=MEMORY_VALUE_STD)
        weights[at + "W_mb.weight"] = normal(1, w, std=0.02)
        weights[at + "W_mb.bias"] = normal(1, std=0.02)
    return weights


def to_bf16(values: FloatArray) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> FloatArray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def save(geometry: Geometry, weights: dict[str, FloatArray], folder: Path) -> Path:
    """Writes config.json and model.safetensors (float32)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(geometry.config(), indent=1) + "\n")
    entries = [
        Entry(name, "float32", array.shape, functools.partial(np.asarray, array))
        for name, array in weights.items()
    ]
    write_tensors(folder / "model.safetensors", entries, "pt")
    return folder


def make_engine(
    geometry: Geometry, weights: dict[str, FloatArray] | None = None, **options: Any
) -> armt.Engine:
    """An engine from a checkpoint folder that is gone afterwards; options of from_pretrained."""
    if weights is None:
        weights = random_weights(geometry)
    with tempfile.TemporaryDirectory() as folder:
        path = save(geometry, weights, Path(folder) / geometry.name)
        return armt.Engine.from_pretrained(path, **options)


def random_ids(geometry: Geometry, count: int, *, seed: int = 1) -> npt.NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, geometry.vocab, count).astype(np.int32)
