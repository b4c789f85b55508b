"""Memory configuration -> the engine's memory settings (MemoryConfig)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from armt.checkpoint.base_config import Base, Shapes, vote
from armt.checkpoint.fields import LARGEST, Fields
from armt.checkpoint.problems import Problems

DIALECTS = {
    "paper": "paper",
    "modern": "modern",
    "inner": "inner",
    "modern-inner": "inner",
    "rmt": "rmt",
}
ALIGNMENTS = {name: name for name in ("left", "right", "center")}
MAX_MEMORY_TOKENS = 2**20 - 1
MAX_ROLLS = 64
UNKNOWN = -1
"""A size that no tensor and no setting tells; it only stands in messages about what is missing."""

HF_DEFAULTS: dict[str, Any] = {
    "num_mem_tokens": 16,
    "d_mem": 512,
    "segment_size": 512,
    "segment_alignment": "left",
    "sliding_window": False,
    "attend_to_previous_input": False,
    "use_sink": False,
    "wrap_pos": False,
    "correction": True,
    "n_heads": 1,
    "use_denom": True,
    "gating": False,
    "act_on": False,
    "nu": 3,
}
"""What a Hugging Face folder means where its configuration leaves a field out."""
BARE_DEFAULTS: dict[str, Any] = {
    name: HF_DEFAULTS[name]
    for name in (
        "segment_alignment",
        "sliding_window",
        "attend_to_previous_input",
        "correction",
        "use_denom",
        "act_on",
        "nu",
    )
}
"""The same for bare state dicts, whose other facts follow from shapes or must be given."""
UNUSED = (
    "layers_attr",  # the names say where the layers are
    "freeze_mem",  # training only
    "max_hop",
    "act_type",
    "act_format",
    "noisy_halting",
    "constant_depth",
    "time_penalty",
)
"""Settings that say nothing about what the engine computes; the last six need act_on."""


def read_memory(
    settings: Mapping[str, Any],
    *,
    dialect: str,
    base: Base,
    shapes: Shapes,
    bare: bool,
    problems: Problems,
) -> tuple[dict[str, Any], str, list[str]]:
    """(fields of MemoryConfig, segment alignment, settings that were assumed).

    ``bare``: the settings stand beside a bare state dict and may leave out what shapes tell.
    """
    defaults = BARE_DEFAULTS if bare else HF_DEFAULTS
    fields = Fields("armt", settings, defaults, problems)
    if bare:
        for name in settings:
            if name not in HF_DEFAULTS and name not in UNUSED:
                fields.problem(name, "unknown setting")
    fields.refuse("attend_to_previous_input", why="the published code fails with it; turn it off")
    fields.refuse("act_on", why="adaptive computation is not supported")
    infer = _Inference(fields, shapes, base, dialect)
    memory: dict[str, Any] = {
        "dialect": dialect,
        "memory_tokens": infer.memory_tokens(),
        "d_mem": 0,
        "n_heads": 1,
        "rolls": fields.whole("nu", most=MAX_ROLLS),
        "normalise_keys": dialect in ("modern", "inner"),
        "use_denom": fields.flag("use_denom"),
        "correction": fields.flag("correction"),
        "gating": False,
        "use_sink": infer.use_sink(),
        "sliding_window": fields.flag("sliding_window"),
        "wrap_positions": infer.wrap_positions(),
        "segment_size": _segment_size(fields),
    }
    if dialect != "rmt":
        memory["d_mem"] = infer.d_mem()
        memory["gating"] = infer.gating()
        memory["n_heads"] = infer.n_heads(gating=memory["gating"])
    alignment = fields.choice("segment_alignment", ALIGNMENTS)
    for name in ("gating", "n_heads"):
        if dialect == "rmt" and fields.given(name) and fields.raw(name) not in (False, 1):
            fields.problem(name, "RMT has no associative memory")
    assumed = [
        f"{name} = {defaults[name]}"
        for name in ("segment_alignment", "correction", "sliding_window")
        if not fields.given(name) and not (dialect == "rmt" and name == "correction")
    ]
    return memory, alignment, assumed if bare else []


def _segment_size(fields: Fields) -> int:
    if fields.raw("segment_size") is None:
        fields.problem("segment_size", "found nothing; a state dict does not tell it")
        return 1
    return fields.whole("segment_size")


class _Inference:
    """Settings that are given, or follow from the shapes of a bare state dict."""

    def __init__(self, fields: Fields, shapes: Shapes, base: Base, dialect: str) -> None:
        self.fields, self.shapes, self.base, self.dialect = fields, shapes, base, dialect
        self.width: int = base.decoder["d_model"]

    def _map_rows(self, *maps: str) -> int:
        layers = range(self.base.decoder["n_layers"])
        names = (f"maps.{i}.{name}.weight" for i in layers for name in maps)
        found = (self.shapes[n][0] for n in names if len(self.shapes.get(n, ())) == 2)
        return vote(found, UNKNOWN)

    def memory_tokens(self) -> int:
        if self.fields.raw("num_mem_tokens") is not None:
            # 0 would let the published code write all rows.
            return self.fields.whole("num_mem_tokens", most=MAX_MEMORY_TOKENS)
        shape = self.shapes.get("memory", ())
        rows = shape[0] if len(shape) == 2 else UNKNOWN
        if rows == 0:
            self.fields.problem("num_mem_tokens", "found a memory of 0 rows, expected at least 1")
        return rows

    def d_mem(self) -> int:
        if self.fields.raw("d_mem") is not None:
            return self.fields.whole("d_mem")
        return self._map_rows("W_mq", "W_mk")

    def gating(self) -> bool:
        if self.fields.raw("gating") is not None:
            return self.fields.flag("gating")
        return self.dialect != "paper" and self._map_rows("W_mb") == self.width

    def n_heads(self, *, gating: bool) -> int:
        if self.fields.raw("n_heads") is not None:
            return self.fields.whole("n_heads", most=LARGEST)
        if self.dialect == "paper":
            return 1
        if gating:
            self.fields.problem(
                "n_heads", "found nothing; with gating no shape tells the number of memory heads"
            )
            return 1
        return self._map_rows("W_mb")

    def use_sink(self) -> bool:
        if self.fields.raw("use_sink") is not None:
            return self.fields.flag("use_sink")
        return self.dialect in ("modern", "inner") and "sink" in self.shapes

    def wrap_positions(self) -> bool:
        """Given, or by the rows that GPT-2's position table has beyond those of the base model."""
        if self.fields.raw("wrap_pos") is not None:
            return self.fields.flag("wrap_pos")
        table = self.shapes.get("base.transformer.wpe.weight", ())
        own: int = self.base.decoder["learned_positions"]
        return bool(own) and len(table) == 2 and table[0] > own


def position_rows(base: Base, memory: Mapping[str, Any]) -> int:
    """Rows of the learned position table: the base model's and, with wrap_pos, the memory's."""
    own: int = base.decoder["learned_positions"]
    if not own or not memory["wrap_positions"]:
        return own
    tokens = max(0, int(memory["memory_tokens"]))
    return own + (2 * tokens if memory["dialect"] == "rmt" else tokens)


def check_limits(
    decoder: Mapping[str, Any],
    memory: Mapping[str, Any],
    alignment: str,
    problems: Problems,
    *,
    window: int | None = None,
) -> None:
    """Adds every combination of settings that does not exist or is refused."""
    dialect, heads, m = memory["dialect"], memory["n_heads"], memory["memory_tokens"]
    wrap, sink, size = memory["wrap_positions"], memory["use_sink"], memory["segment_size"]
    if dialect == "paper":
        modern_only = {
            "n_heads": heads not in (1, UNKNOWN),
            "use_denom = false": not memory["use_denom"],
            "gating": memory["gating"],
            "use_sink": sink,
        }
        for name in (name for name, used in modern_only.items() if used):
            problems.add(f"armt.{name}: the paper dialect has no such setting")
    if dialect == "rmt" and sink:
        problems.add("armt.use_sink: RMT has no sink")
    if dialect != "rmt" and heads > 0:
        for name, size_of in (("d_mem", memory["d_mem"]), ("width", decoder["d_model"])):
            if size_of > 0 and size_of % heads:
                problems.add(f"armt.n_heads: {heads} memory heads do not divide {name} {size_of}")
    if wrap and sink:
        problems.add("armt.wrap_pos: not possible together with a sink; turn one of them off")
    if wrap and not decoder["learned_positions"]:
        problems.add("armt.wrap_pos: needs a learned position table (GPT-2); turn it off")
    if dialect == "inner" and wrap:
        problems.add("armt.wrap_pos: the inner loop has none; turn it off")
    if dialect == "inner" and alignment != "left":
        problems.add(f"armt.segment_alignment: found {alignment}; the inner loop has only left")
    front = m if dialect == "rmt" else int(sink)
    table = decoder["learned_positions"]
    if table and m > 0 and front + size + m > table:
        problems.add(
            f"armt.segment_size: found {size}, but the position table of {table} rows holds"
            f" segments of {max(0, table - front - m)} tokens at most"
        )
    columns = front + size + max(m, 0) + (size if memory["sliding_window"] else 0)
    if window is not None and columns > window:
        problems.add(
            f"base_model.sliding_window: found {window}, but a segment has {columns} rows to see;"
            " a window inside the segment is not supported"
        )
