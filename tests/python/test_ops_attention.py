"""Rotation, pages and attention on the CPU against float64, and their promise of equal bits.

Letters: R rows, P rows of the previous segment, H query heads, G key/value heads, c width of a
head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from armt._core import testing
from ops import Floats, assert_same_bits, each_isa, normal
from reference.arrays import Array, as_float64, merge_heads, split_heads
from reference.decoder import rms_norm, rotary_frequencies, rotate
from tolerances import assert_close, tolerance


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


@each_isa
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
        result: Array = merge_heads(rotate(x, positions[None], frequencies))[0]
        return result

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
    """A stream: P rows of the previous segment, R of the current one, and who sees whom."""

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


@each_isa
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


@each_isa
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
        found.append(operations.attend([cache], [count], scene.qkv[part], sights, [None], [None]))
        row += count
    return np.concatenate(found)


@each_isa
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
