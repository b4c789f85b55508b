"""The project's own folder: config.json (format "armt-1") and model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from armt.checkpoint.assemble import check_stored, plan_of
from armt.checkpoint.base_config import MAX_LAYERS
from armt.checkpoint.checkpoint import Checkpoint, common_dtype
from armt.checkpoint.config import generation_of, token_ids_of
from armt.checkpoint.fields import LARGEST, Fields
from armt.checkpoint.memory_config import ALIGNMENTS, MAX_MEMORY_TOKENS, MAX_ROLLS, check_limits
from armt.checkpoint.problems import Problems, shape_text
from armt.checkpoint.slots import BIASES, LAYER_FREE, all_slots
from armt.checkpoint.sources import open_weights
from armt.errors import CheckpointError

FORMAT = "armt-1"
WEIGHTS = "model.safetensors"
HINT = "Write the folder again with `armt convert`."

_WORDS = {
    "norm": ("layer", "rms"),
    "activation": ("gelu_tanh", "gelu_erf", "silu", "relu"),
    "rope_scaling": ("none", "linear", "llama3"),
    "dialect": ("paper", "modern", "inner", "rmt"),
}
_FLAGS = (
    "gated_mlp",
    "parallel_residual",
    "qk_norm",
    "scale_by_inverse_layer",
    "normalise_keys",
    "use_denom",
    "correction",
    "gating",
    "use_sink",
    "sliding_window",
    "wrap_positions",
)
_MAY_BE_ZERO = ("learned_positions", "rotary_dims", "d_mem")
_MOST = {"n_layers": MAX_LAYERS, "memory_tokens": MAX_MEMORY_TOKENS, "rolls": MAX_ROLLS}
_NUMBERS = (
    "norm_eps",
    "rope_theta",
    "rope_factor",
    "rope_low_freq",
    "rope_high_freq",
    "rope_original_length",
)
DECODER_FIELDS = (
    "vocab_size",
    "d_model",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "d_ff",
    "norm",
    "norm_eps",
    "activation",
    "gated_mlp",
    "parallel_residual",
    "qk_norm",
    "attention_scale",
    "scale_by_inverse_layer",
    "learned_positions",
    "rotary_dims",
    "rope_theta",
    "rope_scaling",
    "rope_factor",
    "rope_low_freq",
    "rope_high_freq",
    "rope_original_length",
)
MEMORY_FIELDS = (
    "dialect",
    "memory_tokens",
    "d_mem",
    "n_heads",
    "rolls",
    "normalise_keys",
    "use_denom",
    "correction",
    "gating",
    "use_sink",
    "sliding_window",
    "wrap_positions",
    "segment_size",
)


MEMORY_OVERRIDES = ("correction", "sliding_window", "segment_size")
OVERRIDES = (*MEMORY_OVERRIDES, "segment_alignment", "eos_token_id")
"""Keyword arguments that may change what an exported folder says."""


def tensor_name(slot: str, layer: int) -> str:
    """``layers.3.qkv``, or the slot alone for tensors outside the layers."""
    return slot if slot in LAYER_FREE else f"layers.{layer}.{slot}"


def _with_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    changed = {**config}
    if "segment_alignment" in overrides:
        changed["segment_alignment"] = overrides["segment_alignment"]
    if isinstance(config.get("memory"), Mapping):
        names = [name for name in MEMORY_OVERRIDES if name in overrides]
        changed["memory"] = {**config["memory"], **{name: overrides[name] for name in names}}
    return changed


def _section(
    config: Mapping[str, Any], name: str, names: tuple[str, ...], problems: Problems
) -> dict[str, Any]:
    values = config.get(name)
    if not isinstance(values, Mapping):
        problems.add(f"{name}: found {type(values).__name__}, expected a JSON object")
        return {}
    for unknown in sorted(set(values) - set(names)):
        problems.add(f"{name}.{unknown}: unknown setting")
    fields = Fields(name, values, {}, problems)
    return {field: _value(fields, field) for field in names}


def _value(fields: Fields, name: str) -> Any:
    if name in _WORDS:
        return fields.choice(name, {word: word for word in _WORDS[name]})
    if name in _FLAGS:
        return fields.flag(name)
    if name in _NUMBERS:
        return fields.number(name)
    if name == "attention_scale":
        return fields.number(name, or_zero=True)
    return fields.whole(name, least=int(name not in _MAY_BE_ZERO), most=_MOST.get(name, LARGEST))


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether config.json is of this format, in any version."""
    form = str(config.get("format", ""))
    return form == FORMAT or (form.startswith("armt-") and "decoder" in config)


def load_native(
    folder: Path, config: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Checkpoint:
    """The checkpoint in an exported folder."""
    where = folder / "config.json"
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{where}: format: found {config.get('format')!r}, expected {FORMAT!r}; this folder"
            " was written by another version of armt"
        )
    problems = Problems(str(where))
    config = _with_overrides(config, overrides)
    decoder = _section(config, "decoder", DECODER_FIELDS, problems)
    memory = _section(config, "memory", MEMORY_FIELDS, problems)
    fields = Fields("config", config, {"segment_alignment": "left"}, problems)
    alignment = fields.choice("segment_alignment", ALIGNMENTS)
    biases = config.get("biases")
    if not isinstance(biases, list) or any(name not in BIASES for name in biases):
        fields.problem("biases", f"expected a list with some of {', '.join(BIASES)}")
        biases = []
    head = fields.flag("head")
    problems.raise_if_any(HINT)
    if (memory["d_mem"] == 0) != (memory["dialect"] == "rmt"):
        problems.add(f"memory.d_mem: found {memory['d_mem']} in the dialect {memory['dialect']}")
    check_limits(decoder, memory, alignment, problems)
    problems.raise_if_any(HINT)

    weights = folder / WEIGHTS
    problems = Problems(str(weights))
    stored = {tensor.name: tensor for tensor in open_weights(weights)}
    plans = []
    for slot in all_slots(decoder, memory, biases=biases, head=head):
        tensor = stored.pop(tensor_name(slot.slot, slot.layer), None)
        if tensor is None:
            name = tensor_name(slot.slot, slot.layer)
            problems.add(f"missing: {name}, expected {shape_text(slot.shape)}")
        elif check_stored(tensor, slot.shape, problems):
            plans.append(plan_of(slot, [tensor]))
    for tensor in stored.values():
        problems.add(f"extra: {tensor.name}, found {tensor.dtype} {shape_text(tensor.shape)}")
    problems.raise_if_any(HINT)
    generation = config.get("generation")
    if not isinstance(generation, Mapping):
        generation = {}
    token_ids = {"eos_token_id": generation.get("eos_token_ids", []), **token_ids_of(generation)}
    tokenizer = folder / "tokenizer.json"
    return Checkpoint(
        path=folder,
        folder=folder,
        origin="armt folder",
        decoder=decoder,
        memory=memory,
        segment_alignment=alignment,
        source_dtype=common_dtype(tuple(plans)),
        plans=tuple(plans),
        biases=tuple(name for name in BIASES if name in biases),
        generation=generation_of(token_ids, overrides, decoder["vocab_size"]),
        tokenizer=tokenizer if tokenizer.is_file() else None,
    )
