"""The feature map of the associative memory (docs/mathematics.md)."""

from __future__ import annotations

import numpy as np

from .arrays import Array


def feature_map(x: Array, *, rolls: int = 3) -> Array:
    """phi(x): [..., n] -> [..., 2 * rolls * n].

    u = (max(x, 0), max(-x, 0));  block_j[i] = u[i] * u[(i - j) mod 2n];  phi = blocks 1..rolls.
    """
    u = np.concatenate([np.maximum(x, 0.0), np.maximum(-x, 0.0)], axis=-1)
    return np.concatenate([u * np.roll(u, j, axis=-1) for j in range(1, rolls + 1)], axis=-1)
