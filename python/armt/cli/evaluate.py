"""``armt eval``: how well a model remembers, answers and predicts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from armt.cli.options import Device, DType, Json, Model, Threads

if TYPE_CHECKING:
    from armt.cli.bar import ReadingBar
    from armt.engine import Engine
    from armt.tasks.babi import Problem
    from armt.tasks.babilong import Answer
    from armt.tasks.scores import Score

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measures a model: what it remembers, answers and predicts.\n\n"
    "Example:\n\n\b\n  armt eval babilong demo --lengths 1k,4k,16k",
)

Samples = Annotated[int, typer.Option(min=1, metavar="N", help="Samples of each size.")]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Another seed: other samples.")]


@app.command("retrieval", short_help="Pairs of key and value: which value had this key?")
def retrieval(
    model: Model,
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="remember: every key once; rewrite: keys come again, the newest value counts.",
        ),
    ] = "remember",
    pairs: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of pairs to read.")
    ] = "10,50,100",
    keys: Annotated[
        int, typer.Option(min=1, metavar="N", help="rewrite: so many different keys.")
    ] = 10,
    filler: Annotated[
        int, typer.Option(min=0, metavar="N", help="Segments of filler before the question.")
    ] = 0,
    samples: Samples = 256,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DType = "auto",
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Reads pairs of key and value, one a segment, then asks for the value of one key.

    For models trained on this task; samples are made on the spot. The layout of the tokens is that
    of the object "retrieval" in the model's config.json.

    Example:

    \b
      armt eval retrieval my-model --kind rewrite --keys 50 --pairs 50,500,5000
    """
    from armt.cli.bar import ReadingBar
    from armt.tasks import retrieval as task

    sizes = [_whole(part, "--pairs") for part in pairs.split(",")]
    engine = _engine(model, device, dtype, threads, as_json)
    layout = task.Layout.of(engine.checkpoint.folder)
    layout.check(engine)
    total = sum(task.tokens_of(layout, n, filler) * samples for n in sizes)
    rows = []
    with ReadingBar("pairs", total=total, shown=not as_json) as bar:
        for n in sizes:
            bar.relabel(f"{n:,} pairs")
            score = task.evaluate(
                engine,
                kind=kind,  # type: ignore[arg-type]
                pairs=n,
                samples=samples,
                pool=keys,
                filler=filler,
                seed=seed,
                report=_counting(bar),
            )
            row: dict[str, Any] = {"pairs": n} | score.to_json()
            if kind == "remember":
                row["capacity"] = task.capacity(n, score.accuracy, layout.alphabet)
            rows.append((f"{n:,}", score, row))
    facts = {"task": f"retrieval-{kind}", "filler": filler, "seed": seed}
    if kind == "rewrite":
        facts["keys"] = keys
    _show(engine, model, facts, "pairs", rows, as_json=as_json)


@app.command("babilong", short_help="Facts hidden in books: questions about them.")
def babilong(
    model: Model,
    lengths: Annotated[
        str, typer.Option(metavar="L,L,...", help="Tokens of a sample: 0, 512, 4k, 1M ...")
    ] = "1k,4k,16k",
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A bAbI file, or the folder of the bAbI test files."),
    ] = None,
    task: Annotated[
        str, typer.Option(metavar="TASK", help="qa1 .. qa5, the file to take from a folder.")
    ] = "qa1",
    book: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text to hide the facts in (also .xz, .gz); repeat."),
    ] = None,
    samples: Samples = 32,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Longest answer; its room in a sample.")
    ] = 8,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Samples side by side.")] = 8,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every answer as a line of JSON.")
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Hides bAbI facts between the sentences of books, and asks; exact match of the answer.

    Without --data the facts of task qa1 are made on the spot, without --book the text is: good for
    a first look, not for a comparison with published figures.

    Example:

    \b
      armt eval babilong demo --data babi/ --task qa1 --book books.txt --lengths 1k,32k,1M
    """
    from armt.cli.bar import ReadingBar
    from armt.cli.output import whole_file
    from armt.tasks import babilong as job
    from armt.tasks.babilong import Book, parse_length, read_sentences
    from armt.text import TextSettings, Tokenizer

    sizes = [parse_length(part) for part in lengths.split(",")]
    problems, source = _problems(data, task, seed)
    engine = _engine(model, device, dtype, threads, as_json)
    tokenizer = Tokenizer(engine.checkpoint.tokenizer or engine.checkpoint.folder)
    haystack = Book(_sentences(book, read_sentences), tokenizer)
    rows: list[tuple[str, Score, dict[str, Any]]] = []
    answers: list[Answer] = []
    with ExitStack() as stack:
        path = stack.enter_context(whole_file(out)) if out is not None else None
        total = sum(max(size, 128) * samples for size in sizes)
        bar = stack.enter_context(ReadingBar("samples", total=total, shown=not as_json))
        for size in sizes:
            bar.relabel(f"length {size:,}")
            score, found = job.evaluate(
                engine,
                tokenizer,
                TextSettings.of(engine.checkpoint.folder),
                problems=problems,
                book=haystack,
                length=size,
                samples=samples,
                seed=seed,
                batch=batch,
                max_new_tokens=max_new_tokens,
                report=_counting(bar),
            )
            rows.append((f"{size:,}", score, {"length": size} | score.to_json()))
            answers += found
        bar.update(total, bar.tokens)
        if path is not None:
            with path.open("w", encoding="utf-8") as file:
                _write_answers(file, answers)
    text = [str(file) for file in book] if book else "made on the spot"
    facts = {"task": f"babilong-{task}", "data": source, "book": text, "seed": seed}
    _show(engine, model, facts, "tokens", rows, as_json=as_json)


@app.command("perplexity", short_help="How well every token of a text is predicted.")
def perplexity(
    model: Model,
    data: Annotated[Path, typer.Option(metavar="FILE", help="A UTF-8 text; - is standard input.")],
    limit: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Stop after so many tokens.")
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Predicts every token of a text from all before it, in one streaming pass.

    Example:

    \b
      armt eval perplexity my-model --data book.txt
    """
    from armt.cli.bar import ReadingBar
    from armt.cli.output import print_json
    from armt.cli.run import open_source, source_size
    from armt.tasks import perplexity as job
    from armt.text import TextSettings, Tokenizer, open_text, pieces

    with ExitStack() as stack:
        source = open_source(str(data), stack)
        engine = _engine(model, device, dtype, threads, as_json)
        tokenizer = Tokenizer(engine.checkpoint.tokenizer or engine.checkpoint.folder)
        settings = TextSettings.of(engine.checkpoint.folder)
        total = limit or source_size(source)
        bar = stack.enter_context(ReadingBar("scoring", total=total, shown=not as_json))
        read_bytes = 0

        def counted(text: Iterable[str]) -> Iterable[str]:
            nonlocal read_bytes
            for piece in text:
                read_bytes += len(piece.encode())
                yield piece

        def report(found: job.Perplexity) -> None:
            done = found.tokens if limit else (source.tell() if source.seekable() else 0)
            bar.update(done, found.tokens)

        text = open_text(source)
        stream = tokenizer.encode_stream(counted(settings.prepared(pieces(text))), specials=True)
        found = job.evaluate(engine.session(), _limited(stream, limit), report)
        text.detach()
    facts = {"task": "perplexity", "model": model, "data": str(data)} | _facts(engine)
    result = facts | found.to_json()
    if limit is None:
        result["bits_per_byte"] = found.bits_per_token * found.scored / max(read_bytes, 1)
    if as_json:
        print_json(result)
        return
    print(f"perplexity   {found.perplexity:,.2f} a token, {found.bits_per_token:.3f} bits")
    if limit is None:
        print(f"             {result['bits_per_byte']:.3f} bits a byte of text as read")
    print(f"read         {found.tokens:,} tokens, {result['tokens_per_second']:,.0f} tokens/s")


def _problems(data: Path | None, task: str, seed: int) -> tuple[Sequence[Problem], str]:
    from armt.errors import InvalidArgument
    from armt.tasks.babi import TASKS, find_file, make_problems, read_problems

    if task not in TASKS:
        raise InvalidArgument(f"--task: found {task}, expected one of {', '.join(TASKS)}")
    if data is not None:
        file = find_file(data, task)
        return read_problems(file), str(file)
    if task != "qa1":
        raise InvalidArgument(f"--task {task} needs --data: only qa1 is made on the spot")
    return make_problems(1000, seed), "made on the spot"


def _sentences(books: list[Path] | None, read: Callable[[Path], list[str]]) -> list[str]:
    from armt.tasks.babi import make_sentences

    return [s for book in books for s in read(book)] if books else make_sentences(20_000)


def _write_answers(file: TextIO, answers: Iterable[Answer]) -> None:
    from dataclasses import asdict

    for answer in answers:
        line = asdict(answer) | {"right": answer.right}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _limited(stream: Iterable[Any], limit: int | None) -> Iterable[Any]:
    left = limit
    for ids in stream:
        part = ids if left is None else ids[:left]
        if len(part):
            yield part
        if left is not None:
            left -= len(part)
            if left == 0:
                return


def _whole(text: str, option: str) -> int:
    from armt.errors import InvalidArgument

    if not text.strip().isdigit() or int(text) == 0:
        raise InvalidArgument(f"{option}: found {text!r}, expected whole numbers such as 10,50")
    return int(text)


def _engine(model: str, device: str, dtype: str, threads: int, as_json: bool) -> Engine:
    from armt.cli.options import load_engine, where
    from armt.cli.output import say

    engine = load_engine(model, device=device, dtype=dtype, threads=threads)
    if not as_json:
        say(f"model {model} on {where(engine)}")
    return engine


def _facts(engine: Engine) -> dict[str, Any]:
    return {"device": engine.device, "description": engine.description, "dtype": engine.dtype}


def _counting(bar: ReadingBar) -> Callable[[int], None]:
    """Moves the bar on from where it stands."""
    before = bar.tokens
    return lambda n: bar.update(before + n, before + n)


def _show(
    engine: Engine,
    model: str,
    facts: dict[str, Any],
    unit: str,
    rows: Sequence[tuple[str, Score, dict[str, Any]]],
    *,
    as_json: bool,
) -> None:
    """The results as a table, or as one object with a list of them."""
    from rich import box
    from rich.table import Table

    from armt.cli.output import console, print_json

    if as_json:
        results = [row for _, _, row in rows]
        print_json(facts | {"model": model} | _facts(engine) | {"results": results})
        return
    table = Table(
        title=facts["task"], title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    for name in (unit, "right", "accuracy", "95% interval", "tokens/s", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for size, score, _ in rows:
        low, high = score.interval
        table.add_row(
            size,
            f"{score.right} of {score.samples}",
            f"{score.accuracy:.1%}",
            f"{low:.1%} .. {high:.1%}",
            f"{score.tokens / max(score.seconds, 1e-9):,.0f}",
            f"{score.seconds:,.1f}",
        )
    console().print(table)
