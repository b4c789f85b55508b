"""Memory settings of a model and what has to be refused (docs/formats.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .memory import MemoryRule

DIALECTS = ("paper", "modern", "modern-inner", "rmt")
ALIGNMENTS = ("left", "right", "center")


@dataclass(frozen=True)
class Settings:
    """The `armt` object of a configuration together with its dialect."""

    dialect: str
    memory_tokens: int
    segment_size: int
    segment_alignment: str = "left"
    d_mem: int = 0  # 0 for RMT
    nu: int = 3
    heads: int = 1
    use_denom: bool = True
    correction: bool = True
    gating: bool = False
    use_sink: bool = False
    sliding_window: bool = False
    wrap_pos: bool = False

    @property
    def modern(self) -> bool:
        return self.dialect in ("modern", "modern-inner")

    @property
    def inner(self) -> bool:
        return self.dialect == "modern-inner"

    @property
    def rmt(self) -> bool:
        return self.dialect == "rmt"

    @property
    def sink_rows(self) -> int:
        return int(self.use_sink)

    @property
    def front_rows(self) -> int:
        """Rows before the tokens: RMT's read memory, or the sink."""
        return self.memory_tokens if self.rmt else self.sink_rows

    def rule(self) -> MemoryRule:
        """How a layer's memory is read and written."""
        return MemoryRule(
            heads=self.heads,
            rolls=self.nu,
            normalise=self.modern,
            use_denom=self.use_denom,
            correction=self.correction,
            gamma_epsilon=0.0 if self.modern else 1e-5,
        )


def read_settings(dialect: str, armt: Mapping[str, Any]) -> Settings:
    """Settings from a configuration object; defaults are those of docs/formats.md."""
    for name in ("attend_to_previous_input", "act_on"):
        if armt.get(name, False):
            raise ValueError(f"armt.{name}: true is not supported by any published version")
    settings = Settings(
        dialect=dialect,
        memory_tokens=armt.get("num_mem_tokens", 16),
        segment_size=armt.get("segment_size", 512),
        segment_alignment=armt.get("segment_alignment", "left"),
        d_mem=0 if dialect == "rmt" else armt.get("d_mem", 512),
        nu=armt.get("nu", 3),
        heads=armt.get("n_heads", 1),
        use_denom=armt.get("use_denom", True),
        correction=armt.get("correction", True),
        gating=armt.get("gating", False),
        use_sink=armt.get("use_sink", False),
        sliding_window=armt.get("sliding_window", False),
        wrap_pos=armt.get("wrap_pos", False),
    )
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    faults = []
    if settings.dialect not in DIALECTS:
        faults.append(f"dialect: found {settings.dialect!r}, expected one of {DIALECTS}")
    if settings.segment_alignment not in ALIGNMENTS:
        faults.append(f"segment_alignment: found {settings.segment_alignment!r}")
    if settings.memory_tokens < 1:
        faults.append("num_mem_tokens: at least 1 is needed")
    if settings.segment_size < 1:
        faults.append("segment_size: at least 1 is needed")
    if settings.wrap_pos and settings.use_sink:
        faults.append("wrap_pos cannot be used together with a sink")
    if settings.heads < 1 or settings.d_mem % settings.heads:
        faults.append(f"d_mem {settings.d_mem} is not divisible by n_heads {settings.heads}")
    if not settings.modern and (
        settings.heads != 1 or settings.gating or settings.use_sink or not settings.use_denom
    ):
        faults.append(
            f"dialect {settings.dialect}: heads, gating, sink, use_denom=false are modern only"
        )
    if settings.inner and (settings.segment_alignment != "left" or settings.wrap_pos):
        faults.append("the inner loop needs left alignment and no wrap_pos")
    if faults:
        raise ValueError("; ".join(faults))
