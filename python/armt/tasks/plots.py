"""Pictures of results; needs the extra "plots" (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from armt.errors import InvalidArgument
from armt.tasks.lengths import length_name

Row = Mapping[str, Any]
"""One cell's results, as in results.json."""
DEPTHS = 10
"""Parts of a sample by which the place of a fact is told."""
COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8a5fbf", "#c98a00", "#4d4d4d")
MARKERS = "osD^vP"


def available() -> bool:
    """Whether matplotlib is there."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def heat_map(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Accuracy by task (down) and length (across), as BABILong draws it."""
    tasks = sorted({str(row["task"]) for row in rows})
    lengths = sorted({int(row["length"]) for row in rows})
    grid = np.full((len(tasks), len(lengths)), np.nan)
    for row in rows:
        grid[tasks.index(row["task"]), lengths.index(row["length"])] = 100 * row["accuracy"]
    _grid(
        grid,
        [length_name(n) for n in lengths],
        [task.upper() for task in tasks],
        path,
        title=title,
        across="tokens of a sample",
        down="",
    )


def depth_map(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Accuracy by length (across) and by where the last needed fact stands in the sample (down)."""
    lengths = sorted({int(row["length"]) for row in rows} - {0})
    right = np.zeros((DEPTHS, len(lengths)))
    asked = np.zeros((DEPTHS, len(lengths)))
    for row in rows:
        for depth in row["depths"] if row["length"] else ():
            place = depth["part"], lengths.index(row["length"])
            right[place] += depth["right"]
            asked[place] += depth["samples"]
    with np.errstate(invalid="ignore"):
        grid = 100 * right / asked
    step = 100 // DEPTHS
    _grid(
        grid,
        [length_name(n) for n in lengths],
        [f"{i * step} to {(i + 1) * step}%" for i in range(DEPTHS)],
        path,
        title=title,
        across="tokens of a sample",
        down="where the last needed fact stands",
    )


def curves(
    lines: Mapping[str, Sequence[tuple[float, float, float, float]]],
    path: Path,
    *,
    title: str,
    across: str,
    named: bool = False,
) -> None:
    """Lines of (size, accuracy, low, high) over a logarithmic axis, with their 95% intervals.

    ``named``: sizes are lengths in tokens, written as 4k or 1M.
    """
    figure, axes = _figure(7.2, 4.4)
    sizes = sorted({point[0] for points in lines.values() for point in points})
    for i, (name, points) in enumerate(lines.items()):
        x, y, low, high = (np.array(column, float) for column in zip(*sorted(points), strict=True))
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(x, 100 * y, color=colour, marker=marker, markersize=5, label=name)
        axes.fill_between(x, 100 * low, 100 * high, color=colour, alpha=0.15, linewidth=0)
    if min(sizes) > 0 and max(sizes) > 5 * min(sizes):
        axes.set_xscale("log")
        axes.set_xticks(_thinned(sizes))
        axes.minorticks_off()
    else:
        axes.set_xticks(sizes)
    axes.set_xticklabels(
        [length_name(int(n)) if named else f"{int(n):,}" for n in axes.get_xticks()]
    )
    axes.set_ylim(0, 103)
    axes.set_ylabel("accuracy, % (95% interval)")
    axes.set_xlabel(across)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    _save(figure, path)


def capacities(
    lines: Mapping[str, Sequence[tuple[float, float]]], path: Path, *, title: str
) -> None:
    """Lines of (pairs read, pairs that the memory must hold to answer so well)."""
    figure, axes = _figure(7.2, 4.4)
    most = max(read for points in lines.values() for read, _ in points)
    axes.plot([0, most], [0, most], color="#999999", linestyle=":", label="all of them")
    for i, (name, points) in enumerate(lines.items()):
        x, y = zip(*sorted(points), strict=True)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(x, y, color=colour, marker=marker, markersize=5, label=name or "held")
    axes.set_xlabel("pairs, each key once")
    axes.set_ylabel("pairs held, by the estimate n (v a - 1) / (v - 1)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    _save(figure, path)


def _thinned(sizes: Sequence[float]) -> list[float]:
    """Sizes far enough apart for their names, the last one always."""
    reach = np.log(sizes[-1] / sizes[0]) / 14
    kept = [sizes[-1]]
    for size in reversed(sizes[:-1]):
        if np.log(kept[-1] / size) >= reach:
            kept.append(size)
    return kept[::-1]


def _grid(
    grid: Any,
    columns: Sequence[str],
    rows: Sequence[str],
    path: Path,
    *,
    title: str,
    across: str,
    down: str,
) -> None:
    """Percentages in coloured cells; empty ones stay white."""
    figure, axes = _figure(1.9 + 0.72 * len(columns), 1.5 + 0.42 * len(rows))
    axes.imshow(np.ma.masked_invalid(grid), cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    for (i, j), value in np.ndenumerate(grid):
        if np.isfinite(value):
            light = 15 < value < 88
            axes.text(j, i, f"{value:.0f}", ha="center", va="center",
                      color="black" if light else "white", fontsize=9)  # fmt: skip
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidArgument(
            'plots need the package "matplotlib", which is not installed: '
            'run pip install "armt[plots]"'
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
