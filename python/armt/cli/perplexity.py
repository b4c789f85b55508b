"""``armt eval perplexity``: how well a model predicts a text."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from armt.cli.options import Device, DType, Json, Model, Threads


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
    from armt.cli.options import load_engine, where
    from armt.cli.output import print_json, say
    from armt.cli.run import open_source, source_size
    from armt.tasks import perplexity as job
    from armt.text import TextSettings, Tokenizer, open_text, pieces

    with ExitStack() as stack:
        source = open_source(str(data), stack)
        engine = load_engine(model, device=device, dtype=dtype, threads=threads)
        if not as_json:
            say(f"model {model} on {where(engine)}")
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
    facts = {
        "task": "perplexity",
        "model": model,
        "data": str(data),
        "device": engine.device,
        "description": engine.description,
        "dtype": engine.dtype,
    }
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
