"""Writing the checkpoint formats that are met in practice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reference.arrays import Array
from reference.random_models import RandomModel
from reference.safetensors import round_to, write_safetensors

ARCHITECTURES = {"modern": "ARMTForCausalLM", "modern-inner": "InnerLoopARMTForCausalLM"}


def hub_config(spec: RandomModel, **changes: Any) -> dict[str, Any]:
    """config.json of a Hugging Face folder."""
    armt = {name: value for name, value in spec.config["armt"].items() if name != "nu"}
    return {
        "model_type": "armt",
        "architectures": [ARCHITECTURES[spec.config["dialect"]]],
        "auto_map": {"AutoModelForCausalLM": "modeling_armt.ARMTForCausalLM"},
        "base_model_config": spec.config["base_model"],
        "base_model_name": None,
        "attend_to_previous_input": False,
        "act_on": False,
        "freeze_mem": False,
        "torch_dtype": "float32",
        **armt,
        **changes,
    }


def save_hub(folder: Path, spec: RandomModel, *, shards: int = 1, **changes: Any) -> Path:
    """A Hugging Face folder with one weight file or several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hub_config(spec, **changes)))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", spec.weights, dtype=spec.dtype)
        return folder
    names = sorted(spec.weights)
    weight_map: dict[str, str] = {}
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        part = {name: spec.weights[name] for name in names[k::shards]}
        write_safetensors(folder / file, part, dtype=spec.dtype)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def modules(spec: RandomModel, *endings: str) -> list[str]:
    """Full names of the modules whose matrices end like this."""
    names = [name.removesuffix(".weight") for name in spec.weights if name.endswith(".weight")]
    return [name for name in names if name.endswith(endings)]


def lora_pair(spec: RandomModel, module: str, r: int, *, seed: int = 0) -> tuple[Array, Array]:
    """A [r, in] and B [out, r] for one module."""
    rng = np.random.default_rng(seed)
    rows, columns = lora_orientation(spec, spec.weights[module + ".weight"]).shape
    a, b = rng.normal(size=(r, columns)), rng.normal(size=(rows, r))
    return round_to(a, "F32"), round_to(b, "F32")


def lora_orientation(spec: RandomModel, matrix: Array) -> Array:
    """[out, in], whichever way the base model stores the matrix; its own inverse."""
    return matrix.T if spec.config["base_model"]["model_type"] == "gpt2" else matrix


def save_adapter(
    folder: Path, tensors: Mapping[str, Array], *, dtype: str = "F32", **config: Any
) -> Path:
    """A separate adapter folder; names without the adapter's own prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "use_dora": False, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    named = {"base_model.model." + name: tensor for name, tensor in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", named, dtype=dtype)
    return folder
