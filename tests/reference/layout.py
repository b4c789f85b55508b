"""Cutting, positions and who sees whom (docs/mathematics.md).

A segment's rows are [front (s) | tokens (T) | back (m)]: the front is the sink (RMT: its read
memory), the back are the memory tokens. The P cached tokens of the previous segment are columns
before all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Bools, Ints
from .settings import Settings


def cut(length: int, *, size: int, alignment: str) -> list[int]:
    """Segment lengths of a sequence of `length` tokens; none is empty."""
    if alignment == "center":
        size = -(-length // -(-length // size)) if length else size
    lengths = [size] * (length // size)
    rest = [length % size] if length % size else []
    return rest + lengths if alignment == "right" else lengths + rest


@dataclass(frozen=True)
class Shape:
    """Row counts of one segment."""

    front: int
    tokens: int
    back: int
    cached: int = 0

    @property
    def rows(self) -> int:
        return self.front + self.tokens + self.back

    @property
    def token_rows(self) -> slice:
        return slice(self.front, self.front + self.tokens)


def positions(settings: Settings, shape: Shape, *, table_rows: int, rows_before: int) -> Ints:
    """Position of every row: [R]. `table_rows` counts the learned position table (wrap_pos)."""
    if settings.wrap_pos:
        before = np.arange(shape.front + shape.tokens)
        last = np.arange(table_rows - settings.memory_tokens, table_rows)
        return np.concatenate([before, last[: shape.back]])
    start = rows_before if settings.inner else shape.cached
    return start + np.arange(shape.rows)


def visible(settings: Settings, shape: Shape, real: Bools, cached_real: Bools) -> Bools:
    """Which columns each row sees: [B, R, P + R].

    `real` [B, T] and `cached_real` [B, P] are false at padding.
    """
    if settings.inner or (settings.modern and settings.sliding_window):
        return _table_mask(settings, shape, real, cached_real)
    return _causal_mask(shape, real, cached_real)


def _causal_mask(shape: Shape, real: Bools, cached_real: Bools) -> Bools:
    """Sections 7.2, 7.4 and 10: causal over the rows, every unpadded cached token."""
    batch = real.shape[0]
    always = np.ones((batch, max(shape.front, shape.back)), dtype=bool)
    columns = np.concatenate([always[:, : shape.front], real, always[:, : shape.back]], axis=1)
    causal = np.tri(shape.rows, dtype=bool)
    current = causal[None] & columns[:, None, :]
    cached = np.repeat(cached_real[:, None, :], shape.rows, axis=1)
    return np.concatenate([cached, current], axis=2)


def _table_mask(settings: Settings, shape: Shape, real: Bools, cached_real: Bools) -> Bools:
    """The sliding window of the outer loop, and the inner loop (docs/mathematics.md)."""
    s, T, P = shape.front, shape.tokens, shape.cached
    sink, token = slice(0, s), shape.token_rows
    memory = slice(s + T, shape.rows)
    current = np.zeros((real.shape[0], shape.rows, shape.rows), dtype=bool)
    current[:, :, sink] = True
    current[:, token, token] = np.tri(T, dtype=bool) & real[:, None, :]
    current[:, memory, token] = True
    current[:, memory, memory] = True

    cached = np.zeros((real.shape[0], shape.rows, P), dtype=bool)
    j = np.arange(P)
    if settings.inner:
        row = np.arange(shape.rows)[:, None]
        cached[:] = (j >= row) & cached_real[:, None, :]
        cached[:, sink] = False
    else:
        i = np.arange(T)[:, None]
        cached[:, token] = (j >= i) & cached_real[:, None, :]
        cached[:, memory] = True
    return np.concatenate([cached, current], axis=2)
