"""Base model configuration -> the engine's decoder settings (DecoderConfig)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from armt.checkpoint.families import DEFAULTS, FAMILIES, Family
from armt.checkpoint.fields import Fields
from armt.checkpoint.problems import Problems
from armt.checkpoint.slots import BIASES

MAX_LAYERS = 4096
Shapes = Mapping[str, tuple[int, ...]]
"""Plain tensor name -> shape as stored."""

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu_erf",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
NO_ROPE: dict[str, Any] = {
    "rope_theta": 10000.0,
    "rope_scaling": "none",
    "rope_factor": 1.0,
    "rope_low_freq": 1.0,
    "rope_high_freq": 4.0,
    "rope_original_length": 8192.0,
}


@dataclass(frozen=True)
class Base:
    """A base model: settings for the engine, and what else its files are read by."""

    family: Family
    decoder: dict[str, Any]
    """The fields of DecoderConfig; learned_positions without the rows of memory tokens."""
    biases: tuple[str, ...]
    tied: bool
    """The output embedding is the input embedding."""
    window: int | None
    """Columns that a row of the base model's own attention may see, or all."""


def read_base(config: Mapping[str, Any], shapes: Shapes, problems: Problems) -> Base | None:
    """None, with the reason among the problems, if the kind of model is not known."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        problems.add(f"base_model.model_type: found {kind!r}, expected one of {known}")
        return None
    if kind == "gpt2":
        config = {GPT2_ALIASES.get(key, key): value for key, value in config.items()}
    fields = Fields("base_model", config, DEFAULTS[kind], problems)
    fields.refuse("quantization_config", why="quantised weights are not supported; export others")
    fields.refuse("add_cross_attention", why="cross-attention is not supported")
    if kind == "gpt2":
        return _gpt2(fields)
    if kind == "gpt_neox":
        return _neox(fields, config)
    return _llama(fields, config, shapes, kind)


def _gpt2(fields: Fields) -> Base:
    width, heads = fields.whole("n_embd"), fields.whole("n_head")
    head_dim = _head_dim(fields, "n_head", width, heads)
    decoder = {
        "vocab_size": fields.whole("vocab_size"),
        "d_model": width,
        "n_layers": fields.whole("n_layer", most=MAX_LAYERS),
        "n_heads": heads,
        "n_kv_heads": heads,
        "head_dim": head_dim,
        "d_ff": fields.whole("n_inner") if fields.given("n_inner") else 4 * width,
        "norm": "layer",
        "norm_eps": fields.number("layer_norm_epsilon"),
        "activation": fields.choice("activation_function", ACTIVATIONS),
        "gated_mlp": False,
        "parallel_residual": False,
        "qk_norm": False,
        "attention_scale": 0.0 if fields.flag("scale_attn_weights") else 1.0,
        "scale_by_inverse_layer": fields.flag("scale_attn_by_inverse_layer_idx"),
        "learned_positions": fields.whole("n_positions"),
        "rotary_dims": 0,
    }
    family = FAMILIES["gpt2"]
    return Base(family, decoder | NO_ROPE, BIASES, fields.flag("tie_word_embeddings"), None)


def _neox(fields: Fields, config: Mapping[str, Any]) -> Base:
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    head_dim = _head_dim(fields, "num_attention_heads", width, heads)
    rope = _rope(fields, config, theta="rotary_emb_base")
    newer = not fields.given("rotary_pct") and fields.given("partial_rotary_factor")
    part = fields.number("partial_rotary_factor" if newer else "rotary_pct")
    if part > 1.0:
        fields.problem("rotary_pct", f"found {part:g}, expected a share in (0, 1]")
    rotary = int(head_dim * min(part, 1.0))
    if rotary % 2:
        fields.problem("rotary_pct", f"rotates {rotary} features of a head, expected an even count")
    decoder = {
        "vocab_size": fields.whole("vocab_size"),
        "d_model": width,
        "n_layers": fields.whole("num_hidden_layers", most=MAX_LAYERS),
        "n_heads": heads,
        "n_kv_heads": heads,
        "head_dim": head_dim,
        "d_ff": fields.whole("intermediate_size"),
        "norm": "layer",
        "norm_eps": fields.number("layer_norm_eps"),
        "activation": fields.choice("hidden_act", ACTIVATIONS),
        "gated_mlp": False,
        "parallel_residual": fields.flag("use_parallel_residual"),
        "qk_norm": False,
        "attention_scale": 0.0,
        "scale_by_inverse_layer": False,
        "learned_positions": 0,
        "rotary_dims": rotary,
    }
    biases = BIASES if fields.flag("attention_bias") else BIASES[2:]
    family = FAMILIES["gpt_neox"]
    return Base(family, decoder | rope, biases, fields.flag("tie_word_embeddings"), None)


def _llama(fields: Fields, config: Mapping[str, Any], shapes: Shapes, kind: str) -> Base:
    if fields.given("partial_rotary_factor") and fields.number("partial_rotary_factor") != 1.0:
        fields.problem("partial_rotary_factor", "expected 1: whole heads are rotated")
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    layers = fields.whole("num_hidden_layers", most=MAX_LAYERS)
    head_dim, kv_heads = _attention_widths(fields, config, shapes, width, heads, layers)
    decoder = {
        "vocab_size": fields.whole("vocab_size"),
        "d_model": width,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "head_dim": head_dim,
        "d_ff": fields.whole("intermediate_size"),
        "norm": "rms",
        "norm_eps": fields.number("rms_norm_eps"),
        "activation": fields.choice("hidden_act", ACTIVATIONS),
        "gated_mlp": True,
        "parallel_residual": False,
        "qk_norm": kind == "qwen3",
        "attention_scale": 0.0,
        "scale_by_inverse_layer": False,
        "learned_positions": 0,
        "rotary_dims": head_dim,
    }
    if head_dim % 2:
        fields.problem("head_dim", f"found {head_dim}, expected an even number to rotate")
    decoder |= _rope(fields, config, theta="rope_theta")
    attention = fields.flag("attention_bias")
    biases = {
        "qkv_bias": kind == "qwen2" or (kind != "mistral" and attention),
        "attn_out_bias": kind in ("llama", "qwen3") and attention,
        "mlp_up_bias": kind == "llama" and fields.flag("mlp_bias"),
        "mlp_down_bias": kind == "llama" and fields.flag("mlp_bias"),
    }
    return Base(
        FAMILIES[kind],
        decoder,
        tuple(name for name in BIASES if biases[name]),
        fields.flag("tie_word_embeddings"),
        _window(fields, config),
    )


def _head_dim(fields: Fields, name: str, width: int, heads: int) -> int:
    if width % heads:
        fields.problem(name, f"{heads} heads do not divide the width {width}")
    return max(1, width // heads)


def _window(fields: Fields, config: Mapping[str, Any]) -> int | None:
    """Mistral's and Qwen's own attention window. Here a null says that there is none."""
    null = "sliding_window" in config and config["sliding_window"] is None
    if null or fields.raw("sliding_window") is None or not fields.flag("use_sliding_window"):
        return None
    return fields.whole("sliding_window")


def _attention_widths(
    fields: Fields,
    config: Mapping[str, Any],
    shapes: Shapes,
    width: int,
    heads: int,
    layers: int,
) -> tuple[int, int]:
    """Head width c and Hkv, from the shapes: c = rows of q_proj / Hq, Hkv = rows of k_proj / c.

    A configuration may hold values that followed from defaults of another size, so its words only
    count where the shapes disagree among themselves or are absent.
    """
    said = fields.whole("head_dim") if fields.given("head_dim") else max(1, width // heads)
    null = "num_key_value_heads" in config and config["num_key_value_heads"] is None
    said_kv = heads if null else fields.whole("num_key_value_heads")

    def rows(modules: tuple[str, ...], axis: int) -> list[int]:
        names = (
            f"base.model.layers.{i}.self_attn.{module}.weight"
            for i in range(layers)
            for module in modules
        )
        return [shapes[name][axis] for name in names if len(shapes.get(name, ())) == 2]

    q_rows = vote(rows(("q_proj",), 0) + rows(("o_proj",), 1), said * heads)
    if q_rows % heads:
        fields.problem(
            "num_attention_heads", f"{heads} heads do not divide the {q_rows} rows of q_proj"
        )
    c = max(1, q_rows // heads)
    kv_rows = vote(rows(("k_proj", "v_proj"), 0), said_kv * c)
    if kv_rows % c:
        fields.problem("num_key_value_heads", f"k_proj has {kv_rows} rows, heads are {c} wide")
    kv_heads = max(1, kv_rows // c)
    if heads % kv_heads:
        fields.problem(
            "num_attention_heads",
            f"found {heads}, expected a multiple of the {kv_heads} key/value heads of k_proj",
        )
    return c, kv_heads


def vote(found: Iterable[int], said: int) -> int:
    """The most frequent of the sizes found; a tie, or none at all, goes to what was said."""
    counts = Counter(found)
    most = max(counts.values(), default=0)
    first = [size for size, count in counts.items() if count == most]
    return said if said in first or not first else first[0]


def _rope(fields: Fields, config: Mapping[str, Any], *, theta: str) -> dict[str, Any]:
    """Rotary base and scaling. Newer libraries keep both in `rope_parameters`."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        fields.problem("rope_scaling", f"found {type(settings).__name__}, expected an object")
        settings = {}
    rope = dict(NO_ROPE)
    inner = fields.nested("rope_scaling", settings)
    if inner.given("rope_theta"):
        rope["rope_theta"] = inner.number("rope_theta")
    elif theta == "rotary_emb_base" and not fields.given(theta) and fields.given("rope_theta"):
        rope["rope_theta"] = fields.number("rope_theta")
    else:
        rope["rope_theta"] = fields.number(theta)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return rope
    if kind == "linear":
        return rope | {"rope_scaling": "linear", "rope_factor": inner.number("factor")}
    if kind != "llama3":
        fields.problem(
            "rope_scaling", f"found the type {kind!r}, expected default, linear or llama3"
        )
        return rope
    low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    if high <= low:
        fields.problem("rope_scaling", "high_freq_factor must be above low_freq_factor")
    return rope | {
        "rope_scaling": "llama3",
        "rope_factor": inner.number("factor"),
        "rope_low_freq": low,
        "rope_high_freq": high,
        "rope_original_length": inner.number("original_max_position_embeddings"),
    }
