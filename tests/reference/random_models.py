"""Random small models under the official tensor names, for any base, dialect and feature.

Scales are chosen so that the memory matters (W_mv is not zero, embeddings and memory tokens are of
size about 1) without running away, and all widths differ, so that swapped axes show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import Array, Ints
from .checkpoint import model_from_tensors
from .decoder import decoder_class
from .model import Model
from .safetensors import round_to, write_safetensors

PREFIXES = {
    "paper": "memory_cell.",
    "modern": "armt.memory_cell.",
    "modern-inner": "",
    "rmt": "memory_cell.",
}
GPT2_BASE: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 64,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
LLAMA_BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 59,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
NEOX_BASE: dict[str, Any] = {
    "model_type": "gpt_neox",
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "hidden_act": "gelu",
    "rotary_pct": 0.5,
    "rotary_emb_base": 10000,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
BASES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2_BASE,
    "llama": LLAMA_BASE,
    "mistral": LLAMA_BASE | {"model_type": "mistral", "sliding_window": None},
    "qwen2": LLAMA_BASE | {"model_type": "qwen2"},
    "qwen3": LLAMA_BASE | {"model_type": "qwen3"},
    "gpt_neox": NEOX_BASE,
}
ARMT_COMMON: dict[str, Any] = {
    "num_mem_tokens": 3,
    "segment_size": 7,
    "segment_alignment": "left",
    "wrap_pos": False,
    "sliding_window": False,
}
ARMT_MEMORY: dict[str, Any] = {"d_mem": 8, "nu": 3, "correction": True}
ARMT_MODERN: dict[str, Any] = {
    "n_heads": 1,
    "use_denom": True,
    "gating": False,
    "use_sink": False,
}


@dataclass(frozen=True)
class RandomModel:
    """A configuration and weights that already have the values a file of `dtype` stores."""

    config: dict[str, Any]
    weights: dict[str, Array]
    dtype: str

    def reference(self) -> Model:
        """The float64 reference of exactly these weights."""
        return model_from_tensors(self.config, self.weights)

    def save(self, folder: Path) -> Path:
        """Writes config.json and model.safetensors; returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")
        write_safetensors(folder / "model.safetensors", self.weights, dtype=self.dtype)
        return folder

    @property
    def vocab_size(self) -> int:
        return int(self.config["base_model"]["vocab_size"])

    def tokens(self, shape: tuple[int, int], *, seed: int = 0) -> Ints:
        """Random ids [batch, tokens]."""
        return np.random.default_rng(seed).integers(0, self.vocab_size, size=shape)


class _Draw:
    """Random tensors; `gain` is the size of the output for an input of size 1."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def vector(self, *shape: int, mean: float = 0.0, std: float = 0.1) -> Array:
        values: Array = mean + std * self.rng.standard_normal(shape)
        return values

    def out_in(self, rows: int, columns: int, *, gain: float = 1.0) -> Array:
        return self.vector(rows, columns, std=gain / columns**0.5)

    def in_out(self, rows: int, columns: int, *, gain: float = 1.0) -> Array:
        return self.vector(rows, columns, std=gain / rows**0.5)


def random_model(
    *,
    base: str = "gpt2",
    dialect: str = "paper",
    seed: int = 0,
    dtype: str = "F32",
    base_options: Mapping[str, Any] | None = None,
    armt_options: Mapping[str, Any] | None = None,
    memory_gain: float = 0.25,
) -> RandomModel:
    """A random model; the two option mappings replace entries of the default configuration.

    `memory_gain` scales W_mv, and so how strongly the memory acts; 0 leaves it without effect.
    """
    base_model = BASES[base] | dict(base_options or {})
    armt = ARMT_COMMON | {"layers_attr": decoder_class(base_model).layers_path}
    armt |= {} if dialect == "rmt" else ARMT_MEMORY
    armt |= ARMT_MODERN if dialect.startswith("modern") else {}
    armt |= dict(armt_options or {})
    draw = _Draw(seed)
    tensors = {"gpt2": _gpt2, "gpt_neox": _neox}.get(base, _llama)(draw, base_model, armt, dialect)
    width = base_model["n_embd" if base == "gpt2" else "hidden_size"]
    layers = base_model["n_layer" if base == "gpt2" else "num_hidden_layers"]
    named = _wrap(tensors, armt["layers_attr"], rmt=dialect == "rmt")
    if dialect != "rmt":
        for index in range(layers):
            path = f"model.{armt['layers_attr']}.{index}."
            maps = _memory_maps(draw, armt, width=width, gain=memory_gain)
            named |= {path + name: tensor for name, tensor in maps.items()}
    named["memory"] = draw.vector(armt["num_mem_tokens"], width, std=0.7)
    if armt.get("use_sink", False):
        named["sink"] = draw.vector(1, width, std=0.7)
    prefix = PREFIXES[dialect]
    head = "model." + decoder_class(base_model).head_name
    config = {
        "format": "armt-conformance-1",
        "name": f"random-{dialect}-{base}-{seed}",
        "dialect": dialect,
        "base_model": base_model,
        "armt": armt,
        "weights": {
            "file": "model.safetensors",
            "cell_prefix": prefix,
            "output_embedding_stored": head in named,
        },
    }
    weights = {prefix + name: round_to(tensor, dtype) for name, tensor in named.items()}
    return RandomModel(config, weights, dtype)


def _wrap(tensors: Mapping[str, Array], layers_path: str, *, rmt: bool) -> dict[str, Array]:
    """Names inside the memory cell: `model.` in front, and `.layer.` inside ARMT's layers."""
    named = {}
    for name, tensor in tensors.items():
        rest = name.removeprefix(layers_path + ".")
        if rest != name and not rmt:
            index, _, inside = rest.partition(".")
            name = f"{layers_path}.{index}.layer.{inside}"
        named["model." + name] = tensor
    return named


def _memory_maps(
    draw: _Draw, armt: Mapping[str, Any], *, width: int, gain: float
) -> dict[str, Array]:
    """Query and key maps, value map and gate of one layer."""
    gates = width if armt.get("gating", False) else armt.get("n_heads", 1)
    return {
        "W_mq.weight": draw.out_in(armt["d_mem"], width, gain=0.8),
        "W_mk.weight": draw.out_in(armt["d_mem"], width, gain=0.8),
        "W_mv.weight": draw.out_in(width, width, gain=gain),
        "W_mb.weight": draw.out_in(gates, width),
        "W_mb.bias": draw.vector(gates, std=0.4),
    }


def _norm(draw: _Draw, name: str, width: int, *, bias: bool) -> dict[str, Array]:
    tensors = {name + ".weight": draw.vector(width, mean=1.0)}
    return tensors | ({name + ".bias": draw.vector(width)} if bias else {})


def _gpt2(
    draw: _Draw, base: Mapping[str, Any], armt: Mapping[str, Any], dialect: str
) -> dict[str, Array]:
    width, inner = base["n_embd"], base["n_inner"] or 4 * base["n_embd"]
    # wrap_pos adds rows to the position table: one set a group of memory tokens (RMT has two).
    extra = armt["num_mem_tokens"] * (2 if dialect == "rmt" else 1) if armt["wrap_pos"] else 0
    tensors = {
        "transformer.wte.weight": draw.vector(base["vocab_size"], width, std=0.7),
        "transformer.wpe.weight": draw.vector(base["n_positions"] + extra, width, std=0.3),
    }
    tensors |= _norm(draw, "transformer.ln_f", width, bias=True)
    for index in range(base["n_layer"]):
        at = f"transformer.h.{index}."
        tensors |= _norm(draw, at + "ln_1", width, bias=True)
        tensors |= _norm(draw, at + "ln_2", width, bias=True)
        for name, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, inner),
            ("mlp.c_proj", inner, width),
        ):
            gain = 0.7 if name.endswith("c_proj") else 1.2
            tensors[at + name + ".weight"] = draw.in_out(rows, columns, gain=gain)
            tensors[at + name + ".bias"] = draw.vector(columns)
    return tensors


def _llama(
    draw: _Draw, base: Mapping[str, Any], armt: Mapping[str, Any], dialect: str
) -> dict[str, Array]:
    width, inner, kind = base["hidden_size"], base["intermediate_size"], base["model_type"]
    c = base.get("head_dim") or width // base["num_attention_heads"]
    q_width, kv_width = base["num_attention_heads"] * c, base["num_key_value_heads"] * c
    tensors = {"model.embed_tokens.weight": draw.vector(base["vocab_size"], width, std=0.7)}
    if not base["tie_word_embeddings"]:
        tensors["lm_head.weight"] = draw.out_in(base["vocab_size"], width, gain=1.5)
    tensors |= _norm(draw, "model.norm", width, bias=False)
    qkv_bias = kind == "qwen2" or base["attention_bias"]
    for index in range(base["num_hidden_layers"]):
        at = f"model.layers.{index}."
        tensors |= _norm(draw, at + "input_layernorm", width, bias=False)
        tensors |= _norm(draw, at + "post_attention_layernorm", width, bias=False)
        if kind == "qwen3":
            tensors |= _norm(draw, at + "self_attn.q_norm", c, bias=False)
            tensors |= _norm(draw, at + "self_attn.k_norm", c, bias=False)
        for name, rows, columns, bias, gain in (
            ("self_attn.q_proj", q_width, width, qkv_bias, 1.2),
            ("self_attn.k_proj", kv_width, width, qkv_bias, 1.2),
            ("self_attn.v_proj", kv_width, width, qkv_bias, 1.2),
            ("self_attn.o_proj", width, q_width, base["attention_bias"], 0.7),
            ("mlp.gate_proj", inner, width, base["mlp_bias"], 1.2),
            ("mlp.up_proj", inner, width, base["mlp_bias"], 1.2),
            ("mlp.down_proj", width, inner, base["mlp_bias"], 0.7),
        ):
            tensors[at + name + ".weight"] = draw.out_in(rows, columns, gain=gain)
            if bias:
                tensors[at + name + ".bias"] = draw.vector(rows, std=0.2)
    return tensors


def _neox(
    draw: _Draw, base: Mapping[str, Any], armt: Mapping[str, Any], dialect: str
) -> dict[str, Array]:
    width, inner = base["hidden_size"], base["intermediate_size"]
    tensors = {"gpt_neox.embed_in.weight": draw.vector(base["vocab_size"], width, std=0.7)}
    if not base["tie_word_embeddings"]:
        tensors["embed_out.weight"] = draw.out_in(base["vocab_size"], width, gain=1.5)
    tensors |= _norm(draw, "gpt_neox.final_layer_norm", width, bias=True)
    for index in range(base["num_hidden_layers"]):
        at = f"gpt_neox.layers.{index}."
        tensors |= _norm(draw, at + "input_layernorm", width, bias=True)
        tensors |= _norm(draw, at + "post_attention_layernorm", width, bias=True)
        for name, rows, columns, gain in (
            ("attention.query_key_value", 3 * width, width, 1.2),
            ("attention.dense", width, width, 0.7),
            ("mlp.dense_h_to_4h", inner, width, 1.2),
            ("mlp.dense_4h_to_h", width, inner, 0.7),
        ):
            tensors[at + name + ".weight"] = draw.out_in(rows, columns, gain=gain)
            tensors[at + name + ".bias"] = draw.vector(rows)
    return tensors
