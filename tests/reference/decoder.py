"""Base decoders: GPT-2, Llama and its kin, GPT-NeoX (docs/mathematics.md).

Letters: B batch rows, R rows, C columns (cached ones first), D width, H query heads, G key/value
heads, c width of a head. Weights are a plain dict under the base model's usual tensor names.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .arrays import Array, Bools, Ints, merge_heads, split_heads
from .memory import sigmoid

Weights = Mapping[str, Array]
KeyValue = tuple[Array, Array]  # keys after rotation and values, each [B, G, C, c]

_erf = np.frompyfunc(math.erf, 1, 1)


def gelu_tanh(x: Array) -> Array:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def gelu_erf(x: Array) -> Array:
    """0.5 x (1 + erf(x / sqrt(2)))."""
    return 0.5 * x * (1.0 + np.asarray(_erf(x / math.sqrt(2.0)), dtype=np.float64))


def silu(x: Array) -> Array:
    """x sigmoid(x)."""
    return x * sigmoid(x)


def relu(x: Array) -> Array:
    """max(x, 0)."""
    return np.maximum(x, 0.0)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": gelu_erf,
    "silu": silu,
    "swish": silu,
    "relu": relu,
}


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) * w + b, with the biased variance."""
    centred = x - x.mean(axis=-1, keepdims=True)
    std = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    result: Array = centred / std * weight + bias
    return result


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * w."""
    root: Array = np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return x / root * weight


def attention(q: Array, k: Array, v: Array, visible: Bools, *, scale: float) -> Array:
    """softmax(scale q k^T over visible columns) v.

    q [B, H, R, c], k and v [B, G, C, c], visible [B, R, C] -> [B, R, H * c].
    Query head i uses key/value head floor(i G / H).
    """
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.where(visible[:, None], scale * (q @ k.swapaxes(-1, -2)), -np.inf)
    # A row that sees nothing attends to all columns alike.
    sees_any = np.any(visible, axis=-1)[:, None, :, None]
    scores = np.where(sees_any, scores, 0.0)
    weights: Array = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return merge_heads(weights @ v)


def rotary_frequencies(width: int, *, theta: float, scaling: Mapping[str, Any] | None) -> Array:
    """Angle of a position for each i < width / 2."""
    f = theta ** (-2.0 * np.arange(width // 2) / width)
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if scaling is None or kind == "default":
        return f
    if kind == "linear":
        return f / float(scaling["factor"])
    if kind != "llama3":
        raise ValueError(f"rope_scaling: found {kind!r}, expected default, linear or llama3")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    n, g = scaling["original_max_position_embeddings"], scaling["factor"]
    waves = 2.0 * math.pi / f
    t = (n / waves - low) / (high - low)
    between = (1.0 - t) * f / g + t * f
    return np.where(waves < n / high, f, np.where(waves > n / low, f / g, between))


def rotate(x: Array, positions: Ints, frequencies: Array) -> Array:
    """Half-split rotation of the first 2 * len(frequencies) features.

    x [B, heads, R, c], positions [B, R] or [1, R].
    """
    half = len(frequencies)
    angle = (positions[..., None] * frequencies)[:, None]  # [B, 1, R, half]
    first, second, rest = np.split(x, [half, 2 * half], axis=-1)
    turned = first * np.cos(angle) - second * np.sin(angle)
    turned_2 = second * np.cos(angle) + first * np.sin(angle)
    return np.concatenate([turned, turned_2, rest], axis=-1)


def with_past(past: KeyValue | None, own: KeyValue) -> KeyValue:
    """Cached columns before the current ones."""
    if past is None:
        return own
    return (
        np.concatenate([past[0], own[0]], axis=2),
        np.concatenate([past[1], own[1]], axis=2),
    )


class Decoder(ABC):
    """What the memory needs to know about a base model."""

    layers_path: str  # path of the layer list inside the base model
    embedding_name: str
    head_name: str
    table_rows = 0  # rows of a learned position table

    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        self.config = config
        self.weights = weights
        self.d_model = int(weights[self.embedding_name].shape[1])

    def embed(self, ids: Ints) -> Array:
        """[B, T] -> [B, T, D]."""
        return self.weights[self.embedding_name][ids]

    def add_positions(self, rows: Array, positions: Ints) -> Array:
        """Learned positions, where the base model has them: [B, R, D] -> [B, R, D]."""
        return rows

    def logits(self, x: Array) -> Array:
        """Output embedding, or the input embedding where none is stored."""
        head = self.weights.get(self.head_name, self.weights[self.embedding_name])
        scores: Array = x @ head.T
        return scores

    def linear(self, x: Array, name: str) -> Array:
        """x W^T, plus the bias where there is one."""
        y: Array = x @ self.weights[name + ".weight"].T
        bias = self.weights.get(name + ".bias")
        return y if bias is None else y + bias

    def layer(self, index: int, name: str) -> str:
        return f"{self.layers_path}.{index}.{name}"

    @property
    @abstractmethod
    def n_layers(self) -> int: ...

    @abstractmethod
    def block(
        self, index: int, x: Array, positions: Ints, visible: Bools, past: KeyValue | None
    ) -> tuple[Array, KeyValue]:
        """One unmodified layer: its output [B, R, D] and the keys and values of its own rows."""

    @abstractmethod
    def final_norm(self, x: Array) -> Array: ...


class GPT2(Decoder):
    layers_path = "transformer.h"
    embedding_name = "transformer.wte.weight"
    head_name = "lm_head.weight"

    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        super().__init__(config, weights)
        self.table = weights["transformer.wpe.weight"]
        self.table_rows = len(self.table)
        self.eps = float(config.get("layer_norm_epsilon", 1e-5))
        self.activation = ACTIVATIONS[config.get("activation_function", "gelu_new")]

    @property
    def n_layers(self) -> int:
        return int(self.config.get("n_layer", 12))

    def add_positions(self, rows: Array, positions: Ints) -> Array:
        if positions.max(initial=0) >= self.table_rows:
            raise ValueError(
                f"position {positions.max()} is outside the table of {self.table_rows} rows"
            )
        return rows + self.table[positions]

    def linear(self, x: Array, name: str) -> Array:
        """x W + b: GPT-2 stores its matrices [in, out]."""
        return x @ self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def _norm(self, x: Array, name: str) -> Array:
        return layer_norm(x, self.weights[name + ".weight"], self.weights[name + ".bias"], self.eps)

    def block(
        self, index: int, x: Array, positions: Ints, visible: Bools, past: KeyValue | None
    ) -> tuple[Array, KeyValue]:
        n = int(self.config.get("n_head", 12))
        a = self._norm(x, self.layer(index, "ln_1"))
        qkv = self.linear(a, self.layer(index, "attn.c_attn"))
        q, k, v = (split_heads(part, n) for part in np.split(qkv, 3, axis=-1))
        scale = q.shape[-1] ** -0.5 if self.config.get("scale_attn_weights", True) else 1.0
        if self.config.get("scale_attn_by_inverse_layer_idx", False):
            scale /= index + 1
        mixed = attention(q, *with_past(past, (k, v)), visible, scale=scale)
        x = x + self.linear(mixed, self.layer(index, "attn.c_proj"))
        b = self._norm(x, self.layer(index, "ln_2"))
        inside = self.activation(self.linear(b, self.layer(index, "mlp.c_fc")))
        return x + self.linear(inside, self.layer(index, "mlp.c_proj")), (k, v)

    def final_norm(self, x: Array) -> Array:
        return self._norm(x, "transformer.ln_f")


class Llama(Decoder):
    """Llama, Mistral, Qwen2 and Qwen3: biases and head norms are used where they are stored."""

    layers_path = "model.layers"
    embedding_name = "model.embed_tokens.weight"
    head_name = "lm_head.weight"

    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        super().__init__(config, weights)
        self.eps = float(config.get("rms_norm_eps", 1e-6))
        self.activation = ACTIVATIONS[config.get("hidden_act", "silu")]
        self.heads = int(config.get("num_attention_heads", 32))
        # Widths come from the shapes; a configuration may leave misleading defaults.
        q = weights[self.layer(0, "self_attn.q_proj.weight")]
        k = weights[self.layer(0, "self_attn.k_proj.weight")]
        self.head_width = len(q) // self.heads
        self.kv_heads = len(k) // self.head_width
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not share {self.kv_heads} key heads")
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        self.window = math.inf if window is None else int(window)
        self.frequencies = rotary_frequencies(
            self.head_width,
            theta=float(config.get("rope_theta", 10000.0)),
            scaling=config.get("rope_scaling"),
        )

    @property
    def n_layers(self) -> int:
        return int(self.config.get("num_hidden_layers", 32))

    def _norm(self, x: Array, name: str) -> Array:
        return rms_norm(x, self.weights[name + ".weight"], self.eps)

    def _head_norm(self, x: Array, name: str) -> Array:
        """Qwen3: RMS norm over the features of each head, before the rotation."""
        return self._norm(x, name) if name + ".weight" in self.weights else x

    def block(
        self, index: int, x: Array, positions: Ints, visible: Bools, past: KeyValue | None
    ) -> tuple[Array, KeyValue]:
        if visible.shape[-1] > self.window:
            raise ValueError(f"{visible.shape[-1]} columns, base sliding_window {self.window}")
        own = self.layer(index, "self_attn.")
        a = self._norm(x, self.layer(index, "input_layernorm"))
        q = split_heads(self.linear(a, own + "q_proj"), self.heads)
        k = split_heads(self.linear(a, own + "k_proj"), self.kv_heads)
        q, k = self._head_norm(q, own + "q_norm"), self._head_norm(k, own + "k_norm")
        v = split_heads(self.linear(a, own + "v_proj"), self.kv_heads)
        q, k = (rotate(part, positions, self.frequencies) for part in (q, k))
        mixed = attention(q, *with_past(past, (k, v)), visible, scale=self.head_width**-0.5)
        x = x + self.linear(mixed, own + "o_proj")

        b = self._norm(x, self.layer(index, "post_attention_layernorm"))
        mlp = self.layer(index, "mlp.")
        gate = self.activation(self.linear(b, mlp + "gate_proj"))
        inside = gate * self.linear(b, mlp + "up_proj")
        return x + self.linear(inside, mlp + "down_proj"), (k, v)

    def final_norm(self, x: Array) -> Array:
        return self._norm(x, "model.norm")


class GPTNeoX(Decoder):
    layers_path = "gpt_neox.layers"
    embedding_name = "gpt_neox.embed_in.weight"
    head_name = "embed_out.weight"

    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        super().__init__(config, weights)
        self.eps = float(config.get("layer_norm_eps", 1e-5))
        self.activation = ACTIVATIONS[config.get("hidden_act", "gelu")]
        self.heads = int(config.get("num_attention_heads", 64))
        self.head_width = self.d_model // self.heads
        self.frequencies = rotary_frequencies(
            int(self.head_width * config.get("rotary_pct", 0.25)),
            theta=float(config.get("rotary_emb_base", 10000.0)),
            scaling=config.get("rope_scaling"),
        )

    @property
    def n_layers(self) -> int:
        return int(self.config.get("num_hidden_layers", 44))

    def _norm(self, x: Array, name: str) -> Array:
        return layer_norm(x, self.weights[name + ".weight"], self.weights[name + ".bias"], self.eps)

    def block(
        self, index: int, x: Array, positions: Ints, visible: Bools, past: KeyValue | None
    ) -> tuple[Array, KeyValue]:
        own = self.layer(index, "attention.")
        a = self._norm(x, self.layer(index, "input_layernorm"))
        qkv = self.linear(a, own + "query_key_value")
        # The outputs are H groups of (q, k, v), each of c values.
        q, k, v = np.split(split_heads(qkv, self.heads), 3, axis=-1)
        q, k = (rotate(part, positions, self.frequencies) for part in (q, k))
        mixed = attention(q, *with_past(past, (k, v)), visible, scale=self.head_width**-0.5)
        after_attention = x + self.linear(mixed, own + "dense")

        parallel = self.config.get("use_parallel_residual", True)
        b = self._norm(
            x if parallel else after_attention, self.layer(index, "post_attention_layernorm")
        )
        inside = self.activation(self.linear(b, self.layer(index, "mlp.dense_h_to_4h")))
        return after_attention + self.linear(inside, self.layer(index, "mlp.dense_4h_to_h")), (k, v)

    def final_norm(self, x: Array) -> Array:
        return self._norm(x, "gpt_neox.final_layer_norm")


DECODERS: dict[str, type[Decoder]] = {
    "gpt2": GPT2,
    "llama": Llama,
    "mistral": Llama,
    "qwen2": Llama,
    "qwen3": Llama,
    "gpt_neox": GPTNeoX,
}


def decoder_class(base_model: Mapping[str, Any]) -> type[Decoder]:
    """The decoder of a base configuration."""
    kind = base_model.get("model_type")
    if kind not in DECODERS:
        raise ValueError(f"base_model.model_type: found {kind!r}, expected one of {list(DECODERS)}")
    return DECODERS[kind]
