"""Greedy generation (docs/mathematics.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Array, Bools, Ints
from .decoder import KeyValue, with_past
from .model import (
    Model,
    State,
    as_mask,
    empty_state,
    forward,
    plan_segment,
    read_rows,
    run_segment,
    segment_bounds,
)


@dataclass(frozen=True)
class Decoding:
    """The last segment while it grows; `state` is the memory before it, which stays frozen."""

    model: Model
    state: State
    caches: Sequence[KeyValue]  # one a layer
    columns: Bools  # [B, C], false where a cached column is padding
    next_position: Ints  # [B]
    keep: int | None  # entries a cache is cut to; None: it grows
    logits: Array  # [B, V], of the last token


def _without_window(model: Model) -> Model:
    """Generation of the paper dialect and of RMT does not use the window at all."""
    if model.settings.modern:
        return model
    return replace(model, settings=replace(model.settings, sliding_window=False))


def _positions_from_mask(front: int, real: Bools) -> Ints:
    """Padding does not count: [B, front + T]."""
    columns = np.concatenate([np.ones((len(real), front), dtype=bool), real], axis=1)
    return np.asarray(np.maximum(np.cumsum(columns, axis=1) - 1, 0), dtype=np.int64)


def _check_window(model: Model, state: State, real: Bools) -> None:
    if model.settings.wrap_pos:
        raise ValueError("sliding generation with wrap_pos: positions of new tokens are undefined")
    if not (state.cached_real.all() and real.all()):
        raise ValueError("sliding generation with padding inside the window is undefined")


def start_generation(
    model: Model,
    prompt_ids: npt.NDArray[Any],
    attention_mask: npt.NDArray[Any] | None = None,
    *,
    state: State | None = None,
) -> Decoding:
    """Processes the prompt [B, N]: all segments but the last are written, the last is not.

    `state` continues from tokens already written as whole segments.
    """
    if model.settings.inner:
        raise ValueError("the inner loop recomputes everything for each token; use generate()")
    model = _without_window(model)
    ids = np.asarray(prompt_ids, dtype=np.int64)
    real = as_mask(ids, attention_mask)
    if not real[:, -1].all():
        raise ValueError("a right-padded prompt cannot be continued: the last column is padding")
    *before, (start, end) = segment_bounds(model.settings, ids.shape[1])
    state = empty_state(model, batch=len(ids)) if state is None else state
    for first, last in before:
        _, state = run_segment(model, state, ids[:, first:last], real[:, first:last])

    ids, real = ids[:, start:end], real[:, start:end]
    window, front = state.cached_real.shape[1], model.settings.front_rows
    if window:
        _check_window(model, state, real)
        positions, keep = None, window + front
    else:
        positions, keep = _positions_from_mask(front, real), None
    plan = plan_segment(model, state, ids, real, memory_rows=False, positions=positions)
    x, caches = plan.rows, []
    for index, layer in enumerate(state.layers):
        x = read_rows(model, index, x, layer.memory)
        x, own = model.decoder.block(index, x, plan.positions, plan.visible, layer.cache)
        caches.append(_cut(with_past(layer.cache, own), keep))
    columns = np.ones((len(ids), window + plan.shape.rows), dtype=bool)
    columns[:, window + front :] = real
    return Decoding(
        model=model,
        state=state,
        caches=caches,
        columns=columns if keep is None else columns[:, -keep:],
        next_position=np.broadcast_to(plan.positions[:, -1] + 1, (len(ids),)),
        keep=keep,
        logits=_last_logits(model, x),
    )


def step(decoding: Decoding, token_ids: npt.NDArray[Any]) -> Decoding:
    """Feeds one token a row [B] at the next position; it sees the whole cache and itself."""
    model, ids = decoding.model, np.asarray(token_ids, dtype=np.int64)
    positions = decoding.next_position[:, None]
    columns = np.concatenate([decoding.columns, np.ones((len(ids), 1), dtype=bool)], axis=1)
    x = model.decoder.add_positions(model.decoder.embed(ids[:, None]), positions)
    caches = []
    for index, (layer, past) in enumerate(zip(decoding.state.layers, decoding.caches, strict=True)):
        x = read_rows(model, index, x, layer.memory)
        x, own = model.decoder.block(index, x, positions, columns[:, None], past)
        caches.append(_cut(with_past(past, own), decoding.keep))
    return replace(
        decoding,
        caches=caches,
        columns=columns if decoding.keep is None else columns[:, -decoding.keep :],
        next_position=decoding.next_position + 1,
        logits=_last_logits(model, x),
    )


def _cut(cache: KeyValue, keep: int | None) -> KeyValue:
    return cache if keep is None else (cache[0][:, :, -keep:], cache[1][:, :, -keep:])


def _last_logits(model: Model, x: Array) -> Array:
    return model.decoder.logits(model.decoder.final_norm(x[:, -1]))


def generate(
    model: Model,
    prompt_ids: npt.NDArray[Any],
    n: int,
    *,
    attention_mask: npt.NDArray[Any] | None = None,
    eos_token_id: int | None = None,
) -> tuple[Ints, Array]:
    """Greedy continuation from an empty memory: new ids [B, n] and their logits [B, n, V].

    With `eos_token_id` it stops early once all rows produce that token in the same step.
    """
    if model.settings.inner:
        return _generate_inner(model, prompt_ids, n, attention_mask, eos_token_id)
    decoding = start_generation(model, prompt_ids, attention_mask)
    new_ids, step_logits = [], []
    for i in range(n):
        step_logits.append(decoding.logits)
        new_ids.append(np.argmax(decoding.logits, axis=-1))
        if eos_token_id is not None and (new_ids[-1] == eos_token_id).all():
            break
        if i + 1 < n:
            decoding = step(decoding, new_ids[-1])
    return np.stack(new_ids, axis=1), np.stack(step_logits, axis=1)


def _generate_inner(
    model: Model,
    prompt_ids: npt.NDArray[Any],
    n: int,
    attention_mask: npt.NDArray[Any] | None,
    eos_token_id: int | None,
) -> tuple[Ints, Array]:
    """Section 11: the whole sequence again for every token; full segments are written."""
    ids = np.asarray(prompt_ids, dtype=np.int64)
    real = as_mask(ids, attention_mask)
    new_ids, step_logits = [], []
    for _ in range(n):
        logits, _ = forward(model, ids, real)
        step_logits.append(logits[:, -1])
        new_ids.append(np.argmax(logits[:, -1], axis=-1))
        if eos_token_id is not None and (new_ids[-1] == eos_token_id).all():
            break
        ids = np.concatenate([ids, new_ids[-1][:, None]], axis=1)
        real = np.concatenate([real, np.ones((len(ids), 1), dtype=bool)], axis=1)
    return np.stack(new_ids, axis=1), np.stack(step_logits, axis=1)


def smallest_margin(step_logits: Array) -> float:
    """Smallest distance between the best and the second logit: rounding below it changes no id."""
    best = np.sort(step_logits, axis=-1)
    return float((best[..., -1] - best[..., -2]).min())
