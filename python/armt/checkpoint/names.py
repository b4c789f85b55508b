"""Official tensor names -> plain names.

Plain names are ``memory``, ``sink``, ``maps.<layer>.W_mq.weight`` (W_mk, W_mv, W_mb) and
``base.<the base model's usual name>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from armt.checkpoint.families import Family
from armt.checkpoint.problems import Problems
from armt.checkpoint.sources import Stored

ADAPTED = "base_model.model."
"""What a LoRA wrapper puts in front of the names of the model inside."""
CELLS = {"paper": "memory_cell.", "modern": "armt.memory_cell.", "inner": "", "rmt": "memory_cell."}


def find_prefix(names: Iterable[str], dialect: str) -> str:
    """What stands before ``memory`` and ``model.``; the dialect's usual prefix if nothing tells."""
    found = {n[: -len("memory")] for n in names if n == "memory" or n.endswith(".memory")}
    return found.pop() if len(found) == 1 else CELLS[dialect]


@dataclass(frozen=True)
class Naming:
    """How one checkpoint calls its tensors."""

    prefix: str
    family: Family
    wrapped_layers: bool
    """ARMT puts the base layer beside its maps as ``.layer.``; RMT leaves layers as they are."""

    def plain(self, name: str) -> str | None:
        """The plain name of an official one; None if it is none."""
        if not name.startswith(self.prefix):
            return None
        name = name[len(self.prefix) :]
        if name in ("memory", "sink"):
            return name
        if not name.startswith("model."):
            return None
        name = name.removeprefix("model.").removeprefix(ADAPTED)
        layers = self.family.layers_path + "."
        if not name.startswith(layers):
            return "base." + name
        return self._in_layer(name[len(layers) :])

    def _in_layer(self, name: str) -> str | None:
        found = re.fullmatch(r"(0|[1-9][0-9]{0,5})\.(.+)", name)
        if found is None:
            return None
        index, rest = found.groups()
        if self.wrapped_layers and rest.startswith(("W_mq.", "W_mk.", "W_mv.", "W_mb.")):
            return f"maps.{index}.{rest}"
        if self.wrapped_layers:
            if not rest.startswith("layer."):
                return None
            rest = rest.removeprefix("layer.")
        return f"base.{self.family.layers_path}.{index}.{rest}"

    def official(self, plain: str) -> str:
        """The official name of a tensor or module, given its plain one."""
        if plain in ("memory", "sink"):
            return self.prefix + plain
        layers = f"base.{self.family.layers_path}."
        path = f"{self.prefix}model.{self.family.layers_path}."
        if plain.startswith("maps."):
            return path + plain.removeprefix("maps.")
        if plain.startswith(layers) and self.wrapped_layers:
            index, _, inside = plain[len(layers) :].partition(".")
            return f"{path}{index}.layer.{inside}"
        return f"{self.prefix}model.{plain.removeprefix('base.')}"

    def copy_of(self, name: str) -> str | None:
        """The plain name of the tensor that ``<prefix>layers.<i>...`` is a second name of."""
        copies = self.prefix + "layers."
        return self._in_layer(name[len(copies) :]) if name.startswith(copies) else None

    def is_old_buffer(self, plain: str) -> bool:
        """Mask and rotary buffers of older libraries; ``c_attn.bias`` is none of them."""
        layers = f"base.{self.family.layers_path}."
        if not plain.startswith(layers):
            return False
        _, _, inside = plain[len(layers) :].partition(".")
        return inside in self.family.old_buffers


@dataclass
class Sorted:
    """The tensors of a checkpoint by plain name."""

    tensors: dict[str, Stored] = field(default_factory=dict)
    extra: list[Stored] = field(default_factory=list)
    """Tensors whose names say nothing."""


def sort_tensors(stored: Iterable[Stored], naming: Naming, problems: Problems) -> Sorted:
    """Second names and old buffers are left out; all others are in the result."""
    result, copies = Sorted(), []
    for tensor in stored:
        plain = naming.plain(tensor.name)
        copied = naming.copy_of(tensor.name)
        if copied is not None:
            copies.append((copied, tensor))
        elif plain is None:
            result.extra.append(tensor)
        elif naming.is_old_buffer(plain):
            continue
        elif plain in result.tensors:
            first = result.tensors[plain].name
            problems.add(f"stored twice: {first} and {tensor.name} are the same tensor")
        else:
            result.tensors[plain] = tensor
    for plain, tensor in copies:
        if plain not in result.tensors and not naming.is_old_buffer(plain):
            result.extra.append(tensor)
    return result
