"""``armt demo``: a trained memory reads a long stream and proves what it remembers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from armt.cli.options import Device, DType, Json, Threads

if TYPE_CHECKING:
    from armt.demo.exam import Result

COLUMNS = ("asked at", "question", "answer", "expected", "", "told, tokens ago")
NUMBERS = ("asked at", "told, tokens ago")


def demo(
    tokens: Annotated[
        int, typer.Option(min=1000, metavar="N", help="Length of the stream.")
    ] = 500_000,
    questions: Annotated[
        int, typer.Option(min=1, metavar="N", help="Asked on the way, four at a time.")
    ] = 16,
    moves: Annotated[
        int, typer.Option(min=0, metavar="N", help="How often somebody moves again.")
    ] = 24,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Another seed is another story.")
    ] = 0,
    device: Device = "auto",
    dtype: DType = "auto",
    threads: Threads = 0,
    as_json: Json = False,
) -> int:
    """Reads a long stream with a few facts in it, then asks where everybody is.

    The stream is book-like prose, made on the spot; here and there a sentence says where somebody
    went. The model (half a million weights, part of this package) reads it on the engine in
    constant memory and is asked on the way. For comparison the same questions go to the same
    model after the last segment alone. Exit code 0 if at least three answers in four are right; a
    guess has odds of one in six.

    Example:

    \b
      armt demo --tokens 1000000 --seed 7
    """
    from armt.cli.bar import ReadingBar
    from armt.cli.options import load_engine, where
    from armt.cli.output import console, print_json, say
    from armt.demo.exam import examine
    from armt.models import DEFAULT

    engine = load_engine(DEFAULT, device=device, dtype=dtype, threads=threads)
    if not as_json:
        say(f"model {DEFAULT} on {where(engine)}")
    with ReadingBar("reading", total=tokens, shown=not as_json) as bar:
        result = examine(
            engine, tokens=tokens, questions=questions, moves=moves, seed=seed, clock=bar
        )
    if as_json:
        print_json(result.to_json() | {"model": DEFAULT})
    else:
        out = console()
        for part in report(result):
            out.print(part, soft_wrap=isinstance(part, str))
    return 0 if result.passed else 1


def report(result: Result) -> list[object]:
    """What a person is shown."""
    from rich import box
    from rich.table import Table

    from armt.cli.output import size

    table = Table(
        title="What it remembers", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=True)
    for a in result.answers:
        mark = "[green]right[/green]" if a.right else "[red]wrong[/red]"
        row = (a.question, a.answer, a.expected, mark)
        table.add_row(f"{a.asked_at:,}", *row, f"{a.tokens_ago:,}")
    oldest = max(result.answers, key=lambda a: a.tokens_ago)
    verdict = "[green]passed[/green]" if result.passed else "[red]failed[/red]"
    asked = len(result.answers)
    memory, peak = map(size, result.memory_bytes), map(size, result.peak_bytes)
    return [
        table,
        f"The oldest of these facts was told {oldest.tokens_ago:,} tokens before the question:",
        f"  [dim]...{oldest.fact.before}[/dim] [bold]{oldest.fact.text}[/bold]",
        "",
        f"read      {result.tokens:,} tokens in {result.segments:,} segments, "
        f"{result.seconds:.1f} s, {result.tokens / result.seconds:,.0f} tokens/s",
        f"on        {result.description}, {result.dtype} weights",
        f"memory    {next(memory)} after {result.first_tokens:,} tokens, "
        f"{next(memory)} after {result.tokens:,}; whole process {next(peak)}, {next(peak)}",
        f"result    {result.right} of {asked} right, {result.needed} needed: {verdict}",
        f"control   {result.right_without} of {asked} right after the last segment alone, "
        "without the memory",
    ]
