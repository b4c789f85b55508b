"""What ``armt eval`` leaves: tables for people, and a folder of files and plots."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from armt.cli.output import print_json, print_table, say
from armt.files import whole_file

if TYPE_CHECKING:
    from armt.tasks.journal import Journal

Row = dict[str, Any]
FLAT = (str, int, float, bool)


def show(title: str, columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row]) -> None:
    """One table: what was measured (``columns``), and its score."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in (*columns, "right", "accuracy", "95% interval", "tokens/s", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        low, high = row["interval"]
        table.add_row(
            *(value(row) for value in columns.values()),
            f"{row['right']} of {row['samples']}",
            f"{row['accuracy']:.1%}",
            f"{low:.1%} .. {high:.1%}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['seconds']:,.1f}",
        )
    print_table(table)


def finish(
    facts: Row,
    results: Sequence[Row],
    out: Path | None,
    draw: Callable[[Row, Sequence[Row], Path], list[str]],
    *,
    as_json: bool,
) -> None:
    """The folder's files, and JSON on standard output where that is asked for."""
    if out is not None:
        from armt.tasks import plots

        write_files(out, facts, results)
        files = ["answers.jsonl", "results.csv", "results.json"]
        if plots.available():
            files += draw(facts, results, out)
        else:
            say('no plots: run pip install "armt[plots]", then the same command again')
        if not as_json:
            say(f"wrote {out}: {', '.join(files)}")
    if as_json:
        print_json(facts | {"results": list(results)})


def write_files(out: Path, facts: Mapping[str, Any], results: Sequence[Row]) -> None:
    """results.json with everything, results.csv with one line for each cell."""
    import json

    with whole_file(out / "results.json") as path:
        text = json.dumps(dict(facts) | {"results": list(results)}, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
    common = {name: value for name, value in facts.items() if isinstance(value, FLAT)}
    lines = [common | _flat(row) for row in results]
    names = list(dict.fromkeys(name for line in lines for name in line))
    with whole_file(out / "results.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)


def _flat(row: Row) -> Row:
    low, high = row["interval"]
    flat = {name: value for name, value in row.items() if isinstance(value, FLAT)}
    return flat | {"low": low, "high": high}


def by_part(answers: Sequence[Mapping[str, Any]], parts: int) -> list[Row]:
    """Right answers by the part of the sample in which the last needed fact stands."""
    counts: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for answer in answers:
        if answer["fact_at"] >= 0 and answer["tokens"]:
            part = min(parts * answer["fact_at"] // answer["tokens"], parts - 1)
            counts[part][0] += bool(answer["right"])
            counts[part][1] += 1
    return [
        {"part": part, "right": right, "samples": samples}
        for part, (right, samples) in sorted(counts.items())
    ]


def compared(journal: Journal) -> Row:
    """How many answers of two implementations agree, and those that do not."""
    from armt.tasks.comparing import is_tie

    shown = ("index", "key", "answer", "other", "gap", "other_gap")
    lines = [(cell, line) for cell in journal.cells for line in journal.of(cell) if "same" in line]
    differing = [
        dict(cell) | {name: line.get(name) for name in shown} | {"tie": is_tie(line)}
        for cell, line in lines
        if not line["same"]
    ]
    return {
        "answers": len(lines),
        "agree": len(lines) - len(differing),
        "ties": sum(bool(line["tie"]) for line in differing),
        "differing": differing,
    }


def show_compared(found: Row) -> None:
    """The comparison for people."""
    print(f"engine and PyTorch: {found['agree']:,} of {found['answers']:,} answers agree")
    for line in found["differing"]:
        what = ", ".join(f"{k} {v}" for k, v in line.items() if v is not None)
        print(f"  {what}")
    if found["differing"]:
        print(f"  {found['ties']} of {len(found['differing'])} differ by rounding only")
