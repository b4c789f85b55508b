"""The plots of ``armt eval``, and ``armt eval plot``."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Row = Mapping[str, Any]
Point = tuple[float, float, float, float]
Folders = Annotated[
    list[Path],
    typer.Argument(metavar="FOLDER...", help="What armt eval ... --out wrote.", show_default=False),
]


def plot(
    folders: Folders,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the plots go.")] = Path("."),
) -> None:
    """Draws the results of several runs together: one line for each system or model.

    Example:

    \b
      armt eval plot results/armt results/rmt results/mamba --out plots/
    """
    from armt.errors import InvalidArgument

    found = [_results(folder) for folder in folders]
    tasks = sorted({facts["evaluation"] for facts in found})
    if len(tasks) > 1:
        raise InvalidArgument(f"plot: found results of {' and '.join(tasks)}, expected one of them")
    out.mkdir(parents=True, exist_ok=True)
    names = [facts["system"] for facts in found]
    if len(set(names)) < len(names):
        names = [folder.resolve().name for folder in folders]
    rows = list(zip(names, (facts["results"] for facts in found), strict=True))
    drawn = _babilong(rows, out) if tasks == ["babilong"] else _retrieval(rows, out)
    print("\n".join(str(out / name) for name in drawn))


def draw_babilong(facts: Row, rows: Sequence[Row], folder: Path) -> list[str]:
    """Accuracy by task and length, by length alone, and by where the fact stands; file names."""
    from armt.tasks import plots

    title = _title(facts)
    plots.heat_map(rows, folder / "accuracy.png", title=title)
    drawn = ["accuracy.png"]
    if any(row["depths"] for row in rows if row["length"]):
        several = ", all tasks" if len({row["task"] for row in rows}) > 1 else ""
        plots.depth_map(rows, folder / "positions.png", title=title + several)
        drawn.append("positions.png")
    if len({row["length"] for row in rows} - {0}) > 1:
        tasks = sorted({str(row["task"]) for row in rows})
        lines = {
            task: [_point(row, "length") for row in rows if row["task"] == task and row["length"]]
            for task in tasks
        }
        plots.curves(
            lines, folder / "lengths.png", title=title, across="tokens of a sample", named=True
        )
        drawn.append("lengths.png")
    return drawn


def draw_retrieval(facts: Row, rows: Sequence[Row], folder: Path) -> list[str]:
    """The curves of remember, rewrite and filler; file names."""
    return _retrieval([("", rows)], folder, title=f"{_title(facts)}, ")


def _title(facts: Row) -> str:
    return f"{Path(facts['model']).name} ({facts['system']})"


def _babilong(runs: Sequence[tuple[str, Sequence[Row]]], folder: Path) -> list[str]:
    """One plot a task, one line a run."""
    from armt.tasks import plots

    drawn = []
    for task in sorted({str(row["task"]) for _, rows in runs for row in rows}):
        lines = {
            name: [_point(r, "length") for r in rows if r["task"] == task and r["length"]]
            for name, rows in runs
        }
        lines = {name: points for name, points in lines.items() if points}
        if lines:
            drawn.append(f"babilong-{task}.png")
            plots.curves(
                lines,
                folder / drawn[-1],
                title=f"BABILong {task.upper()}",
                across="tokens of a sample",
                named=True,
            )
    return drawn


def _retrieval(
    runs: Sequence[tuple[str, Sequence[Row]]], folder: Path, title: str = ""
) -> list[str]:
    """A plot each for pairs remembered, values rewritten, and filler outlasted."""
    from armt.tasks import plots

    lines: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    held: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, rows in runs:
        mark = f"{name}, " if name else ""
        for row in rows:
            if row["kind"] == "rewrite" and not row["filler"]:
                lines["rewrite"][f"{mark}{row['keys']} keys"].append(_point(row, "pairs"))
            elif row["kind"] == "remember" and not row["filler"]:
                lines["remember"][name].append(_point(row, "pairs"))
                held[name].append((row["pairs"], row["capacity"]))
            if row["filler"]:
                what = "pairs" if row["kind"] == "remember" else f"updates of {row['keys']} keys"
                lines["filler"][f"{mark}{row['pairs']} {what}"].append(_point(row, "filler"))
    across = {
        "remember": "pairs, each key once",
        "rewrite": "updates of the keys",
        "filler": "segments of filler between the pairs and the question",
    }
    for part, found in lines.items():
        plots.curves(found, folder / f"{part}.png", title=title + part, across=across[part])
    drawn = [f"{part}.png" for part in lines]
    if held:
        plots.capacities(held, folder / "capacity.png", title=f"{title}capacity")
        drawn.append("capacity.png")
    return drawn


def _point(row: Row, size: str) -> Point:
    low, high = row["interval"]
    return float(row[size]), float(row["accuracy"]), float(low), float(high)


def _results(folder: Path) -> dict[str, Any]:
    from armt.errors import InvalidArgument

    path = folder / "results.json"
    if not path.is_file():
        raise InvalidArgument(f"{path}: no such file, expected what armt eval ... --out wrote")
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if (
            found["evaluation"] in ("babilong", "retrieval")
            and found["results"]
            and found["system"]
        ):
            return found
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(f"{path}: {error!r}; expected results of armt eval") from error
    raise InvalidArgument(f"{path}: found no results of retrieval or babilong")
