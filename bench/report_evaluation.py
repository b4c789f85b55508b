"""Tables of docs/results.md and of the model cards, from bench/results/evaluation/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tables import load, table

LONG = 1_000_000
"""Tokens from which on forgetting shows."""


def right(row: dict[str, Any]) -> list[str]:
    low, high = row["interval"]
    return [
        f"{row['right']:,} of {row['samples']:,}",
        f"{row['accuracy']:.1%}",
        f"{low * 100:.1f} .. {high:.1%}",
    ]


def about(found: dict[str, Any]) -> str:
    """Where and on what it was measured."""
    on = found["environment"]
    note = f" {found['note']}" if "note" in found else ""
    machine = on["place"] if "place" in on else f"{on['cpu']}, {on['usable_cores']} cores"
    return (
        f"Weights {found['fingerprint']}; {found['implementation']}, {found['dtype']}, on "
        f"{machine}; commit {on['commit'][:7]}.{note}"
    )


def notes(found: list[dict[str, Any]]) -> str:
    """The same of several systems."""
    return "\n".join(f"{one['system'].upper()}: {about(one)}" for one in found)


def babilong_table(name: str) -> str:
    found = load(f"evaluation/{name}")
    rows = [
        [row["task"].upper(), f"{row['length']:,}", *right(row), f"{row['seconds']:,.1f} s"]
        for row in sorted(found["results"], key=_cell)
    ]
    head = ["task", "tokens", "right", "accuracy", "95% interval", "time"]
    return table(head, rows) + "\n\n" + about(found)


def told(row: dict[str, Any]) -> str:
    pairs = f"{row['pairs']:,} pairs" if row["kind"] == "remember" else ""
    updates = pairs or f"{row['pairs']:,} updates of {row['keys']} keys"
    filler = f", then {row['filler']:,} segments of filler" if row["filler"] else ""
    return updates + filler


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of retrieval: from little to much."""
    return sorted(rows, key=lambda r: (r["filler"], r["kind"], r.get("keys", 0), r["pairs"]))


def retrieval_table() -> str:
    found = load("evaluation/retrieval")
    head = ["read", "right", "accuracy", "95% interval"]
    rows = [[told(row), *right(row)] for row in in_order(found["results"])]
    return table(head, rows) + "\n\n" + about(found)


def comparison_table() -> str:
    """Cells that both systems have."""
    armt, rmt = (
        [load(f"evaluation/compare-babilong-{system}{more}") for more in ("", "-1M")]
        for system in ("armt", "rmt")
    )
    cells, others = (
        {_cell(row): row for one in two for row in one["results"]} for two in (armt, rmt)
    )
    rows = [
        [cell[0].upper(), f"{cell[1]:,}", right(cells[cell])[0], right(others[cell])[0]]
        for cell in sorted(cells.keys() & others.keys())
    ]
    return table(["task", "tokens", "ARMT", "RMT"], rows) + "\n\n" + notes([*armt, *rmt])


def retrieval_comparison_table() -> str:
    systems = ("armt", "mamba", "rmt")
    found = [load(f"evaluation/compare-retrieval-{system}") for system in systems]
    cells = [{told(row): right(row)[0] for row in one["results"]} for one in found]
    rows = [
        [told(row), *(one[told(row)] for one in cells)] for row in in_order(found[0]["results"])
    ]
    return table(["read", "ARMT", "Mamba", "RMT"], rows) + "\n\n" + notes(found)


def forgetting_table() -> str:
    """The long rows of one model after each of its last stages."""
    stages = {
        "before": "babilong_before_decoys",
        "decoys": "babilong_before_namesakes",
        "namesakes": "babilong_before_gates",
        "steeper gates, float16": "babilong",
    }
    found = [
        {_cell(row): right(row)[0] for row in load(f"evaluation/{name}")["results"]}
        for name in stages.values()
    ]
    rows = [
        [cell[0].upper(), f"{cell[1]:,}", *(one.get(cell, "") for one in found)]
        for cell in sorted(set().union(*found))
        if cell[1] >= LONG
    ]
    return table(["task", "tokens", *stages], rows)


def _cell(row: dict[str, Any]) -> tuple[str, int]:
    return row["task"], row["length"]


def training_table() -> str:
    found = load("training")
    rows = []
    for name, one in found.items():
        said = ", ".join(
            f"{kind.replace('qa', 'QA')} {share:.1%}"
            for kind, share in one["last"]["right"].items()
            if kind not in ("end", "who")
        )
        steps, million = f"{one['steps']:,}", f"{one['tokens'] / 1e6:,.0f} M"
        rows.append([name, steps, million, f"{one['seconds']:,.0f} s", said])
    head = ["training", "steps", "tokens", "time", "questions answered at its end"]
    places = "; ".join(f"*{name}*: {one['machine']}" for name, one in found.items())
    return table(head, rows) + "\n\n" + f"On {places}."


SECTIONS: dict[str, Callable[[], str]] = {
    "babilong": lambda: babilong_table("babilong"),
    "babilong-cpu": lambda: babilong_table("babilong_cpu"),
    "forgetting": forgetting_table,
    "retrieval": retrieval_table,
    "comparison": comparison_table,
    "retrieval-comparison": retrieval_comparison_table,
    "training": training_table,
}
