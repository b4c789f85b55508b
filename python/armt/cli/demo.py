"""``armt demo``: a trained memory reads a long stream and proves what it remembers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from armt.cli.options import Device, DType, Json, Threads

if TYPE_CHECKING:
    from armt.demo.exam import Result

RIGHT_ALIGNED = ("asked at", "told before")


def demo(
    tokens: Annotated[int, typer.Option(min=1000, help="Length of the stream.")] = 200_000,
    questions: Annotated[int, typer.Option(min=1, help="Asked on the way, four at a time.")] = 12,
    moves: Annotated[int, typer.Option(min=0, help="How often somebody moves again.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another story.")] = 0,
    device: Device = "auto",
    dtype: DType = "auto",
    threads: Threads = 0,
    as_json: Json = False,
) -> int:
    """Reads a long stream with a few facts in it, then asks where everybody is.

    The stream is book-like prose, made on the spot; here and there a sentence says where somebody
    went. The model (half a million weights, part of this package) reads it on the engine in
    constant memory. Exit code 0 if at least three answers in four are right. A right answer by
    chance has odds of one in six.

    Example: armt demo --tokens 1000000 --seed 7
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
    from rich.table import Table

    from armt.cli.output import size

    table = Table(title="What it remembers", title_justify="left", title_style="bold")
    for name in ("asked at", "question", "answer", "expected", "", "told before"):
        table.add_column(name, justify="right" if name in RIGHT_ALIGNED else "left", no_wrap=True)
    for a in result.answers:
        mark = "[green]right[/green]" if a.right else "[red]wrong[/red]"
        row = (a.question, a.answer, a.expected, mark)
        table.add_row(f"{a.asked_at:,}", *row, f"{a.tokens_ago:,} tokens")
    oldest = max(result.answers, key=lambda a: a.tokens_ago)
    verdict = "[green]passed[/green]" if result.passed else "[red]failed[/red]"
    memory, peak = map(size, result.memory_bytes), map(size, result.peak_bytes)
    return [
        table,
        f"The oldest of these facts stood {oldest.tokens_ago:,} tokens back, in this place:",
        f"  [dim]...{oldest.fact.before}[/dim] [bold]{oldest.fact.text}[/bold]",
        "",
        f"read      {result.tokens:,} tokens in {result.segments:,} segments, "
        f"{result.seconds:.1f} s, {result.tokens / result.seconds:,.0f} tokens/s",
        f"on        {result.description}, {result.dtype} weights",
        f"memory    {next(memory)} after {result.first_tokens:,} tokens, "
        f"{next(memory)} after {result.tokens:,}; whole process {next(peak)}, {next(peak)}",
        f"result    {result.right} of {len(result.answers)} right, {result.needed} needed: "
        + verdict,
    ]
