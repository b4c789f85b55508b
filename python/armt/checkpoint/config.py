"""What a configuration file and the caller say about a checkpoint, in one form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from armt.checkpoint.families import FAMILIES
from armt.checkpoint.files import read_json
from armt.checkpoint.memory_config import DIALECTS, HF_DEFAULTS
from armt.errors import CheckpointError, InvalidArgument

MEMORY_OVERRIDES = tuple(
    name for name in HF_DEFAULTS if name not in ("attend_to_previous_input", "act_on")
)
OVERRIDES = (
    "dialect",
    "base_model",
    *MEMORY_OVERRIDES,
    "cell_prefix",
    "lora_alpha",
    "use_rslora",
    "eos_token_id",
)
"""Keyword arguments of load_checkpoint that stand for facts which files may lack."""
TOKEN_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
GIVE = "Give what is missing beside the file in config.json or as keyword arguments"


@dataclass(frozen=True)
class Facts:
    """Configuration of a checkpoint under official names."""

    where: str
    dialect: str
    base_model: Mapping[str, Any]
    armt: Mapping[str, Any]
    bare: bool
    """Absent memory settings follow from shapes; otherwise they have the published defaults."""
    cell_prefix: str | None = None
    lora: Mapping[str, Any] = field(default_factory=dict)
    """lora_alpha, use_rslora: for LoRA inside the checkpoint."""
    token_ids: Mapping[str, Any] = field(default_factory=dict)


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """InvalidArgument for keyword arguments that do not exist."""
    unknown = [name for name in overrides if name not in OVERRIDES]
    if unknown:
        raise InvalidArgument(
            f"load_checkpoint: unknown arguments: {', '.join(unknown)};"
            f" expected some of {', '.join(OVERRIDES)}"
        )


def read_facts(config: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> Facts:
    """Facts from config.json (empty if there is none) with the caller's words on top."""
    if is_hugging_face(config):
        return _hugging_face(config, overrides, where)
    kind = config.get("model_type")
    if "dialect" not in config and isinstance(kind, str) and kind in FAMILIES:
        # The configuration of the base model alone lies beside a state dict.
        config = {"base_model": config}
    return _bare(config, overrides, where)


def is_hugging_face(config: Mapping[str, Any]) -> bool:
    """Whether config.json is an ARMTConfig."""
    return config.get("model_type") == "armt"


def _hugging_face(config: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> Facts:
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else ["ARMTForCausalLM"]
    dialects = {"ARMTForCausalLM": "modern", "InnerLoopARMTForCausalLM": "inner"}
    found = [dialects[name] for name in names if isinstance(name, str) and name in dialects]
    if "dialect" not in overrides and len(found) != 1:
        raise CheckpointError(
            f"{where}: architectures: found {names!r}, expected one of {', '.join(dialects)}"
        )
    base = _base_override(overrides)
    if base is None:
        base = config.get("base_model_config")
    if not isinstance(base, Mapping):
        name = config.get("base_model_name") or base
        raise CheckpointError(
            f"{where}: the base model is given by its name only ({name!r}), and nothing is"
            " downloaded; expected base_model_config as an object, or pass base_model= with the"
            " base model's configuration (a dict, or the path of its config.json)"
        )
    settings = {name: config[name] for name in HF_DEFAULTS if name in config}
    settings.pop("nu", None)  # not a field of ARMTConfig
    return Facts(
        where=where,
        dialect=_dialect(overrides.get("dialect", found[0] if found else None), where),
        base_model=base,
        armt=settings | _memory_overrides(overrides),
        bare=False,
        cell_prefix=_prefix(overrides.get("cell_prefix"), where),
        lora=_lora({}, overrides),
        token_ids={**token_ids_of(base), **token_ids_of(config)},
    )


def _bare(config: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> Facts:
    base = _base_override(overrides)
    if base is None:
        base = _section(config, "base_model", where)
    dialect = overrides.get("dialect", config.get("dialect"))
    weights = _section(config, "weights", where) or {}
    missing = [
        name for name, value in (("dialect", dialect), ("base_model", base)) if value is None
    ]
    if base is None or missing:
        raise CheckpointError(
            f"{where}: found no {' and no '.join(missing)}; a state dict does not tell them."
            f" {GIVE} (dialect='paper', 'modern', 'inner' or 'rmt'; base_model={{...}};"
            " segment_size=...)"
        )
    settings = _section(config, "armt", where) or {}
    return Facts(
        where=where,
        dialect=_dialect(dialect, where),
        base_model=base,
        armt={**settings, **_memory_overrides(overrides)},
        bare=True,
        cell_prefix=_prefix(overrides.get("cell_prefix", weights.get("cell_prefix")), where),
        lora=_lora(_section(weights, "lora", where) or {}, overrides),
        token_ids={**token_ids_of(base), **token_ids_of(config)},
    )


def _section(config: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any] | None:
    value = config.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(
            f"{where}: {name}: found {type(value).__name__}, expected a JSON object"
        )
    return value


def _prefix(value: Any, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{where}: cell_prefix: found {type(value).__name__}, expected text")
    return value


def _dialect(value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in DIALECTS:
        raise CheckpointError(
            f"{where}: dialect: found {value!r}, expected one of {', '.join(DIALECTS)}"
        )
    return DIALECTS[value]


def _memory_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {name: overrides[name] for name in MEMORY_OVERRIDES if name in overrides}


def _lora(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    names = ("lora_alpha", "use_rslora")
    return {n: overrides.get(n, config.get(n)) for n in names if n in overrides or n in config}


def token_ids_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The special token ids that a configuration names, unchecked."""
    return {name: config[name] for name in TOKEN_IDS if config.get(name) is not None}


def _base_override(overrides: Mapping[str, Any]) -> Mapping[str, Any] | None:
    base = overrides.get("base_model")
    if base is None or isinstance(base, Mapping):
        return base
    if isinstance(base, (str, os.PathLike)):
        path = Path(base)
        return read_json(path / "config.json" if path.is_dir() else path)
    raise InvalidArgument(
        f"base_model: found {type(base).__name__}, expected a dict or the path of a config.json"
    )


def generation_of(
    token_ids: Mapping[str, Any], overrides: Mapping[str, Any], vocab_size: int
) -> dict[str, Any]:
    """eos_token_ids, bos_token_id, pad_token_id; ids outside the vocabulary never occur."""

    def valid(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size

    ids = {**token_ids, **token_ids_of(overrides)}
    eos = ids.pop("eos_token_id", [])
    listed = eos if isinstance(eos, (list, tuple)) else [eos]
    result: dict[str, Any] = {"eos_token_ids": [value for value in listed if valid(value)]}
    return result | {name: value for name, value in ids.items() if valid(value)}
