"""Checkpoint formats (docs/formats.md): files -> plain tensors -> Model.

A plain tensor dict has the names `memory`, `sink`, `maps.<layer>.W_mq.weight` and so on, and
`base.<usual name of the base model>`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .arrays import Array, as_float64
from .decoder import decoder_class
from .memory import MemoryMaps
from .model import Model, build_model
from .safetensors import read_safetensors
from .settings import read_settings

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# The leading dot matters: `c_attn.bias` is a weight.
OLD_BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".attention.rotary_emb.inv_freq",
)
Tensors = dict[str, Array]


def read_pickle(path: Path) -> Tensors:
    """A pickled state dict, plain or wrapped in {"model_state_dict": ...}."""
    import torch  # needed for this one format only

    found = torch.load(path, map_location="cpu", weights_only=True)
    found = found.get("model_state_dict", found)
    return {name: as_float64(tensor.to(torch.float64).numpy()) for name, tensor in found.items()}


def read_file(path: Path) -> Tensors:
    """One weight file, by its suffix."""
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def read_weights(path: Path) -> Tensors:
    """A weight file, or a folder with one file or with shards and their index."""
    if path.is_file():
        return read_file(path)
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return read_file(path / name)
        index = path / (name + ".index.json")
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            shards = {shard: read_file(path / shard) for shard in set(weight_map.values())}
            return {tensor: shards[shard][tensor] for tensor, shard in weight_map.items()}
    raise FileNotFoundError(f"{path}: no {' or '.join(WEIGHT_FILES)}, whole or in shards")


def lora_scale(alpha: float, r: int, *, use_rslora: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def _add_lora(weight: Array, a: Array, b: Array, *, scale: float, in_out: bool) -> Array:
    """W + scale B A; transposed where the base stores [in, out]."""
    delta = scale * (b @ a)
    return weight + (delta.T if in_out else delta)


def merge_inner_lora(
    tensors: Tensors, *, alpha: float, in_out: bool, adapter: str = "default"
) -> Tensors:
    """LoRA inside the checkpoint: X.base_layer.weight (or X.weight), X.lora_A/B.<adapter>."""
    merged = {}
    for name, tensor in tensors.items():
        if ".lora_" not in name:
            merged[name.replace(".base_layer.", ".")] = tensor
    for name, a in tensors.items():
        module, found, _ = name.partition(f".lora_A.{adapter}.weight")
        if found:
            b, weight = tensors[f"{module}.lora_B.{adapter}.weight"], module + ".weight"
            merged[weight] = _add_lora(
                merged[weight], a, b, scale=lora_scale(alpha, len(a)), in_out=in_out
            )
    return merged


def _pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """rank_pattern and alpha_pattern: keys are module names, or endings or expressions of them."""
    for key, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default


def merge_adapter_folder(tensors: Tensors, folder: Path, *, in_out: bool) -> Tensors:
    """A separate adapter folder around the whole model."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("use_dora"):
        raise ValueError(f"{folder}: use_dora is not supported")
    adapter = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in read_safetensors(folder / "adapter_model.safetensors").items()
    }
    merged = dict(tensors)
    for name, tensor in adapter.items():
        module, found, _ = name.partition(".lora_A.weight")
        if found:
            r = _pattern_value(config.get("rank_pattern") or {}, module, config["r"])
            if r != len(tensor):
                raise ValueError(f"{name}: found {len(tensor)} rows, adapter_config.json says {r}")
            alpha = _pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
            scale = lora_scale(alpha, r, use_rslora=config.get("use_rslora", False))
            b = adapter[f"{module}.lora_B.weight"]
            merged[module + ".weight"] = _add_lora(
                merged[module + ".weight"], tensor, b, scale=scale, in_out=in_out
            )
        elif ".lora_" not in name:
            if name not in merged:
                raise ValueError(f"{folder}: {name} replaces a tensor that the model lacks")
            merged[name] = tensor
    return merged


def plain_names(tensors: Tensors, *, prefix: str, layers_path: str) -> Tensors:
    """Official names -> plain names; copies, old buffers and foreign tensors are left out."""
    layer = re.compile(re.escape(layers_path) + r"\.(\d+)\.(layer\.)?(.*)")
    plain = {}
    for full, tensor in tensors.items():
        name = full.removeprefix(prefix)
        if not full.startswith(prefix) or name.endswith(OLD_BUFFERS):
            continue
        if name in ("memory", "sink"):
            plain[name] = tensor
        if not name.startswith("model."):
            continue
        name = name.removeprefix("model.").removeprefix("base_model.model.")
        found = layer.fullmatch(name)
        if found is None:
            plain["base." + name] = tensor
        elif found[3].startswith("W_m"):
            plain[f"maps.{found[1]}.{found[3]}"] = tensor
        else:
            plain[f"base.{layers_path}.{found[1]}.{found[3]}"] = tensor
    return plain


def _layer_maps(plain: Tensors, index: int) -> MemoryMaps:
    names = ("W_mq.weight", "W_mk.weight", "W_mv.weight", "W_mb.weight", "W_mb.bias")
    return MemoryMaps(*(plain[f"maps.{index}.{name}"] for name in names))


def model_from_tensors(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Model:
    """A model from official names; `config` has the form of the conformance folders."""
    base_model, armt, weights = config["base_model"], config["armt"], config["weights"]
    settings = read_settings(config["dialect"], armt)
    kind = decoder_class(base_model)
    merged = {name: as_float64(tensor) for name, tensor in tensors.items()}
    lora = weights.get("lora")
    if lora:
        merged = merge_inner_lora(
            merged,
            alpha=lora["lora_alpha"],
            in_out=base_model["model_type"] == "gpt2",
            adapter=lora.get("adapter_name", "default"),
        )
    plain = plain_names(merged, prefix=weights["cell_prefix"], layers_path=kind.layers_path)
    base = {n.removeprefix("base."): t for n, t in plain.items() if n.startswith("base.")}
    decoder = kind(base_model, base)
    layers = 0 if settings.rmt else decoder.n_layers
    maps = [_layer_maps(plain, index) for index in range(layers)]
    return build_model(settings=settings, decoder=decoder, tensors=plain, maps=maps)


def load_folder(folder: Path) -> Model:
    """A folder in the form of the conformance folders (config.json and the files it names)."""
    config = json.loads((folder / "config.json").read_text())
    weights = config["weights"]
    tensors = read_weights(folder / weights.get("file", weights.get("folder", "model.safetensors")))
    if "adapter_folder" in weights:
        in_out = config["base_model"]["model_type"] == "gpt2"
        tensors = merge_adapter_folder(tensors, folder / weights["adapter_folder"], in_out=in_out)
    return model_from_tensors(config, tensors)


def load_hf_folder(folder: Path, *, adapter: Path | None = None) -> Model:
    """A Hugging Face folder of the modern dialect."""
    config = json.loads((folder / "config.json").read_text())
    if not isinstance(config.get("base_model_config"), dict):
        raise ValueError(f"{folder}: config.json needs base_model_config as an object")
    inner = config.get("architectures") == ["InnerLoopARMTForCausalLM"]
    tensors = read_weights(folder)
    in_out = config["base_model_config"]["model_type"] == "gpt2"
    if adapter is not None:
        tensors = merge_adapter_folder(tensors, adapter, in_out=in_out)
    # The cell's prefix is what precedes the memory tokens in the file.
    (memory,) = [name for name in tensors if re.fullmatch(r"(.*\.)?memory", name)]
    return model_from_tensors(
        {
            "dialect": "modern-inner" if inner else "modern",
            "base_model": config["base_model_config"],
            "armt": config,
            "weights": {"cell_prefix": memory.removesuffix("memory")},
        },
        tensors,
    )
