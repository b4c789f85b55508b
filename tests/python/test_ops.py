"""Reads and writes of the memory on the CPU against float64, and their promise of equal bits.

Letters: R rows, D width, d width of a memory key, h memory heads, F features per head, E = D / h,
m memory tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pytest

from armt._core import testing
from conformance import FeatureMapCase, UnitStep
from ops import Floats, assert_same_bits, each_isa, normal
from reference.arrays import as_float64
from reference.features import feature_map
from reference.memory import LayerMemory, MemoryMaps, MemoryRule, read, write
from tolerances import assert_close, tolerance

Memory: TypeAlias = tuple[Floats, Floats | None]  # A [h, F, E], z [h, F]

MAPS = ("mem_query", "mem_key", "mem_value", "mem_gate", "mem_gate_bias")


@dataclass(frozen=True)
class Shape:
    """One layer's memory: sizes and switches."""

    D: int = 24
    d: int = 8
    h: int = 1
    m: int = 5
    rolls: int = 3
    dialect: str = "paper"
    normalise: bool = False
    use_denom: bool = True
    correction: bool = True
    gating: bool = False

    @property
    def gate_rows(self) -> int:
        return self.D if self.gating else self.h

    def rule(self) -> MemoryRule:
        epsilon = 1e-5 if self.dialect == "paper" else 0.0
        return MemoryRule(
            self.h, self.rolls, self.normalise, self.use_denom, self.correction, epsilon
        )

    def operations(self, *, threads: int = 1, isa: str = "") -> Any:
        decoder = {"d_model": self.D, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 4}
        memory = {
            "dialect": self.dialect,
            "memory_tokens": self.m,
            "d_mem": self.d,
            "n_heads": self.h,
            "rolls": self.rolls,
            "normalise_keys": self.normalise,
            "use_denom": self.use_denom,
            "correction": self.correction,
            "gating": self.gating,
        }
        return testing.Operations(decoder, memory, threads=threads, isa=isa)

    def weights(self, rng: np.random.Generator) -> dict[str, Floats]:
        scale = self.D**-0.5
        shapes = [(self.d, self.D), (self.d, self.D), (self.D, self.D), (self.gate_rows, self.D)]
        arrays = [normal(rng, *shape, scale=scale) for shape in shapes]
        return dict(zip(MAPS, [*arrays, normal(rng, self.gate_rows)], strict=True))


MODERN = Shape(dialect="modern", normalise=True)
SHAPES = [
    Shape(),
    Shape(correction=False),
    Shape(D=15, d=7, m=1),
    Shape(D=129, d=33, m=17),
    Shape(D=10, d=1, m=3, rolls=5),
    Shape(D=12, d=2, m=3, rolls=1),
    Shape(D=128, d=64, m=4),
    MODERN,
    replace(MODERN, D=30, d=9, h=3, m=6),
    replace(MODERN, D=72, d=8, h=8, m=2, rolls=4),
    replace(MODERN, D=40, d=10, h=2, gating=True),
    replace(MODERN, D=34, d=6, h=2, m=3, use_denom=False),
    replace(MODERN, D=34, d=6, h=2, gating=True, correction=False),
    Shape(D=20, d=6, dialect="modern"),
    replace(MODERN, D=512, d=16, h=4, m=9, use_denom=False, gating=True),
]


def shape_name(shape: Shape) -> str:
    return f"D{shape.D}_d{shape.d}_h{shape.h}_{shape.dialect}"


@pytest.fixture(params=SHAPES, ids=shape_name)
def shape(request: pytest.FixtureRequest) -> Shape:
    found: Shape = request.param
    return found


def load(operations: Any, weights: dict[str, Floats]) -> MemoryMaps:
    """Gives the weights to the backend and, in float64, to the reference."""
    for name, values in weights.items():
        operations.load(name, 0, values)
    return MemoryMaps(*(as_float64(weights[name]) for name in MAPS))


def as_reference(shape: Shape, memory: Memory | None) -> LayerMemory:
    if memory is None:
        features = 2 * shape.rolls * shape.d // shape.h
        empty = np.zeros((1, shape.h, features, shape.D // shape.h))
        return LayerMemory(empty, empty[..., 0] if shape.use_denom else None)
    A, z = memory
    return LayerMemory(as_float64(A)[None], None if z is None else as_float64(z)[None], True)


def special_rows(rng: np.random.Generator, rows: int, width: int) -> Floats:
    """Random rows; among them a zero one, a repeated one, a large and a small one."""
    x = normal(rng, rows, width)
    for row, factor in ((0, 0.0), (2, 20.0), (3, 0.01)):
        if row < rows:
            x[row] *= factor
    if rows > 4:
        x[4] = x[1]
    return x


def written(operations: Any, shape: Shape, rng: np.random.Generator, writes: int) -> Memory | None:
    """The memory after some writes of random rows."""
    memory: Memory | None = None
    for _ in range(writes):
        y = normal(rng, shape.m, shape.D)
        A, z, _ = operations.memory_write(y, [memory], [shape.m], [shape.m])[0]
        memory = (A, z)
    return memory


@each_isa
def test_feature_map_vectors(feature_map_case: FeatureMapCase, isa: str) -> None:
    case = feature_map_case
    found = Shape().operations(isa=isa).feature_map(case.x.astype(np.float32), case.nu)
    assert_close("phi", found, case.y, tolerance("feature_map", "float32"))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 64])
@pytest.mark.parametrize("rolls", [1, 3, 7])
def test_feature_map(n: int, rolls: int) -> None:
    x = special_rows(np.random.default_rng(n), 6, n)
    found = Shape().operations().feature_map(x, rolls)
    expected = feature_map(as_float64(x), rolls=rolls)
    assert_close("phi", found, expected, tolerance("feature_map", "float32"))
    assert_same_bits("the zero row", found[0], np.zeros(2 * rolls * n, np.float32))


def test_feature_map_keeps_nan() -> None:
    x = np.ones((1, 4), np.float32)
    x[0, 2] = np.nan
    assert np.isnan(Shape().operations().feature_map(x, 3)).any()


@each_isa
def test_unit_step(unit_step: UnitStep, isa: str) -> None:
    """The published code's writes and reads, each from the state before."""
    settings, arrays = unit_step.settings, unit_step.arrays
    modern = settings["dialect"] != "paper"
    shape = Shape(
        D=settings["d_model"],
        d=settings["d_mem"],
        h=settings.get("n_heads", 1),
        m=settings["num_mem_tokens"],
        rolls=settings["nu"],
        dialect="modern" if modern else "paper",
        normalise=modern,
        use_denom=settings.get("use_denom", True),
        correction=settings.get("correction", True),
        gating=settings.get("gating", False),
    )
    operations = shape.operations(isa=isa)
    names = ("W_mq", "W_mk", "W_mv", "W_mb", "W_mb_bias")
    load(operations, {map_: arrays[name] for map_, name in zip(MAPS, names, strict=True)})
    batch = len(arrays["hidden"])
    memories: list[Memory | None] = [None] * batch
    for s in range(unit_step.writes):
        y = arrays[f"write{s}_tokens"].astype(np.float32)
        counts = [y.shape[1]] * batch
        steps = operations.memory_write(y.reshape(-1, shape.D), memories, counts, counts)
        memories = [(A, z) for A, z, _ in steps]
        rows = arrays["hidden"].astype(np.float32)
        after = operations.memory_read(rows.reshape(-1, shape.D), memories, [rows.shape[1]] * batch)
        found: dict[str, Any] = {
            f"write{s}_A": np.stack([A for A, _, _ in steps]),
            f"write{s}_z": np.stack([z for _, z, _ in steps]) if shape.use_denom else None,
            f"read{s}": after - rows.reshape(-1, shape.D),
        }
        for name, array in found.items():
            expected = unit_step.expected(name)
            assert (array is None) == (expected is None), name
            if array is not None and expected is not None:
                limit = tolerance("memory_read" if "read" in name else "memory_write", "float32")
                assert_close(name, array.reshape(expected.shape), expected, limit)


@each_isa
def test_memory_against_reference(shape: Shape, isa: str) -> None:
    """Three writes, each followed by a read; the first one meets memory filled with NaN."""
    rng = np.random.default_rng(1)
    operations, rule = shape.operations(isa=isa), shape.rule()
    maps = load(operations, shape.weights(rng))
    memory: Memory | None = None
    for s in range(3):
        y = special_rows(rng, shape.m, shape.D)
        before = as_reference(shape, memory)
        after, trace = write(rule, maps, before, as_float64(y)[None])
        A, z, stats = operations.memory_write(y, [memory], [shape.m], [shape.m])[0]
        assert_close(f"A after write {s}", A, after.A[0], tolerance("memory_write", "float32"))
        if after.z is not None:
            assert_close(f"z after write {s}", z, after.z[0], tolerance("memory_write", "float32"))
        gamma = np.ones(1) if trace.gamma is None else trace.gamma
        expected_stats = np.array([gamma.mean(), gamma.min(), gamma.max(), trace.beta.mean()])
        assert_close("statistics", stats, expected_stats, tolerance("memory_write", "float32"))
        memory = (A, z)

        x = special_rows(rng, 23, shape.D)
        found = operations.memory_read(x, [memory], [len(x)]) - x
        expected = read(rule, maps, as_reference(shape, memory), as_float64(x)[None])[0]
        # The sum with x rounds to the size of x.
        limit = tolerance("memory_read", "float32")
        largest = np.abs(np.concatenate([x, expected.astype(np.float32)], axis=1)).max(axis=1)
        worst = np.abs(found - expected).max(axis=1)
        assert (worst <= limit.relative * np.maximum(largest, 1e-30)).all(), f"read {s}: {worst}"


def test_rows_that_do_not_write(shape: Shape) -> None:
    """Only the last rows of a cell are written."""
    rng = np.random.default_rng(2)
    operations = shape.operations()
    load(operations, shape.weights(rng))
    y = normal(rng, shape.m + 7, shape.D)
    whole = operations.memory_write(y, [None], [len(y)], [shape.m])[0]
    alone = operations.memory_write(y[7:], [None], [shape.m], [shape.m])[0]
    for name, found, expected in zip(("A", "z", "statistics"), whole, alone, strict=True):
        assert_same_bits(name, found, expected)


def test_zero_keys(shape: Shape) -> None:
    """No NaN: gamma of a zero key is the general formula's, and z does not move."""
    rng = np.random.default_rng(3)
    operations = shape.operations()
    load(operations, shape.weights(rng))
    memory = written(operations, shape, rng, 2)
    assert memory is not None
    A, z, stats = operations.memory_write(
        np.zeros((shape.m, shape.D), np.float32), [memory], [shape.m], [shape.m]
    )[0]
    assert_same_bits("A", A, memory[0])
    assert_same_bits("z", z, memory[1])
    clipped = shape.use_denom and shape.correction
    assert stats[0] == stats[1] == stats[2] == (0.0 if clipped else 1.0)


@pytest.mark.parametrize("factor", [1e-12, 1e-3, 1e3, 1e8])
@pytest.mark.parametrize("dialect", ["paper", "modern"])
def test_sizes_of_rows(factor: float, dialect: str) -> None:
    """Very small and very large rows, which square in the feature map."""
    rng = np.random.default_rng(4)
    shape = Shape(dialect=dialect, normalise=dialect == "modern")
    operations = shape.operations()
    maps = load(operations, shape.weights(rng))
    memory = written(operations, shape, rng, 1)
    x = factor * normal(rng, 6, shape.D)
    found = operations.memory_read(x, [memory], [len(x)])
    expected = x + read(shape.rule(), maps, as_reference(shape, memory), as_float64(x)[None])[0]
    assert_close("read", found, expected, tolerance("memory_read", "float32"))
    A, z, _ = operations.memory_write(x, [memory], [len(x)], [len(x)])[0]
    after, _ = write(shape.rule(), maps, as_reference(shape, memory), as_float64(x)[None])
    assert after.z is not None
    assert_close("A", A, after.A[0], tolerance("memory_write", "float32"))
    assert_close("z", z, after.z[0], tolerance("memory_write", "float32"))


def test_write_in_place(shape: Shape) -> None:
    rng = np.random.default_rng(5)
    operations = shape.operations()
    load(operations, shape.weights(rng))
    memory = written(operations, shape, rng, 1)
    y = normal(rng, shape.m, shape.D)
    beside, inside = (
        operations.memory_write(y, [memory], [shape.m], [shape.m], in_place=in_place)[0]
        for in_place in (False, True)
    )
    for name, found, expected in zip(("A", "z", "statistics"), inside, beside, strict=True):
        assert_same_bits(name, found, expected)


def test_reading_zeros_adds_nothing(shape: Shape) -> None:
    rng = np.random.default_rng(6)
    operations = shape.operations()
    load(operations, shape.weights(rng))
    empty = as_reference(shape, None)
    z = None if empty.z is None else empty.z[0].astype(np.float32)
    x = normal(rng, 9, shape.D)
    for memory in (None, (empty.A[0].astype(np.float32), z)):
        assert_same_bits("rows", operations.memory_read(x, [memory], [9]), x)


@each_isa
def test_memory_rows_do_not_mix(shape: Shape, isa: str) -> None:
    """One by one, in batches, with several cells and with two threads: the same bits."""
    rng = np.random.default_rng(7)
    operations, pair = (shape.operations(threads=threads, isa=isa) for threads in (1, 2))
    weights = shape.weights(rng)
    for each in (operations, pair):
        load(each, weights)
    memories = [written(operations, shape, rng, 1), None, written(operations, shape, rng, 2)]
    counts = [150, 3, 41]
    x = special_rows(rng, sum(counts), shape.D)
    together = operations.memory_read(x, memories, counts)
    assert_same_bits("threads", pair.memory_read(x, memories, counts), together)
    row = 0
    for memory, count in zip(memories, counts, strict=True):
        own = x[row : row + count]
        alone = [operations.memory_read(own[i : i + 1], [memory], [1]) for i in range(count)]
        assert_same_bits("one by one", np.concatenate(alone), together[row : row + count])
        row += count
    tokens = [shape.m] * 3
    y = special_rows(rng, 3 * shape.m, shape.D)
    steps = operations.memory_write(y, memories, tokens, tokens)
    for other in (
        pair.memory_write(y, memories, tokens, tokens),
        [
            operations.memory_write(part, [memory], [shape.m], [shape.m])[0]
            for part, memory in zip(np.split(y, 3), memories, strict=True)
        ],
    ):
        for found, expected in zip(other, steps, strict=True):
            for name, a, b in zip(("A", "z", "statistics"), found, expected, strict=True):
                assert_same_bits(name, a, b)
