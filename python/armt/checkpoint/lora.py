"""LoRA: W + scale B A, merged in float32 when a tensor is read.

A [r, in], B [out, r]; scale = alpha / r, or alpha / sqrt(r) with use_rslora. Where the base model
stores [in, out], the transposed product is added.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from armt.checkpoint.arrays import FLOATS, Array, to_float32
from armt.checkpoint.fields import Fields
from armt.checkpoint.files import read_json
from armt.checkpoint.names import ADAPTED, Naming
from armt.checkpoint.problems import Problems, shape_text
from armt.checkpoint.sources import Stored, open_weights
from armt.errors import CheckpointError

Tensors = dict[str, Stored]
Scale = Callable[[str, int], float]
"""(plain name of the module, r) -> factor of B A."""


def merge(weight: Stored, a: Stored, b: Stored, scale: float, *, in_out: bool) -> Stored:
    """The adapted matrix."""

    def read() -> Array:
        delta = to_float32(b.read(), b.dtype) @ to_float32(a.read(), a.dtype)
        delta *= scale
        merged: Array = to_float32(weight.read(), weight.dtype) + (delta.T if in_out else delta)
        return merged

    return dataclasses.replace(weight, dtype="float32", read=read)


def scale_of(alpha: float, r: int, *, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    return alpha / (math.sqrt(r) if use_rslora else r)


class _Pairs:
    """The A and B matrices of each module, taken out of the other tensors."""

    def __init__(self) -> None:
        self.a: Tensors = {}
        self.b: Tensors = {}

    def add(self, module: str, kind: str, tensor: Stored) -> None:
        (self.a if kind == "A" else self.b)[module] = tensor

    def apply(self, tensors: Tensors, naming: Naming, scale: Scale, problems: Problems) -> bool:
        """Merges every pair into ``tensors``; whether there was one."""
        head = f"base.{naming.family.outer_modules['head']}"
        embedding = f"base.{naming.family.outer_modules['embedding']}.weight"
        for module in sorted(self.a.keys() | self.b.keys()):
            a, b, name = self.a.get(module), self.b.get(module), module + ".weight"
            # An adapted head that is tied is stored as the embedding only.
            weight = tensors.get(name) or (tensors.get(embedding) if module == head else None)
            if a is None or b is None:
                problems.add(f"missing: lora_{'B' if a else 'A'} of {(a or b).name}")  # type: ignore[union-attr]
            elif weight is None:
                problems.add(f"extra: {a.name} adapts a matrix that the model lacks")
            elif _fits(weight, a, b, in_out=naming.family.is_in_out(module), problems=problems):
                in_out = naming.family.is_in_out(module)
                factor = scale(module, a.shape[0])
                tensors[name] = merge(weight, a, b, factor, in_out=in_out)
        return bool(self.a or self.b)


def _fits(weight: Stored, a: Stored, b: Stored, *, in_out: bool, problems: Problems) -> bool:
    faults = len(problems)
    if len(weight.shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] < 1:
        problems.add(f"shape: {a.name}: found {shape_text(a.shape)}, expected LoRA of a matrix")
        return False
    out, columns = weight.shape[::-1] if in_out else weight.shape
    r = a.shape[0]
    for tensor, expected in ((a, (r, columns)), (b, (out, r))):
        if tensor.shape != expected:
            problems.add(
                f"shape: {tensor.name}: found {shape_text(tensor.shape)},"
                f" expected {shape_text(expected)}"
            )
    for tensor in (weight, a, b):
        if tensor.dtype not in FLOATS:
            problems.add(f"dtype: {tensor.name}: found {tensor.dtype}, expected floating point")
    return len(problems) == faults


def _other_kind(tensor: Stored) -> str:
    if "magnitude" in tensor.name:
        return f"{tensor.name}: DoRA is not supported; merge the adapter with its own library"
    return f"{tensor.name}: this kind of LoRA tensor is not supported; merge it beforehand"


def merge_inside(
    tensors: Tensors,
    naming: Naming,
    *,
    alpha: float | None,
    use_rslora: bool,
    problems: Problems,
) -> bool:
    """LoRA inside the checkpoint: X.lora_A.<adapter>.weight beside X.base_layer.weight.

    Older libraries leave the frozen weight its plain name. Returns whether there was any.
    """
    pairs, adapters = _Pairs(), set()
    for plain in [name for name in tensors if ".lora_" in name or ".base_layer." in name]:
        tensor = tensors.pop(plain)
        found = re.fullmatch(r"(.+)\.lora_([AB])\.([^.]+)\.weight", plain)
        if found is not None:
            pairs.add(found[1], found[2], tensor)
            adapters.add(found[3])
        elif ".lora_" in plain:
            problems.add(_other_kind(tensor))
        elif (usual := plain.replace(".base_layer.", ".")) in tensors:
            problems.add(f"stored twice: {tensors[usual].name} and {tensor.name}")
        else:
            tensors[usual] = tensor
    if len(adapters) > 1:
        problems.add(f"found the LoRA adapters {', '.join(sorted(adapters))}, expected one")
    if pairs.a and alpha is None:
        problems.add("lora_alpha: found nothing; the file holds LoRA matrices but not their scale")
    factor = 1.0 if alpha is None else alpha
    return pairs.apply(
        tensors, naming, lambda _, r: scale_of(factor, r, use_rslora=use_rslora), problems
    )


def merge_folder(tensors: Tensors, naming: Naming, folder: Path, problems: Problems) -> bool:
    """A separate adapter folder around the whole model. Returns whether matrices were merged."""
    config = read_json(folder / "adapter_config.json")
    where = str(folder / "adapter_config.json")
    fields = Fields(where, config, {"use_rslora": False, "bias": "none"}, problems)
    fields.refuse("use_dora", why="DoRA is not supported; merge the adapter with its own library")
    fields.refuse("lora_bias", why="biases of LoRA matrices are not supported")
    if config.get("peft_type", "LORA") != "LORA":
        fields.problem("peft_type", f"found {config['peft_type']!r}, expected LORA")
    pairs, replaced = _Pairs(), set()
    for tensor in open_weights(_adapter_weights(folder)):
        name = tensor.name.removeprefix(ADAPTED)
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if found is not None:
            plain = naming.plain(found[1] + ".weight")
            module = found[1] if plain is None else plain.removesuffix(".weight")
            pairs.add(module, found[2], tensor)
        elif ".lora_" in name:
            problems.add(_other_kind(tensor))
        else:
            _replace(tensors, naming, name, tensor, problems)
            replaced.add(name)
    _check_saved(config.get("modules_to_save"), replaced, fields)
    return pairs.apply(tensors, naming, _pattern_scale(fields, naming, problems), problems)


def _adapter_weights(folder: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: expected adapter_model.safetensors or adapter_model.bin")


def _replace(
    tensors: Tensors, naming: Naming, name: str, tensor: Stored, problems: Problems
) -> None:
    plain = naming.plain(name)
    if plain is None or plain not in tensors:
        problems.add(f"extra: {tensor.name} in {tensor.file} replaces nothing in the model")
    else:
        tensors[plain] = tensor


def _check_saved(modules: Any, replaced: set[str], fields: Fields) -> None:
    for module in modules if isinstance(modules, list) else []:
        if not any(f".{module}." in f".{name}." for name in replaced):
            fields.problem("modules_to_save", f"the adapter holds no tensor for {module!r}")


def _pattern_scale(fields: Fields, naming: Naming, problems: Problems) -> Scale:
    """Scale by module: rank_pattern and alpha_pattern override r and lora_alpha."""
    use_rslora = fields.flag("use_rslora")
    usual_r, usual_alpha = fields.whole("r"), fields.number("lora_alpha")
    ranks, alphas = _patterns(fields, "rank_pattern"), _patterns(fields, "alpha_pattern")

    def scale(module: str, r: int) -> float:
        full = naming.official(module)
        said = _choose(ranks, full)
        expected = said.whole("value") if said else usual_r
        if r != expected:
            problems.add(f"{full}: found LoRA of rank {r}, the adapter says {expected}")
        own = _choose(alphas, full)
        alpha = own.number("value") if own else usual_alpha
        return scale_of(alpha, r, use_rslora=use_rslora)

    return scale


def _patterns(fields: Fields, name: str) -> list[tuple[re.Pattern[str], Fields]]:
    """Keys are module names, endings of them, or expressions for either."""
    patterns = fields.raw(name) or {}
    if not isinstance(patterns, Mapping):
        fields.problem(name, "expected an object")
        return []
    compiled = []
    for key, value in patterns.items():
        # Repeated groups and many stars can take a regular expression forever.
        if len(key) > 400 or re.search(r"\)\s*[*+?{]", key) or len(re.findall(r"[*+{]", key)) > 3:
            fields.problem(name, f"the expression {key[:60]!r} is too complicated")
            continue
        try:
            expression = re.compile(rf"(?:.*\.)?(?:{key})")
        except (re.error, RecursionError, OverflowError):
            fields.problem(name, f"{key!r} is neither a module name nor an expression")
            continue
        compiled.append((expression, fields.nested(f"{name}.{key}", {"value": value})))
    return compiled


def _choose(patterns: list[tuple[re.Pattern[str], Fields]], module: str) -> Fields | None:
    return next((value for expression, value in patterns if expression.fullmatch(module)), None)
