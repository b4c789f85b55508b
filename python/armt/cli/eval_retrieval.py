"""``armt eval retrieval``: how many pairs a model remembers, and for how long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from armt.cli import eval_plot
from armt.cli.eval_run import (
    Batch,
    CompareTorch,
    Out,
    Place,
    Samples,
    Seed,
    System,
    Torch,
    counting,
    score_of,
    start,
)
from armt.cli.options import Device, DType, Json, Model, Threads

if TYPE_CHECKING:
    from armt.tasks.journal import Journal
    from armt.tasks.retrieval import Layout, Trial

COLUMNS = {
    "kind": lambda row: row["kind"],
    "pairs": lambda row: f"{row['pairs']:,}",
    "keys": lambda row: f"{row.get('keys', row['pairs']):,}",
    "filler": lambda row: f"{row['filler']:,}",
}


def retrieval(
    model: Model,
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            metavar="KIND",
            help="remember: every key once; rewrite: keys come again, the newest value counts; "
            "all: the curves of both, and pairs held through filler.",
        ),
    ] = "remember",
    pairs: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of pairs to read; updates in rewrite.")
    ] = "10,50,100",
    keys: Annotated[
        str, typer.Option(metavar="N,N,...", help="rewrite: so many different keys.")
    ] = "10",
    filler: Annotated[
        str,
        typer.Option(metavar="N,N,...", help="Segments of filler before the question."),
    ] = "0",
    samples: Samples = 256,
    questions: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Questions behind each sample: more answers for less reading. The intervals take "
            "them as independent.",
        ),
    ] = 1,
    seed: Seed = 0,
    batch: Batch = 0,
    out: Out = None,
    system: System = "auto",
    torch: Torch = False,
    compare_torch: CompareTorch = False,
    device: Device = "auto",
    dtype: DType = "auto",
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Reads pairs of key and value, one a segment, then asks for the value of one key.

    For models trained on this task; samples are made on the spot. The layout of the tokens is that
    of the object "retrieval" in the model's config.json. With --kind all the sizes are
    remember 1 to 200 pairs, rewrite 50 to 5,000 times over 10 and 50 keys, and 50 pairs held
    through up to 10,000 segments of filler: a matter of minutes on a GPU.

    Example:

    \b
      armt eval retrieval my-model --kind rewrite --keys 10,50 --pairs 50,500,5000 --out rewrite/
    """
    from armt.tasks import retrieval as task

    numbers = {
        name: _numbers(text, f"--{name}", least)
        for name, text, least in (("pairs", pairs, 1), ("keys", keys, 1), ("filler", filler, 0))
    }
    place = Place(model, system, device, dtype, threads, torch, compare_torch)
    run = start(place, "retrieval", seed=seed, out=out, as_json=as_json)
    reader = run.subject.reader
    layout = task.Layout.of(run.subject.folder)
    layout.check(reader.segment_size, reader.vocab_size)
    trials = _trials(kind, numbers, layout)
    journal = run.journal()
    left = sum(
        trial.tokens(layout) * max(samples - _done(journal, trial, questions), 0)
        for trial in trials
    )
    with run.reading("pairs", left) as bar:
        for trial in trials:
            bar.relabel(_name(trial))
            task.evaluate(
                reader,
                layout,
                trial,
                samples=samples,
                questions=questions,
                seed=seed,
                batch=run.batch(batch, on_gpu=1024, on_cpu=64),
                journal=journal,
                other=run.other.reader if run.other else None,
                report=counting(bar),
            )
    rows = _rows(journal, layout)
    run.finish(journal, rows, COLUMNS, eval_plot.draw_retrieval)


def _rows(journal: Journal, layout: Layout) -> list[dict[str, Any]]:
    """The results of all cells, by kind and size."""
    from armt.tasks.retrieval import capacity

    rows = []
    for cell in journal.cells:
        score = score_of(journal, cell)
        row = dict(cell) | score.to_json()
        if cell["kind"] == "remember":
            row["capacity"] = capacity(cell["pairs"], score.accuracy, layout.alphabet)
        rows.append(row)
    return sorted(rows, key=lambda r: (r["kind"], r.get("keys", 0), r["filler"], r["pairs"]))


def _trials(kind: str, numbers: dict[str, list[int]], layout: Layout) -> list[Trial]:
    from armt.errors import InvalidArgument
    from armt.tasks.retrieval import Trial, curves

    if kind == "all":
        return curves(layout)
    if kind == "remember":
        trials = [
            Trial("remember", n, filler=f) for f in numbers["filler"] for n in numbers["pairs"]
        ]
    elif kind == "rewrite":
        trials = [
            Trial("rewrite", n, keys=k, filler=f)
            for k in numbers["keys"]
            for f in numbers["filler"]
            for n in numbers["pairs"]
        ]
    else:
        raise InvalidArgument(f"--kind: found {kind}, expected remember, rewrite or all")
    for trial in trials:
        trial.check(layout)
    return trials


def _name(trial: Trial) -> str:
    keys = f" over {trial.keys} keys" if trial.kind == "rewrite" else ""
    filler = f", then {trial.filler:,} filler" if trial.filler else ""
    return f"{trial.kind} {trial.pairs:,}{keys}{filler}"


def _done(journal: Journal, trial: Trial, questions: int) -> int:
    return len(journal.of(trial.cell() | {"questions": questions})) // questions


def _numbers(text: str, option: str, least: int) -> list[int]:
    from armt.errors import InvalidArgument

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) >= least for part in parts):
        raise InvalidArgument(f"{option}: found {text!r}, expected whole numbers such as 10,50")
    return [int(part) for part in parts]
