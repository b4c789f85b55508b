"""What trained models answer, and how they were trained: from folders into bench/results/.

    python bench/evaluation.py answers NAME FOLDER... [--machine TEXT --commit ID] [--note TEXT]
    python bench/evaluation.py training NAME FOLDER --machine TEXT --commit ID [--note TEXT]

FOLDER is what ``armt eval --out`` wrote, or ``armt train``. Answers go to evaluation/NAME.json with
the machine they were measured on (this one, where nothing else is said); a cell that is in several
folders is taken from the last one. Trainings go to training.json under NAME, with their curves.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from harness import environment
from tables import RESULTS

CELL = ("task", "kind", "length", "pairs", "keys", "filler", "questions")
ABOUT = (
    "evaluation",
    "system",
    "seed",
    "implementation",
    "device",
    "description",
    "dtype",
    "fingerprint",
    "data",
    "book",
    "compared",
)
KEPT = (*CELL, "right", "samples", "accuracy", "interval", "tokens", "seconds")
POINTS = 40


def answers(name: str, folders: list[Path], where: dict[str, str], note: str) -> None:
    found = [json.loads((folder / "results.json").read_text()) for folder in folders]
    heads = [{key: one[key] for key in ABOUT if key in one} for one in found]
    if any(head["fingerprint"] != heads[0]["fingerprint"] for head in heads):
        raise SystemExit(f"{name}: the folders are of different models")
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in found:
        for row in one["results"]:
            cell = tuple(row.get(key) for key in CELL)
            cells[cell] = {key: row[key] for key in KEPT if row.get(key) is not None}
    rows = sorted(cells.items(), key=lambda item: tuple(str(v).rjust(12) for v in item[0]))
    about = heads[0] | {"model": name, "environment": where or environment()}
    if note:
        about["note"] = note
    target = RESULTS / "evaluation" / f"{name}.json"
    target.write_text(json.dumps(about | {"results": [row for _, row in rows]}, indent=1) + "\n")
    print(target)


def training(name: str, folder: Path, machine: str, commit: str, note: str) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((folder / "config.json").read_text())
    seconds, tokens, before = 0.0, 0, lines[0]
    for line in lines:  # each process counts from 0
        if line["seconds"] < before["seconds"]:
            seconds += before["seconds"]
            tokens += before["tokens"]
        before = line
    every = max(len(lines) // POINTS, 1)
    target = RESULTS / "training.json"
    known = json.loads(target.read_text()) if target.exists() else {}
    known[name] = {
        "machine": machine,
        "commit": commit,
        "steps": config["training"]["steps"],
        "seconds": round(seconds + before["seconds"], 1),
        "tokens": tokens + before["tokens"],
        "last": {key: lines[-1][key] for key in ("step", "loss", "right")},
        "curve": [{key: one[key] for key in ("step", "stage", "right")} for one in lines[::every]],
    } | ({"note": note} if note else {})
    target.write_text(json.dumps(known, indent=1) + "\n")
    print(target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    one = jobs.add_parser("answers")
    one.add_argument("name")
    one.add_argument("folders", type=Path, nargs="+")
    other = jobs.add_parser("training")
    other.add_argument("name")
    other.add_argument("folder", type=Path)
    for job, needed in ((one, False), (other, True)):
        job.add_argument("--machine", required=needed)
        job.add_argument("--commit", required=needed)
        job.add_argument("--note", default="")
    given = parser.parse_args()
    if given.job == "answers":
        if bool(given.machine) != bool(given.commit):
            parser.error("--machine and --commit: expected both, or none")
        where = {"place": given.machine, "commit": given.commit} if given.machine else {}
        answers(given.name, given.folders, where, given.note)
    else:
        training(given.name, given.folder, given.machine, given.commit, given.note)


if __name__ == "__main__":
    main()
