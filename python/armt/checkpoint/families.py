"""What the base models call their tensors. Adding one that fits the decoder is adding data here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Names of one kind of base model.

    A module `x` stores `x.weight` and, where the slot has one, `x.bias`. Where several modules make
    one slot, their rows follow one another.
    """

    layers_path: str
    layer_modules: Mapping[str, tuple[str, ...]]
    outer_modules: Mapping[str, str]
    in_out: bool = False
    """The matrices inside the layers are stored [in, out]."""
    interleaved: bool = False
    """The rows of qkv are H groups of (q, k, v)."""
    old_buffers: tuple[str, ...] = ()
    """Names inside a layer that older library versions stored and that mean nothing."""

    def is_in_out(self, plain_name: str) -> bool:
        """Whether a matrix of the base model is stored [in, out]."""
        return self.in_out and plain_name.startswith(f"base.{self.layers_path}.")


GPT2 = Family(
    layers_path="transformer.h",
    layer_modules={
        "norm1": ("ln_1",),
        "qkv": ("attn.c_attn",),
        "attn_out": ("attn.c_proj",),
        "norm2": ("ln_2",),
        "mlp_up": ("mlp.c_fc",),
        "mlp_down": ("mlp.c_proj",),
    },
    outer_modules={
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    in_out=True,
    old_buffers=("attn.bias", "attn.masked_bias"),
)
LLAMA = Family(
    layers_path="model.layers",
    layer_modules={
        "norm1": ("input_layernorm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "q_norm": ("self_attn.q_norm",),
        "k_norm": ("self_attn.k_norm",),
        "attn_out": ("self_attn.o_proj",),
        "norm2": ("post_attention_layernorm",),
        "mlp_up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp_down": ("mlp.down_proj",),
    },
    outer_modules={
        "embedding": "model.embed_tokens",
        "final_norm": "model.norm",
        "head": "lm_head",
    },
)
NEOX = Family(
    layers_path="gpt_neox.layers",
    layer_modules={
        "norm1": ("input_layernorm",),
        "qkv": ("attention.query_key_value",),
        "attn_out": ("attention.dense",),
        "norm2": ("post_attention_layernorm",),
        "mlp_up": ("mlp.dense_h_to_4h",),
        "mlp_down": ("mlp.dense_4h_to_h",),
    },
    outer_modules={
        "embedding": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    },
    interleaved=True,
    old_buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
)

FAMILIES: dict[str, Family] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gpt_neox": NEOX,
}

_LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN_DEFAULTS = _LLAMA_DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    },
    "llama": _LLAMA_DEFAULTS,
    "mistral": _LLAMA_DEFAULTS
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "use_sliding_window": True,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN_DEFAULTS,
    "qwen3": _QWEN_DEFAULTS,
    "gpt_neox": {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
}
"""What a base configuration means where it leaves a field out."""
