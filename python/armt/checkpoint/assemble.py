"""Plain tensors -> the engine's slots; everything missing, extra or misshapen is listed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from armt.checkpoint.arrays import FLOATS, KEPT, Array, to_float32
from armt.checkpoint.checkpoint import TensorPlan
from armt.checkpoint.families import Family
from armt.checkpoint.names import Naming, Sorted
from armt.checkpoint.problems import Problems, shape_text
from armt.checkpoint.slots import Config, Slot
from armt.checkpoint.sources import Stored

MAPS = {"mem_query": "W_mq", "mem_key": "W_mk", "mem_value": "W_mv", "mem_gate": "W_mb"}
_COMPARED_BYTES = 16_000_000


def plain_parts(slot: Slot, family: Family, decoder: Config) -> list[tuple[str, tuple[int, ...]]]:
    """(plain name, shape as stored) of the tensors whose rows make a slot."""
    name, bias, _ = slot.slot.partition("_bias")
    kind = ".bias" if bias else ".weight"
    if name in ("memory", "sink"):
        return [(name, slot.shape)]
    if name in MAPS:
        return [(f"maps.{slot.layer}.{MAPS[name]}{kind}", slot.shape)]
    if name in family.outer_modules:
        return [(f"base.{family.outer_modules[name]}{kind}", slot.shape)]
    modules = family.layer_modules[name]
    paths = [f"base.{family.layers_path}.{slot.layer}.{module}{kind}" for module in modules]
    rows = _part_rows(name, len(modules), slot.shape[0], decoder)
    shapes = [(r, *slot.shape[1:]) for r in rows]
    if family.is_in_out(paths[0]):
        shapes = [shape[::-1] for shape in shapes]
    return list(zip(paths, shapes, strict=True))


def _part_rows(name: str, count: int, rows: int, decoder: Config) -> list[int]:
    if name == "qkv" and count == 3:
        keys = decoder["n_kv_heads"] * decoder["head_dim"]
        return [rows - 2 * keys, keys, keys]
    return [rows // count] * count


def make_plans(
    slots: Sequence[Slot], found: Sorted, naming: Naming, decoder: Config, problems: Problems
) -> tuple[TensorPlan, ...]:
    """Plans for all slots."""
    family, plans, used = naming.family, [], set()
    for slot in slots:
        parts, in_out = [], False
        for name, shape in plain_parts(slot, family, decoder):
            used.add(name)
            in_out = len(shape) == 2 and family.is_in_out(name)
            stored = found.tensors.get(name)
            if stored is None:
                problems.add(f"missing: {naming.official(name)}, expected {shape_text(shape)}")
            elif check_stored(stored, shape, problems):
                parts.append(stored)
        interleaved = family.interleaved and slot.slot in ("qkv", "qkv_bias")
        groups = decoder["n_heads"] if interleaved else 0
        plans.append(plan_of(slot, parts, in_out=in_out, groups=groups))
    unused = [stored for name, stored in found.tensors.items() if name not in used]
    for stored in [*unused, *found.extra]:
        problems.add(
            f"extra: {stored.name} in {stored.file}, found {stored.dtype}"
            f" {shape_text(stored.shape)}; the model has no such tensor"
        )
    return tuple(plans)


def check_stored(stored: Stored, shape: tuple[int, ...], problems: Problems) -> bool:
    """Whether a tensor has the shape and a floating-point type."""
    faults = len(problems)
    if stored.shape != shape:
        problems.add(
            f"shape: {stored.name} in {stored.file}, found {shape_text(stored.shape)},"
            f" expected {shape_text(shape)}"
        )
    if stored.dtype not in FLOATS:
        problems.add(
            f"dtype: {stored.name} in {stored.file}, found {stored.dtype},"
            f" expected {', '.join(FLOATS)}"
        )
    return len(problems) == faults


def plan_of(
    slot: Slot, parts: Sequence[Stored], *, in_out: bool = False, groups: int = 0
) -> TensorPlan:
    """How the stored parts become one tensor of the engine."""
    dtypes = {part.dtype for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    if len(slot.shape) == 1 or dtype not in KEPT:
        dtype = "float32"
    read = functools.partial(_read, tuple(parts), dtype, in_out, groups)
    return TensorPlan(slot.slot, slot.layer, slot.shape, dtype, read)


def _read(parts: tuple[Stored, ...], dtype: str, in_out: bool, groups: int) -> Array:
    arrays = [_as(part, dtype) for part in parts]
    if in_out:
        arrays = [array.T for array in arrays]
    array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return array if groups == 0 else separate(array, groups)


def _as(part: Stored, dtype: str) -> Array:
    array = part.read()
    return array if part.dtype == dtype else to_float32(array, part.dtype)


def separate(array: Array, heads: int) -> Array:
    """Rows in ``heads`` groups of (q, k, v) -> all queries, all keys, all values."""
    grouped = array.reshape(heads, 3, -1, *array.shape[1:])
    return np.ascontiguousarray(grouped.swapaxes(0, 1)).reshape(array.shape)


def identical(a: Stored, b: Stored) -> bool:
    """Whether two tensors hold the same bits; compared in pieces."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    x, y = a.read(), b.read()
    if x is y or len(a.shape) == 0:
        return True
    rows = max(1, _COMPARED_BYTES // max(1, x[:1].nbytes))
    bits = f"u{x.itemsize}"
    return all(
        np.array_equal(
            np.ascontiguousarray(x[i : i + rows]).view(bits),
            np.ascontiguousarray(y[i : i + rows]).view(bits),
        )
        for i in range(0, len(x), rows)
    )
