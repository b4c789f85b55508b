"""``armt demo``: a trained memory reads a long stream and proves what it remembers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from armt.cli.options import Device, DType, Json, Threads

if TYPE_CHECKING:
    from armt.demo.exam import Result

COLUMNS = ("asked at", "question", "answer", "truth", "", "tokens ago", "moves")
NUMBERS = ("asked at", "tokens ago", "moves")
LEAST = 1000


def _length(text: str | int) -> int:
    """Tokens as "500000", "500_000", "300k" or "10M"; typer passes the default as it is."""
    from armt.errors import InvalidArgument
    from armt.tasks.lengths import parse_length

    try:
        tokens = parse_length(str(text).replace("_", ""))
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from error
    if tokens < LEAST:
        raise typer.BadParameter(f"found {tokens}, expected {LEAST} or more")
    return tokens


def demo(
    tokens: Annotated[
        int,
        typer.Option(
            parser=_length,
            metavar="N",
            help="Length of the stream: 500000, 300k, 10M ... (k = 1,024, M = 1,048,576).",
        ),
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
    went, and what was said before about the same person is no longer true. The model (part of
    this package) reads it on the engine in constant memory and is asked on the way. In the
    middle its memory is saved to a file, thrown away and read back. For comparison the same
    questions go to the same model after the last segment alone.

    Exit code 0 if at least three answers in four are right and the memory came back unchanged; a
    guess has odds of one in six. The default takes well under two minutes on a laptop's CPU.

    Example:

    \b
      armt demo --tokens 10M --seed 7
    """
    from rich.table import Table

    from armt.cli.bar import ReadingBar
    from armt.cli.options import load_engine, where
    from armt.cli.output import console, print_json, print_table, say
    from armt.demo.exam import examine
    from armt.demo.story import check_material
    from armt.models import DEFAULT, resolve

    check_material(resolve(DEFAULT))
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
            if isinstance(part, Table):
                print_table(part)
            else:
                out.print(part, soft_wrap=True)
    return 0 if result.passed else 1


def report(result: Result) -> list[object]:
    """What a person is shown."""
    from rich import box
    from rich.table import Table

    from armt.cli.output import size

    table = Table(
        title="What it remembers",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=True)
    for a in result.answers:
        mark = "[green]right[/green]" if a.right else "[red]wrong[/red]"
        row = (a.question, a.answer, a.expected, mark)
        table.add_row(f"{a.asked_at:,}", *row, f"{a.tokens_ago:,}", f"{a.overwritten}")
    oldest = max(result.answers, key=lambda a: a.tokens_ago)
    verdict = "[green]passed[/green]" if result.passed else "[red]failed[/red]"
    asked = len(result.answers)
    memory, peak = map(size, result.memory_bytes), map(size, result.peak_bytes)
    saved = "unchanged" if result.saved.same else "[red]CHANGED[/red]"
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
        f"saved     after {result.saved.at:,} tokens to a file of "
        f"{size(result.saved.file_bytes)} (with the open segment), and read back {saved}",
        f"result    {result.right} of {asked} right, {result.needed} needed: {verdict}",
        f"control   {result.right_without} of {asked} right after the last segment alone, "
        "without the memory",
        "",
        "[bold]What this shows[/bold]",
        *_plain_words(result),
    ]


def _plain_words(result: Result) -> list[str]:
    """The findings for somebody who knows nothing of this."""
    oldest = max((a.tokens_ago for a in result.answers if a.right), default=0)
    people = len({a.question for a in result.answers})
    growth = "did not grow" if result.memory_bytes[0] == result.memory_bytes[1] else "GREW"
    lines = [
        f"The model read {result.tokens:,} tokens once, a segment at a time, and could not look",
        f"back: all that it carries from one segment to the next is its memory, which {growth}.",
        f"{result.facts} sentences of the text said where one of {people} people went; with every",
        'move the older place was no longer true ("moves" in the table counts these).',
    ]
    if result.right > result.right_without:
        lines += [
            f"From its memory it answered {result.right} of {len(result.answers)} questions, about "
            f"facts up to {oldest:,} tokens back;",
            f"without, {result.right_without}.",
        ]
    else:
        lines.append("This time its answers were no better than without its memory.")
    if result.saved.same:
        lines.append(
            "The memory is an object: it went through a file in the middle, and nobody could tell."
        )
    return lines
