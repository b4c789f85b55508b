"""``armt run``: reads a text of any size and answers questions about it."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from armt.cli.options import Device, DType, Json, Model, Threads

if TYPE_CHECKING:
    from armt.cli.bar import ReadingBar
    from armt.session import Session
    from armt.text import TextSettings, Tokenizer

SEGMENTS_A_CALL = 32


def run(
    model: Model,
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="A UTF-8 text; - is standard input."),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(metavar="QUESTION", help="May be given again: each asks the same reading."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer.")] = 20,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0: the likeliest token.")
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="For a temperature above 0.")
    ] = None,
    prompt_format: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What to read before answering, such as '{question}\\n'. [default: what the "
            "model's config.json says]",
            show_default=False,
        ),
    ] = None,
    state_in: Annotated[
        Path | None, typer.Option(metavar="STATE", help="Go on from a saved reading.")
    ] = None,
    state_out: Annotated[
        Path | None, typer.Option(metavar="STATE", help="Save the reading, questions left out.")
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Reads a text of any size as a stream in constant memory, and answers questions about it.

    The text is read once; every question is asked on a fork of that one reading. Needs the extra
    "text" (pip install "armt[text]") and a tokenizer.json in the model's folder.

    Example:

    \b
      armt run demo story.txt --ask "Where is Mary?" --ask "Where is John?"
      cat *.txt | armt run MODEL - --state-out books.armt-state
    """
    from armt import State
    from armt.cli.bar import ReadingBar
    from armt.cli.options import load_engine, where
    from armt.cli.output import print_json, say
    from armt.text import TextSettings, Tokenizer

    questions = ask or []
    _check(file, questions, state_in, state_out)
    engine = load_engine(model, device=device, dtype=dtype, threads=threads)
    folder = engine.checkpoint.folder
    tokenizer = Tokenizer(engine.checkpoint.tokenizer or folder)
    settings = TextSettings.of(folder)
    if prompt_format is not None:
        settings = dataclasses.replace(settings, prompt_format=prompt_format.replace("\\n", "\n"))
        settings.check("--prompt-format")
    session = engine.session(state=None if state_in is None else State.load(state_in), seed=seed)
    if not as_json:
        say(f"model {model} on {where(engine)}")
    seconds = 0.0
    before = session.tokens
    with ExitStack() as stack:
        if file is not None:
            source = open_source(file, stack)
            if source.isatty() and not as_json:
                say("type the text, then Ctrl-D on a line of its own")
            bar = stack.enter_context(
                ReadingBar("reading", total=source_size(source), shown=not as_json)
            )
            _read(session, source, tokenizer, settings, bar)
            seconds = bar.seconds
    if session.tokens == 0:
        raise ValueError(f"{file}: the text is empty, expected at least one token")
    if state_out is not None:
        _save(session, state_out)
    read = session.tokens - before
    if not as_json and file is not None:
        say(f"read {read:,} tokens in {seconds:.1f} s, {read / max(seconds, 1e-9):,.0f} tokens/s")
    limits = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    answers = [
        _ask(session, question, tokenizer, settings, shown=not as_json, limits=limits)
        for question in questions
    ]
    if as_json:
        print_json(
            {
                "model": model,
                "device": engine.device,
                "description": engine.description,
                "dtype": engine.dtype,
                "file": file,
                "tokens": read,
                "tokens_in_all": session.tokens,
                "segments": session.segments,
                "seconds": seconds,
                "tokens_per_second": read / seconds if seconds else None,
                "state_out": None if state_out is None else str(state_out),
                "answers": answers,
            }
        )


def _check(
    file: str | None, questions: list[str], state_in: Path | None, state_out: Path | None
) -> None:
    """What can be wrong before a model is loaded."""
    if file is None and state_in is None:
        raise ValueError("nothing to read: give a FILE, - for standard input, or --state-in")
    if not questions and state_out is None:
        raise ValueError("nothing to do: give a question with --ask, or --state-out")
    if any(not question.strip() for question in questions):
        raise ValueError("--ask: the question is empty")
    if file is not None:
        check_source(file)
    if state_in is not None and not state_in.is_file():
        raise FileNotFoundError(f"{state_in}: no such file")
    if state_out is not None and not state_out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{state_out}: the folder {state_out.parent} does not exist")
    if state_out is not None and state_out.is_dir():
        raise IsADirectoryError(f"{state_out}: found a folder, expected the name of a file")


def open_source(file: str, stack: ExitStack) -> BinaryIO:
    """A file, or standard input for ``-``; a typed error for what is neither."""
    check_source(file)
    return sys.stdin.buffer if file == "-" else stack.enter_context(Path(file).open("rb"))


def check_source(file: str) -> None:
    """FileNotFoundError or IsADirectoryError for what cannot be read; ``-`` always can."""
    if file == "-":
        return
    if Path(file).is_dir():
        raise IsADirectoryError(f"{file}: found a folder, expected a text file")
    if not Path(file).exists():
        raise FileNotFoundError(f"{file}: no such file")


def source_size(source: BinaryIO) -> int | None:
    """Bytes of a file; None for a pipe."""
    if not source.seekable():
        return None
    start = source.tell()
    end = source.seek(0, 2)
    source.seek(start)
    return end or None


def _read(
    session: Session,
    source: BinaryIO,
    tokenizer: Tokenizer,
    settings: TextSettings,
    bar: ReadingBar,
) -> None:
    from armt.tasks.reading import blocks
    from armt.text import open_text, pieces

    place = source.tell if source.seekable() else lambda: 0
    count = SEGMENTS_A_CALL * session.engine.segment_size
    first, done = session.tokens, place()
    text = open_text(source)
    stream = tokenizer.encode_stream(settings.prepared(pieces(text)), specials=first == 0)
    for ids in blocks(stream, count):
        span = bar.span(done, place(), session.tokens - first, len(ids))
        session.feed(ids, progress=span)
        done = place()
    text.detach()  # standard input is not ours to close


def _ask(
    session: Session,
    question: str,
    tokenizer: Tokenizer,
    settings: TextSettings,
    *,
    shown: bool,
    limits: dict[str, Any],
) -> dict[str, Any]:
    """One question on a fork; the answer is printed as it comes."""
    ids = tokenizer.encode(settings.prompt(question))
    stop = session.engine.checkpoint.eos_token_ids
    if shown:
        print(f"> {question}", flush=True)
    with session.fork() as branch:
        size = session.engine.segment_size
        if len(ids) <= size < branch.open_tokens + len(ids):
            branch.close_segment()  # a question that fits is not torn in two
        branch.feed(ids)
        generation = branch.generate(stop_ids=stop, **limits)
        words: list[str] = []
        for piece in tokenizer.decode_stream(token for token in generation if token not in stop):
            words.append(piece if words else piece.lstrip())
            if shown:
                print(words[-1], end="", flush=True)
    if shown:
        print(flush=True)
    return {
        "question": question,
        "answer": "".join(words).strip(),
        "tokens": len(generation.tokens),
        "finish_reason": generation.finish_reason,
    }


def _save(session: Session, target: Path) -> None:
    from armt.files import whole_file

    with whole_file(target) as path:
        session.state.save(path)
