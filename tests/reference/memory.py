"""One layer's associative memory: read and write (docs/mathematics.md).

Letters: B batch rows, R rows, m memory tokens, D width of the residual stream, d width of a memory
key, h memory heads, F features per head, E = D / h values per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Array, merge_heads, split_heads
from .features import feature_map

DENOMINATOR_EPSILON = 1e-5
NORM_FLOOR = 1e-12


@dataclass(frozen=True)
class MemoryRule:
    """What the dialects do differently in a read and a write."""

    heads: int = 1
    rolls: int = 3
    normalise: bool = False  # divide each head's features by their length
    use_denom: bool = True
    correction: bool = True
    gamma_epsilon: float = 1e-5  # added to ||k||^2: 1e-5 paper, 0 modern


@dataclass(frozen=True)
class MemoryMaps:
    """The learned maps of one layer."""

    query: Array  # [d, D]
    key: Array  # [d, D]
    value: Array  # [D, D]
    gate: Array  # [1, D], [h, D], or [D, D] with gating
    gate_bias: Array  # [1], [h] or [D]


@dataclass(frozen=True)
class LayerMemory:
    """What one layer remembers."""

    A: Array  # [B, h, F, E]
    z: Array | None  # [B, h, F]; None without a denominator
    written: bool = False


@dataclass(frozen=True)
class WriteTrace:
    """The intermediate values of one write; every array is [B, h, m, ...]."""

    phi_k: Array  # [B, h, m, F]
    v: Array  # [B, h, m, E]
    beta: Array  # [B, h, m, 1], or [B, h, m, E] with gating
    gamma: Array | None  # [B, h, m, 1]; None without a denominator
    delta: Array  # [B, h, m, E], the value minus what was stored


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow on either side."""
    small = np.exp(-np.abs(x))
    result: Array = np.where(x >= 0, 1.0, small) / (1.0 + small)
    return result


def empty_memory(rule: MemoryRule, maps: MemoryMaps, *, batch: int) -> LayerMemory:
    """The state after a reset: zeros, never written."""
    d, width = maps.key.shape
    features = 2 * rule.rolls * d // rule.heads
    A = np.zeros((batch, rule.heads, features, width // rule.heads))
    z = np.zeros((batch, rule.heads, features)) if rule.use_denom else None
    return LayerMemory(A, z)


def features_of(rule: MemoryRule, x: Array, projection: Array) -> Array:
    """phi of the projected rows, head by head: [B, R, D] -> [B, h, R, F]."""
    phi = feature_map(split_heads(x @ projection.T, rule.heads), rolls=rule.rolls)
    if rule.normalise:
        phi /= np.maximum(np.linalg.norm(phi, axis=-1, keepdims=True), NORM_FLOOR)
    return phi


def _denominator(memory: LayerMemory, phi: Array) -> Array:
    """z . phi + 1e-5: [B, h, R, 1]."""
    assert memory.z is not None
    den: Array = np.einsum("bhf,bhrf->bhr", memory.z, phi)[..., None] + DENOMINATOR_EPSILON
    return den


def _stored(rule: MemoryRule, memory: LayerMemory, phi: Array) -> Array:
    """A^T phi / (z . phi + 1e-5), or A^T phi without a denominator: [B, h, R, E]."""
    stored: Array = phi @ memory.A
    if rule.use_denom:
        stored /= _denominator(memory, phi)
    return stored


def read(rule: MemoryRule, maps: MemoryMaps, memory: LayerMemory, x: Array) -> Array:
    """What is added to every row before the block: [B, R, D] -> [B, R, D]."""
    return merge_heads(_stored(rule, memory, features_of(rule, x, maps.query)))


def _gamma(rule: MemoryRule, memory: LayerMemory, k: Array) -> Array:
    """clip(1 - den / (||k||^2 + epsilon), 0, 1), exactly 1 at first or without correction."""
    if not (memory.written and rule.correction):
        return np.ones((*k.shape[:-1], 1))
    length = np.sum(k * k, axis=-1, keepdims=True) + rule.gamma_epsilon
    # den >= 1e-5, so a zero key divides to +infinity, never to NaN, and gamma clips to 0.
    with np.errstate(divide="ignore"):
        gamma: Array = np.clip(1.0 - _denominator(memory, k) / length, 0.0, 1.0)
    return gamma


def write(
    rule: MemoryRule, maps: MemoryMaps, memory: LayerMemory, y: Array
) -> tuple[LayerMemory, WriteTrace]:
    """All memory rows y [B, m, D] at once, every one against the old state.

    A <- A + sum_t k_t (outer) beta_t (v_t - old_t);  z <- z + sum_t gamma_t k_t
    """
    k = features_of(rule, y, maps.key)
    v = split_heads(y @ maps.value.T, rule.heads)
    beta = sigmoid(y @ maps.gate.T + maps.gate_bias)
    beta = split_heads(beta, rule.heads)  # one value a head, or with gating one a channel
    delta = v - _stored(rule, memory, k) if memory.written else v
    A = memory.A + k.swapaxes(-1, -2) @ (beta * delta)
    gamma, z = None, None
    if rule.use_denom:
        assert memory.z is not None
        gamma = _gamma(rule, memory, k)
        z = memory.z + np.sum(gamma * k, axis=-2)
    return LayerMemory(A, z, True), WriteTrace(k, v, beta, gamma, delta)
