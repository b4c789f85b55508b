"""What a memory holds: figures of each layer, and what is stored under a key.

Letters: h memory heads, F features and E values per head, d width of a key before the feature map.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from armt import _core
from armt.errors import InvalidArgument

FloatArray = npt.NDArray[np.float32]

_LENGTH_FLOOR = 1e-12  # as in the engine: a zero key stays zero


@dataclass(frozen=True)
class LayerMemory:
    """Figures of one layer's memory."""

    layer: int
    written: bool
    """False before the first write."""
    norm: float
    """Euclidean length of A."""
    head_norms: tuple[float, ...]
    """The same, head by head."""
    z_mass: float | None
    """Sum of z, which counts how much was stored; None in a model without a denominator."""
    gamma: tuple[float, float, float] | None
    """Mean, least and greatest gamma of the last write: how new its keys were, 1 for quite new.
    None before the first write, and in models without correction or denominator: they have none."""
    overwritten: float | None
    """1 - mean gamma: how much of the last write went over what was there."""
    beta: float | None
    """Mean gate of the last write."""


@dataclass(frozen=True)
class Recalled:
    """What a layer's memory holds under a key."""

    value: FloatArray
    """[h, E]: the stored value, a blend where several keys overlap with this one."""
    strength: FloatArray | None
    """[h]: z . phi(key), 0 where nothing like the key was written; None without a denominator."""


def inspect(state: _core.State) -> list[LayerMemory]:
    """Figures of every layer's associative memory; an empty list for RMT, which has none."""
    if not _has_association(state):
        return []
    return [_inspect_layer(state, layer) for layer in range(state.layers)]


def key_features(state: _core.State, key: npt.ArrayLike) -> FloatArray:
    """phi(key) [h, F] of a key [d], W_k y of a memory row or W_q x of a reading one.

    u = (max(k, 0), max(-k, 0)) of each head; block j holds u[i] u[i - j], j = 1 .. rolls; the whole
    is divided by its length in the modern dialects. InvalidArgument for another shape, and for RMT.
    """
    if not _has_association(state):
        raise InvalidArgument("key_features: RMT has no associative memory")
    facts = state.facts
    heads, width = int(facts["memory.n_heads"]), int(facts["memory.d_mem"])
    values = np.asarray(key, np.float64)
    if values.shape != (width,):
        raise InvalidArgument(f"key: found shape {values.shape}, expected [d_mem] = ({width},)")
    split = values.reshape(heads, -1)
    u = np.concatenate([np.maximum(split, 0), np.maximum(-split, 0)], axis=1)
    rolls = range(1, int(facts["memory.rolls"]) + 1)
    phi = np.concatenate([u * np.roll(u, j, axis=1) for j in rolls], axis=1)
    if facts["memory.normalise_keys"]:
        phi /= np.maximum(np.linalg.norm(phi, axis=1, keepdims=True), _LENGTH_FLOOR)
    return phi.astype(np.float32)


def recall(state: _core.State, layer: int, key: npt.ArrayLike) -> Recalled:
    """What ``layer`` holds under the key [d]: the value stored for the nearest keys."""
    phi = key_features(state, key)
    _, z = state.memory(layer)
    strength = None if z is None else np.einsum("hf,hf->h", z, phi)
    return Recalled(state.recall(layer, phi), strength)


def nearest(recalled: Recalled, candidates: npt.ArrayLike) -> tuple[int, float]:
    """Which of the values [candidates, h * E] is most like the recalled one, and their cosine."""
    value = recalled.value.astype(np.float64).ravel()
    rows = np.asarray(candidates, np.float64)
    if rows.ndim != 2 or rows.shape[0] == 0 or rows.shape[1] != value.size:
        raise InvalidArgument(
            f"candidates: found shape {rows.shape}, expected [candidates, {value.size}]"
        )
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(value)
    cosines = rows @ value / np.maximum(lengths, _LENGTH_FLOOR)
    best = int(np.argmax(cosines))
    return best, float(cosines[best])


def _has_association(state: _core.State) -> bool:
    return bool(state.facts["memory.dialect"] != "rmt")


def _inspect_layer(state: _core.State, layer: int) -> LayerMemory:
    a, z = state.memory(layer)
    norms = np.sqrt(np.square(a, dtype=np.float64).sum((1, 2)))
    figures = state.write_statistics(layer)
    facts = state.facts
    gamma = None
    if figures is not None and facts["memory.use_denom"] and facts["memory.correction"]:
        gamma = (figures["mean_gamma"], figures["min_gamma"], figures["max_gamma"])
    return LayerMemory(
        layer=layer,
        written=state.written(layer),
        norm=float(np.sqrt(np.square(norms).sum())),
        head_norms=tuple(float(norm) for norm in norms),
        z_mass=None if z is None else float(z.sum(dtype=np.float64)),
        gamma=gamma,
        overwritten=None if gamma is None else 1.0 - gamma[0],
        beta=None if figures is None else figures["mean_beta"],
    )
