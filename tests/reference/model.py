"""The segment loop over a base decoder (docs/mathematics.md).

Letters: B batch rows, T tokens of a segment, N tokens of the whole sequence, R rows of a segment,
P cached tokens, L layers, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from . import layout
from .arrays import Array, Bools, Ints
from .decoder import Decoder, KeyValue
from .layout import Shape
from .memory import LayerMemory, MemoryMaps, empty_memory, read, write
from .settings import Settings

Trace = dict[str, Array]


@dataclass(frozen=True)
class Model:
    """Weights and settings; never changed by a run."""

    settings: Settings
    decoder: Decoder
    maps: Sequence[MemoryMaps]  # one a layer; empty for RMT
    memory: Array  # [m, D], the learned memory tokens
    sink: Array | None  # [1, D]


@dataclass(frozen=True)
class LayerState:
    """What one layer carries to the next segment."""

    memory: LayerMemory | None  # None for RMT
    cache: KeyValue | None = None  # token rows of the previous segment, under a sliding window


@dataclass(frozen=True)
class State:
    """All that passes from one segment to the next."""

    layers: tuple[LayerState, ...]
    cached_real: Bools  # [B, P], false where a cached token is padding
    rows_before: int = 0  # rows of all earlier segments; positions of the inner loop
    segments: int = 0  # segments so far
    recurrent: Array | None = None  # [B, m, D], RMT's memory after a segment
    head_axis: bool = True  # false in the paper dialect, whose published A and z have none

    def _published(self, arrays: Sequence[Array]) -> Array:
        stacked = np.stack(arrays)
        return stacked if self.head_axis else stacked[:, :, 0]

    @property
    def A(self) -> Array | None:
        """[L, B, h, F, E], or [L, B, F, D] in the paper dialect; None for RMT."""
        matrices = [layer.memory.A for layer in self.layers if layer.memory is not None]
        return self._published(matrices) if matrices else None

    @property
    def z(self) -> Array | None:
        """As A without the last axis; None for RMT and without a denominator."""
        sums = [
            layer.memory.z
            for layer in self.layers
            if layer.memory is not None and layer.memory.z is not None
        ]
        return self._published(sums) if sums else None

    @property
    def memory_state(self) -> Array | None:
        """[B, m, D]: what RMT carries to a next segment."""
        return self.recurrent


@dataclass(frozen=True)
class Plan:
    """Everything about a segment that does not depend on what its layers compute."""

    shape: Shape
    rows: Array  # [B, R, D], the rows that enter layer 0
    positions: Ints  # [B, R] or [1, R]
    visible: Bools  # [B, R, P + R]
    real: Bools  # [B, T], false at padding
    writes: bool
    keeps_cache: bool


def empty_state(model: Model, *, batch: int) -> State:
    """The state after a reset."""
    rule = model.settings.rule()
    memories: list[LayerMemory | None] = [empty_memory(rule, m, batch=batch) for m in model.maps]
    if model.settings.rmt:
        memories = [None] * model.decoder.n_layers
    return State(
        layers=tuple(LayerState(memory) for memory in memories),
        cached_real=np.zeros((batch, 0), dtype=bool),
        head_axis=model.settings.modern,
    )


def plan_segment(
    model: Model,
    state: State,
    ids: Ints,
    real: Bools,
    *,
    memory_rows: bool = True,
    positions: Ints | None = None,
) -> Plan:
    """Rows, positions and mask of the next segment. Without memory rows nothing is written."""
    settings, batch = model.settings, len(ids)
    shape = Shape(
        front=settings.front_rows,
        tokens=ids.shape[1],
        back=settings.memory_tokens if memory_rows else 0,
        cached=state.cached_real.shape[1],
    )
    carried = model.memory if state.recurrent is None else state.recurrent
    front = carried if settings.rmt else model.sink
    parts = [model.decoder.embed(ids)]
    if front is not None:
        parts.insert(0, np.broadcast_to(front, (batch, *front.shape[-2:])))
    if memory_rows:
        back = carried if settings.rmt else model.memory
        parts.append(np.broadcast_to(back, (batch, *back.shape[-2:])))
    if positions is None:
        positions = layout.positions(
            settings,
            shape,
            table_rows=model.decoder.table_rows,
            rows_before=state.rows_before,
        )[None]
    return Plan(
        shape=shape,
        rows=model.decoder.add_positions(np.concatenate(parts, axis=1), positions),
        positions=positions,
        visible=layout.visible(settings, shape, real, state.cached_real),
        real=real,
        writes=memory_rows and not settings.rmt,
        keeps_cache=settings.sliding_window,
    )


def read_rows(model: Model, index: int, x: Array, memory: LayerMemory | None) -> Array:
    """Step 1 of the loop: every row reads, once the layer has been written."""
    if memory is None or not memory.written:
        return x
    return x + read(model.settings.rule(), model.maps[index], memory, x)


def run_cell(
    model: Model, plan: Plan, index: int, x: Array, state: LayerState, trace: Trace | None = None
) -> tuple[Array, LayerState]:
    """One layer of one segment: read, block, write. `trace` keys here carry no prefix."""
    after_read = read_rows(model, index, x, state.memory)
    y, (k, v) = model.decoder.block(index, after_read, plan.positions, plan.visible, state.cache)
    found: dict[str, Array | None] = {"in": x, "after_read": after_read, "out": y}
    memory = state.memory
    if plan.writes:
        assert memory is not None
        memory_rows = y[:, plan.shape.token_rows.stop :]
        memory, written = write(model.settings.rule(), model.maps[index], memory, memory_rows)
        found |= vars(written) | {"A": memory.A, "z": memory.z}
    tokens = plan.shape.token_rows
    cache = (k[:, :, tokens], v[:, :, tokens]) if plan.keeps_cache else None
    if trace is not None:
        trace.update({name: array for name, array in found.items() if array is not None})
    return y, LayerState(memory, cache)


def after_segment(
    model: Model, state: State, plan: Plan, layers: Sequence[LayerState], x: Array
) -> tuple[Array, State]:
    """Logits of the token rows [B, T, V] and the state that the next segment starts from."""
    x = model.decoder.final_norm(x)
    keeps = plan.real if plan.keeps_cache else plan.real[:, :0]
    recurrent = x[:, plan.shape.token_rows.stop :] if model.settings.rmt else None
    return model.decoder.logits(x[:, plan.shape.token_rows]), replace(
        state,
        layers=tuple(layers),
        cached_real=keeps,
        rows_before=state.rows_before + plan.shape.rows,
        segments=state.segments + 1,
        recurrent=recurrent,
    )


def run_segment(
    model: Model, state: State, ids: Ints, real: Bools, *, trace: Trace | None = None
) -> tuple[Array, State]:
    """One whole segment, written to memory: logits [B, T, V] and the next state.

    `trace` collects every intermediate value as `segment{s}_layer{l}_{what}`.
    """
    plan = plan_segment(model, state, ids, real)
    x, layers = plan.rows, []
    for index, layer_state in enumerate(state.layers):
        found: Trace = {}
        x, next_state = run_cell(model, plan, index, x, layer_state, found)
        layers.append(next_state)
        if trace is not None:
            prefix = f"segment{state.segments}_layer{index}_"
            trace.update({prefix + name: array for name, array in found.items()})
    return after_segment(model, state, plan, layers, x)


def as_mask(ids: Ints, attention_mask: npt.NDArray[Any] | None) -> Bools:
    """[B, N], true at real tokens; all true without a mask."""
    if attention_mask is None:
        return np.ones(ids.shape, dtype=bool)
    if attention_mask.shape != ids.shape:
        raise ValueError(f"attention_mask {attention_mask.shape} does not fit ids {ids.shape}")
    real: Bools = np.asarray(attention_mask) != 0
    return real


def segment_bounds(settings: Settings, length: int) -> list[tuple[int, int]]:
    """Start and end of every segment of a sequence."""
    lengths = layout.cut(length, size=settings.segment_size, alignment=settings.segment_alignment)
    ends = np.cumsum(lengths).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def forward(
    model: Model,
    input_ids: npt.NDArray[Any],
    attention_mask: npt.NDArray[Any] | None = None,
    *,
    state: State | None = None,
    segment_lengths: Sequence[int] | None = None,
    trace: Trace | None = None,
) -> tuple[Array, State]:
    """Logits of every token [B, N, V] and the final state (`.A`, `.z`, `.memory_state`).

    input_ids [B, N]; `state` continues an earlier call (its tokens count as complete segments);
    `segment_lengths` replaces the cut of "Cutting".
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    real = as_mask(ids, attention_mask)
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"input_ids: found shape {ids.shape}, expected [batch, at least 1]")
    if segment_lengths is None:
        bounds = segment_bounds(model.settings, ids.shape[1])
    else:
        ends = np.cumsum(segment_lengths).tolist()
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        if not ends or ends[-1] != ids.shape[1]:
            raise ValueError(f"segment_lengths {list(segment_lengths)} do not cover {ids.shape[1]}")
    state = empty_state(model, batch=len(ids)) if state is None else state
    logits = []
    for start, end in bounds:
        part, state = run_segment(model, state, ids[:, start:end], real[:, start:end], trace=trace)
        logits.append(part)
    return np.concatenate(logits, axis=1), state


def build_model(
    *,
    settings: Settings,
    decoder: Decoder,
    tensors: Mapping[str, Array],
    maps: Sequence[MemoryMaps],
) -> Model:
    """A model from its parts, with the checks that need the shapes."""
    memory = tensors["memory"]
    width = decoder.d_model
    if memory.shape != (settings.memory_tokens, width):
        raise ValueError(
            f"memory: found {memory.shape}, expected {(settings.memory_tokens, width)}"
        )
    if width % settings.heads:
        raise ValueError(f"width {width} is not divisible by n_heads {settings.heads}")
    if settings.wrap_pos and not decoder.table_rows:
        raise ValueError("wrap_pos needs a base model with learned positions (GPT-2)")
    return Model(settings, decoder, maps, memory, tensors["sink"] if settings.use_sink else None)
