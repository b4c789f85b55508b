"""``armt eval babilong``: facts hidden in books, and questions about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
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
    from armt.tasks.stories import Item

COLUMNS = {"task": lambda row: row["task"], "tokens": lambda row: f"{row['length']:,}"}
SHORTEST = 128
"""Tokens that a sample of length 0 counts on the bar."""


def babilong(
    model: Model,
    lengths: Annotated[
        str, typer.Option(metavar="L,L,...", help="Tokens of a sample: 0, 512, 4k, 1M ...")
    ] = "1k,4k,16k",
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A bAbI file, or the folder of the bAbI test files."),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option("--tasks", "--task", metavar="TASK,...", help="qa1 .. qa5, or all of them."),
    ] = "qa1",
    book: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text to hide the facts in (also .xz, .gz); repeat."),
    ] = None,
    samples: Samples = 32,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Longest answer; its room in a sample. [default: what the model says, or 8]",
        ),
    ] = None,
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
    """Hides bAbI facts between the sentences of books, and asks; exact match of the answer.

    Samples are streamed: a text of 50M tokens is never in memory. Without --data the stories are
    made on the spot, without --book the text is: good for a first look, not for a comparison with
    published figures.

    Example:

    \b
      armt eval babilong demo --data babi/ --tasks qa1 --book books.txt --lengths 1k,32k,1M
    """
    from armt.tasks import babilong as job
    from armt.tasks.background import Book, read_sentences
    from armt.tasks.lengths import parse_length
    from armt.text import TextSettings, Tokenizer

    sizes = [parse_length(part) for part in lengths.split(",")]
    items = _items(data, tasks, seed)
    place = Place(model, system, device, dtype, threads, torch, compare_torch)
    run = start(place, "babilong", seed=seed, out=out, as_json=as_json)
    subject = run.subject
    tokenizer = Tokenizer(subject.tokenizer)
    settings = TextSettings.of(subject.folder)
    haystack = Book(_sentences(book, read_sentences), tokenizer)
    room = max_new_tokens or subject.answer_tokens
    run.facts |= {
        "data": data.resolve().name if data else "made on the spot",
        "book": ", ".join(file.name for file in book) if book else "made on the spot",
        "max_new_tokens": room,
    }
    journal = run.journal()
    makers = {
        name: job.Maker(found, haystack, tokenizer, settings, room, seed)
        for name, found in items.items()
    }
    cells: list[dict[str, Any]] = [{"task": t, "length": n} for n in sizes for t in items]
    left = [max(c["length"], SHORTEST) * max(samples - len(journal.of(c)), 0) for c in cells]
    with run.reading("samples", sum(left)) as bar:
        for cell in cells:
            bar.relabel(f"{cell['task']}, length {cell['length']:,}")
            job.evaluate(
                subject.reader,
                makers[cell["task"]],
                cell=cell,
                length=cell["length"],
                samples=samples,
                batch=run.batch(batch, on_gpu=256, on_cpu=16),
                stop_ids=subject.stop_ids,
                journal=journal,
                other=run.other.reader if run.other else None,
                report=counting(bar),
            )
    run.finish(journal, _rows(journal), COLUMNS, eval_plot.draw_babilong)


def _rows(journal: Journal) -> list[dict[str, Any]]:
    """The results of all cells, by task and length."""
    from armt.cli.eval_output import by_part
    from armt.tasks.plots import DEPTHS

    rows = [
        dict(cell)
        | score_of(journal, cell).to_json()
        | {"depths": by_part(journal.of(cell), DEPTHS)}
        for cell in journal.cells
    ]
    return sorted(rows, key=lambda row: (row["task"], row["length"]))


def _items(data: Path | None, tasks: str, seed: int) -> dict[str, Sequence[Item]]:
    """The items of each task."""
    from armt.errors import InvalidArgument
    from armt.tasks.babi import TASKS, find_file, generate_many, read_items

    names = list(TASKS) if tasks == "all" else [name.strip() for name in tasks.split(",")]
    for name in names:
        if name not in TASKS:
            raise InvalidArgument(
                f"--tasks: found {name!r}, expected some of {', '.join(TASKS)}, or all"
            )
    if data is None:
        return {name: generate_many(name, 1000, seed) for name in names}
    if not data.is_dir() and len(names) > 1:
        raise InvalidArgument(f"--data: found one file for {len(names)} tasks, expected a folder")
    return {name: read_items(find_file(data, name)) for name in names}


def _sentences(books: list[Path] | None, read: Callable[[Path], list[str]]) -> list[str]:
    from armt.tasks.babi import make_sentences

    return [s for book in books for s in read(book)] if books else make_sentences()
