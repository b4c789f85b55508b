"""Single operations of the CPU backend against float64, and their promise of bit-equal rows.

Letters: R rows, C cached rows, D width, d width of a memory key, h memory heads, F features per
head, E = D / h, m memory tokens, H query heads, G key/value heads, c width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
from conformance import FeatureMapCase, UnitStep
from reference.arrays import Array, as_float64, merge_heads, split_heads
from reference.decoder import rms_norm, rotary_frequencies, rotate
from reference.features import feature_map
from reference.memory import LayerMemory, MemoryMaps, MemoryRule, read, write
from tolerances import assert_close, tolerance

from armt._core import testing

Floats: TypeAlias = npt.NDArray[np.float32]
Memory: TypeAlias = tuple[Floats, Floats | None]  # A [h, F, E], z [h, F]

MAPS = ("mem_query", "mem_key", "mem_value", "mem_gate", "mem_gate_bias")


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Floats:
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def assert_same_bits(what: str, found: Floats | None, expected: Floats | None) -> None:
    """memcmp, so that a NaN or the sign of a zero counts."""
    if found is None or expected is None:
        assert found is expected, what
        return
    assert found.shape == expected.shape, what
    differ = found.view(np.uint32) != expected.view(np.uint32)
    assert not differ.any(), f"{what}: {differ.sum()} of {differ.size} elements differ"


@pytest.fixture(params=testing.available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- the associative memory


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


MODERN = {"dialect": "modern", "normalise": True}
SHAPES = [
    Shape(),
    Shape(correction=False),
    Shape(D=15, d=7, m=1),
    Shape(D=129, d=33, m=17),
    Shape(D=10, d=1, m=3, rolls=5),
    Shape(D=12, d=2, m=3, rolls=1),
    Shape(D=128, d=64, m=4),
    Shape(**MODERN),
    Shape(D=30, d=9, h=3, m=6, **MODERN),
    Shape(D=72, d=8, h=8, m=2, rolls=4, **MODERN),
    Shape(D=40, d=10, h=2, gating=True, **MODERN),
    Shape(D=34, d=6, h=2, m=3, use_denom=False, **MODERN),
    Shape(D=34, d=6, h=2, gating=True, correction=False, **MODERN),
    Shape(D=20, d=6, dialect="modern"),
    Shape(D=512, d=16, h=4, m=9, use_denom=False, gating=True, **MODERN),
]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"D{shape.D}_d{shape.d}_h{shape.h}_{shape.dialect}")
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
        after = operations.memory_read(
            rows.reshape(-1, shape.D), memories, [rows.shape[1]] * batch
        )
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


# ---- rotary positions


def decoder_of(H: int, G: int, c: int, **more: Any) -> dict[str, Any]:
    return {"d_model": H * c, "n_layers": 4, "n_heads": H, "n_kv_heads": G, "head_dim": c, **more}


def scaling_of(decoder: dict[str, Any]) -> dict[str, Any]:
    return {
        "rope_type": decoder.get("rope_scaling", "default"),
        "factor": decoder.get("rope_factor"),
        "low_freq_factor": decoder.get("rope_low_freq", 1.0),
        "high_freq_factor": decoder.get("rope_high_freq", 4.0),
        "original_max_position_embeddings": decoder.get("rope_original_length", 8192.0),
    }


ROTARY = [
    {"rotary_dims": 16},
    {"rotary_dims": 6, "rope_theta": 500.0},
    {"rotary_dims": 14, "rope_scaling": "linear", "rope_factor": 3.0},
    {
        "rotary_dims": 16,
        "rope_theta": 500000.0,
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_original_length": 512.0,
    },
    {"rotary_dims": 16, "qk_norm": True, "norm_eps": 1e-3},
    {"qk_norm": True},
]


@pytest.mark.parametrize("more", ROTARY, ids=lambda more: "_".join(map(str, more.values())))
def test_rotation(more: dict[str, Any], isa: str) -> None:
    """Queries in place, keys on their way to the cache; values and the rest of a row stay."""
    rng = np.random.default_rng(8)
    H, G, c = 6, 2, 18
    decoder = decoder_of(H, G, c, **more)
    operations = testing.Operations(decoder, {"segment_size": 100}, isa=isa)
    norms = {name: 1 + normal(rng, c, scale=0.3) for name in ("q_norm", "k_norm")}
    if more.get("qk_norm"):
        for name, values in norms.items():
            operations.load(name, 1, values)
    positions = np.array([0, 1, 17, 999, 4321, 12, 70000], np.int64)
    qkv = normal(rng, len(positions), (H + 2 * G) * c)
    cache = testing.Cache()
    operations.store_kv([cache], [len(qkv)], qkv, positions, layer=1)
    keys, values = operations.export_kv(cache)
    rotated = operations.rotate_queries(qkv, positions, layer=1)

    frequencies = np.zeros(0)
    if "rotary_dims" in more:
        frequencies = rotary_frequencies(
            more["rotary_dims"], theta=more.get("rope_theta", 1e4), scaling=scaling_of(decoder)
        )
    frequencies = as_float64(frequencies.astype(np.float32))

    def turned(part: Floats, heads: int, norm: str) -> Array:
        x = split_heads(as_float64(part)[None], heads)
        if more.get("qk_norm"):
            x = rms_norm(x, as_float64(norms[norm]), more.get("norm_eps", 1e-5))
        return merge_heads(rotate(x, positions[None], frequencies))[0]

    limit = tolerance("rotate", "float32")
    split = H * c
    assert_close("queries", rotated[:, :split], turned(qkv[:, :split], H, "q_norm"), limit)
    assert_same_bits("the rest of a row", rotated[:, split:], qkv[:, split:])
    expected = turned(qkv[:, split : split + G * c], G, "k_norm").reshape(keys.shape)
    assert_close("keys", keys, expected, limit)
    assert_same_bits("values", values, qkv[:, split + G * c :].reshape(values.shape))


def test_positions_beyond_the_table() -> None:
    """A short segment's table ends before 9000, a long segment's holds it: the same bits."""
    rng = np.random.default_rng(9)
    decoder = decoder_of(2, 1, 8, rotary_dims=8)
    qkv = normal(rng, 3, 32)
    positions = np.array([8999, 9000, 9001], np.int64)
    short, long = (
        testing.Operations(decoder, {"segment_size": size}).rotate_queries(qkv, positions)
        for size in (10, 9000)
    )
    assert_same_bits("queries", short, long)


# ---- attention


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads and their width; a sink in front of each segment or not."""

    H: int = 4
    G: int = 2
    c: int = 16
    sink: bool = False
    more: tuple[tuple[str, Any], ...] = ()

    def operations(self, *, threads: int = 1, isa: str = "") -> Any:
        decoder = decoder_of(self.H, self.G, self.c, **dict(self.more))
        memory = {"dialect": "modern", "memory_tokens": 2, "use_sink": self.sink}
        return testing.Operations(decoder, memory, threads=threads, isa=isa)

    @property
    def width(self) -> int:
        return (self.H + 2 * self.G) * self.c


HEADS = [
    Heads(),
    Heads(H=1, G=1, c=4),
    Heads(H=3, G=3, c=7),
    Heads(H=8, G=1, c=33),
    Heads(H=2, G=2, c=64, more=(("attention_scale", 0.3), ("scale_by_inverse_layer", True))),
    Heads(H=10, G=2, c=80, sink=True),
    Heads(H=60, G=1, c=24),
    Heads(H=2, G=1, c=256),
]


@pytest.fixture(params=HEADS, ids=lambda heads: f"{heads.H}_{heads.G}_{heads.c}")
def heads(request: pytest.FixtureRequest) -> Heads:
    found: Heads = request.param
    return found


@dataclass
class Scene:
    """A stream with a previous segment (P rows) and R rows of the current one, and who sees whom."""

    previous: Floats  # [P, width]
    qkv: Floats  # [R, width]
    sights: npt.NDArray[np.int64]  # [R, 6], see testing.cpp
    visible: npt.NDArray[np.uint8] | None = None  # [R]
    prev_visible: npt.NDArray[np.uint8] | None = None  # [P]

    def cache(self, operations: Any, rows: int | None = None) -> Any:
        """The stream's caches; `rows` of the current segment are stored."""
        cache = testing.Cache()
        # Two rows more than stay visible: their places in the page must not matter.
        behind = np.full((2, self.previous.shape[1]), np.nan, np.float32)
        self.store(operations, cache, np.concatenate([self.previous, behind]))
        cache.roll(len(self.previous))
        self.store(operations, cache, self.qkv[:rows])
        return cache

    @staticmethod
    def store(operations: Any, cache: Any, rows: Floats) -> None:
        operations.store_kv([cache], [len(rows)], rows, np.zeros(len(rows), np.int64))

    def attend(self, operations: Any, begin: int = 0, end: int | None = None, **more: Any) -> Any:
        """Rows begin .. end-1 with everything stored."""
        rows = slice(begin, end)
        return operations.attend(
            [self.cache(operations)],
            [len(self.qkv[rows])],
            self.qkv[rows],
            self.sights[rows],
            [self.visible],
            [self.prev_visible],
            **more,
        )


def random_scene(rng: np.random.Generator, heads: Heads, P: int, R: int, *, padded: bool) -> Scene:
    """Mostly causal rows; some see nothing, everything, a window, or are uniform."""
    sights = np.zeros((R, 6), np.int64)
    sights[:, 0] = rng.integers(0, P + 3, R)
    sights[:, 2] = np.arange(1, R + 1)
    sights[rng.random(R) < 0.3, 0] = 0
    windowed = rng.random(R) < 0.3
    sights[windowed, 1] = (rng.random(R) * sights[:, 2]).astype(np.int64)[windowed]
    open_rows = rng.random(R) < 0.1
    sights[open_rows, 2:5] = (R, 1, 1)
    sights[rng.random(R) < 0.05, 0:3] = (P, 0, 0)
    if padded:
        sights[rng.random(R) < 0.1, 5] = 1
    scene = Scene(normal(rng, P, heads.width), normal(rng, R, heads.width, scale=2.0), sights)
    if padded:
        scene.visible = (rng.random(R) < 0.8).astype(np.uint8)
        scene.visible[: min(R // 2, 70)] = 0
        scene.prev_visible = (rng.random(P) < 0.8).astype(np.uint8)
    return scene


def dense_attention(heads: Heads, scene: Scene, layer: int = 0) -> Array:
    """softmax(scale q k^T over visible columns) v; zeros where nothing is visible. [R, H c]"""
    H, G, c = heads.H, heads.G, heads.c
    P, R = len(scene.previous), len(scene.qkv)
    rows = as_float64(np.concatenate([scene.previous, scene.qkv]))
    q, k, v = np.split(rows, [H * c, (H + G) * c], axis=1)
    q = q[P:].reshape(R, H, c)
    k, v = (np.repeat(x.reshape(P + R, G, c), H // G, axis=1) for x in (k, v))
    columns = np.arange(P + R)
    out = np.zeros((R, H, c))
    scale = dict(heads.more).get("attention_scale", c**-0.5)
    if dict(heads.more).get("scale_by_inverse_layer"):
        scale /= layer + 1
    real = np.ones(P + R, bool)
    if scene.visible is not None and scene.prev_visible is not None:
        real = np.concatenate([scene.prev_visible, scene.visible]) != 0
    for r, (prev_begin, cur_begin, cur_end, padding, prev_padding, uniform) in enumerate(
        scene.sights
    ):
        before = (columns >= prev_begin) & (columns < P) & (real | bool(prev_padding))
        now = (columns >= P + cur_begin) & (columns < P + cur_end) & (real | bool(padding))
        seen = before | now
        scores = scale * np.einsum("hc,nhc->hn", q[r], k)
        if uniform:
            seen, scores = (columns >= heads.sink) | (columns >= P), np.zeros_like(scores)
        if not seen.any():
            continue
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[r] = np.einsum("hn,nhc->hc", weights / weights.sum(axis=1, keepdims=True), v)
    return out.reshape(R, H * c)


SIZES = [(0, 1), (0, 14), (1, 5), (64, 64), (70, 130), (200, 9)]


@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
@pytest.mark.parametrize(("P", "R"), SIZES)
def test_attention(heads: Heads, P: int, R: int, padded: bool, isa: str) -> None:
    """Against a dense softmax; pages and everything behind the rows hold NaN."""
    rng = np.random.default_rng(P + R)
    scene = random_scene(rng, heads, P, R, padded=padded)
    found = scene.attend(heads.operations(isa=isa), layer=2)
    expected = dense_attention(heads, scene, layer=2)
    assert_close("context", found, expected, tolerance("attend", "float32"))


def test_large_scores() -> None:
    """The running maximum: scores from -3e4 to 3e4, rising and falling along the keys."""
    heads = Heads(H=1, G=1, c=4, more=(("attention_scale", 1.0),))
    rng = np.random.default_rng(10)
    scene = random_scene(rng, heads, 150, 150, padded=False)
    for rows in (scene.previous, scene.qkv):
        rows[:, 4:8] *= 1e4 * np.linspace(-1, 1, len(rows), dtype=np.float32)[:, None]
    found = scene.attend(heads.operations())
    assert_close("context", found, dense_attention(heads, scene), tolerance("attend", "float32"))


@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
def test_attention_rows_do_not_mix(heads: Heads, padded: bool, isa: str) -> None:
    """At once, one by one, in pieces, with two threads: the same bits."""
    rng = np.random.default_rng(11)
    scene = random_scene(rng, heads, 75, 139, padded=padded)
    operations = heads.operations(isa=isa)
    together = scene.attend(operations)
    assert_same_bits("threads", scene.attend(heads.operations(threads=2, isa=isa)), together)
    alone = [scene.attend(operations, r, r + 1) for r in range(len(together))]
    assert_same_bits("one by one", np.concatenate(alone), together)
    pieces = [scene.attend(operations, b, e) for b, e in ((0, 50), (50, 53), (53, 139))]
    assert_same_bits("pieces", np.concatenate(pieces), together)


def causal_scene(rng: np.random.Generator, heads: Heads, P: int, R: int) -> Scene:
    sights = np.zeros((R, 6), np.int64)
    sights[:, 0] = np.minimum(np.arange(R), P)
    sights[:, 2] = np.arange(1, R + 1)
    return Scene(normal(rng, P, heads.width), normal(rng, R, heads.width), sights)


def decode(scene: Scene, operations: Any, pieces: Iterator[int]) -> Floats:
    """Stores and attends piece by piece, so that later keys do not exist yet."""
    cache = scene.cache(operations, 0)
    found, row = [], 0
    for count in pieces:
        part = slice(row, row + count)
        Scene.store(operations, cache, scene.qkv[part])
        sights = scene.sights[part]
        found.append(
            operations.attend([cache], [count], scene.qkv[part], sights, [None], [None])
        )
        row += count
    return np.concatenate(found)


def test_later_keys_do_not_matter(heads: Heads, isa: str) -> None:
    """Prefill at once = in pieces = one row at a time, bit for bit."""
    rng = np.random.default_rng(12)
    scene = causal_scene(rng, heads, 66, 135)
    operations = heads.operations(isa=isa)
    together = scene.attend(operations)
    assert_same_bits("pieces", decode(scene, operations, iter([1, 63, 2, 60, 9])), together)
    assert_same_bits("one by one", decode(scene, operations, iter([1] * 135)), together)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_unseen_values_do_not_matter(poison: float) -> None:
    """A later or a padded row of infinities or NaN does not reach the rows that don't see it."""
    heads = Heads()
    rng = np.random.default_rng(13)
    scene = causal_scene(rng, heads, 10, 40)
    scene.visible = np.ones(40, np.uint8)
    scene.prev_visible = np.ones(10, np.uint8)
    scene.visible[5] = 0
    operations = heads.operations()
    expected = scene.attend(operations)
    assert_close("context", expected, dense_attention(heads, scene), tolerance("attend", "float32"))
    for row in (5, 30):
        scene.qkv[row, heads.H * heads.c :] = poison
    found = scene.attend(operations)
    assert_same_bits("rows before it", found[:30], expected[:30])
    assert np.isnan(found[30:]).any(axis=1).all()


def test_streams_do_not_mix(heads: Heads) -> None:
    """Several streams in one call, with one thread and with two."""
    rng = np.random.default_rng(14)
    scenes = [causal_scene(rng, heads, P, R) for P, R in ((0, 1), (40, 70), (5, 1), (0, 33))]
    single = heads.operations()
    expected = np.concatenate([scene.attend(single) for scene in scenes])
    for threads in (1, 2):
        operations = heads.operations(threads=threads)
        caches = [scene.cache(operations, 0) for scene in scenes]
        counts = [len(scene.qkv) for scene in scenes]
        qkv = np.concatenate([scene.qkv for scene in scenes])
        operations.store_kv(caches, counts, qkv, np.zeros(len(qkv), np.int64))
        sights = np.concatenate([scene.sights for scene in scenes])
        nothing = [None] * len(scenes)
        found = operations.attend(caches, counts, qkv, sights, nothing, nothing)
        assert_same_bits(f"{threads} threads", found, expected)


def test_pages_round_trip(heads: Heads) -> None:
    """Export and import give the same rows and the same attention."""
    rng = np.random.default_rng(15)
    scene = causal_scene(rng, heads, 0, 131)
    operations = heads.operations()
    cache = scene.cache(operations)
    k, v = operations.export_kv(cache)
    split = heads.H * heads.c
    stored = scene.qkv[:, split:].reshape(131, 2, heads.G, heads.c)
    assert_same_bits("keys", k, np.ascontiguousarray(stored[:, 0]))
    assert_same_bits("values", v, np.ascontiguousarray(stored[:, 1]))
    other = testing.Cache()
    operations.import_kv(other, k, v)
    assert other.rows == 131
    for found, expected in zip(operations.export_kv(other), (k, v), strict=True):
        assert_same_bits("again", found, expected)
    last = slice(130, 131)
    contexts = [
        operations.attend([each], [1], scene.qkv[last], scene.sights[last], [None], [None])
        for each in (cache, other)
    ]
    assert_same_bits("context", contexts[1], contexts[0])
