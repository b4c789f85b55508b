"""``armt info``: what a checkpoint is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from armt.cli.options import Json, Model


def info(model: Model, as_json: Json = False) -> None:
    """Shows a checkpoint's geometry, dialect, parameters, and the bytes that a session takes.

    Example:

    \b
      armt info demo
    """
    from armt.checkpoint import describe, load_checkpoint
    from armt.cli.output import console, print_json
    from armt.models import resolve

    facts = describe(load_checkpoint(resolve(model)))
    if as_json:
        print_json(facts)
        return
    from rich.table import Table

    table = Table.grid(padding=(0, 3))
    for name, value in lines(facts):
        table.add_row(f"[bold]{name}[/bold]", value)
    console().print(table)


def lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The summary for people: names and values."""
    from rich.markup import escape

    from armt.cli.output import size

    weights, parameters, state = facts["weights"], facts["parameters"], facts["state"]
    yield "path", escape(str(facts["path"]))
    yield "files", escape(facts["origin"])
    yield "dialect", facts["dialect"]
    yield "segments", f"{facts['segment_size']:,} tokens, cut from the {facts['segment_alignment']}"
    yield (
        "parameters",
        f"{parameters['total']:,} ({parameters['memory']:,} of them of the memory)",
    )
    yield (
        "weights",
        f"{weights['dtype']}, {size(weights['bytes'])}"
        + (", LoRA merged" if weights["merged_lora"] else ""),
    )
    yield (
        "a session",
        f"{size(state['memory'])} of memory, however much it has read"
        + (f"; {size(state['window'])} of window" if state["window"] else "")
        + f"; up to {size(state['open_segment'])} for the open segment",
    )
    yield "tokenizer", escape(facts["tokenizer"] or "none: token ids only")
    yield "ends at", ", ".join(map(str, facts["eos_token_ids"])) or "no token"
    for part in ("geometry", "memory"):
        given = (f"{k} {_short(v)}" for k, v in facts[part].items() if k != "dialect")
        yield part, escape(", ".join(given))
    if facts["assumed"]:
        yield "assumed", escape(", ".join(facts["assumed"]))
    for note in facts["notes"]:
        yield "note", escape(note)


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
