"""What the commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LINE_LIMIT = 600
NARROWEST = 80
"""Columns that a table may take anywhere."""
WIDEST = 200


def one_line(message: str) -> str:
    """A message of several lines as one, cut where it gets very long."""
    line = " ".join(part.strip() for part in message.split("\n") if part.strip())
    return line if len(line) <= LINE_LIMIT else line[:LINE_LIMIT] + " ... (--json shows all)"


def print_error(message: str, *, as_json: bool, kind: str = "") -> None:
    """One line on standard error; with ``as_json`` also an object with the whole message."""
    if as_json:
        print_json({"error": {"type": kind, "message": message}})
    print(f"armt: {one_line(message)}", file=sys.stderr, flush=True)


def print_json(result: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    print(json.dumps(result, ensure_ascii=False), flush=True)


def console() -> Console:
    """Standard output for people; without colour in a pipe. Tables are never cut to fit a very
    narrow terminal: their lines wrap there."""
    from rich.console import Console

    width = max(Console().width, NARROWEST)
    return Console(highlight=False, soft_wrap=False, width=width)


def print_table(table: Table) -> None:
    """A table as wide as it needs to be."""
    from rich.measure import Measurement

    out = console()
    wide = Measurement.get(out, out.options.update(width=WIDEST), table).maximum
    out.width = max(out.width, wide)
    out.print(table)


def say(message: str) -> None:
    """A line for people on standard error."""
    print(message, file=sys.stderr, flush=True)


def size(count: float) -> str:
    """Bytes for people: "139 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "bytes" or count >= 10 else f"{count:,.1f} {unit}"
