"""The commands together, and what they do with errors."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from armt.cli import bench, convert, demo, evaluate, info, serve, train
from armt.cli import run as run_text
from armt.cli.output import one_line, print_error

INTERRUPTED = 128 + signal.SIGINT

app = typer.Typer(
    name="armt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo", short_help="Reads a long stream and proves what it remembers.")(demo.demo)
app.command("run", short_help="Reads a text of any size and answers questions.")(run_text.run)
app.command("info", short_help="Shows what a checkpoint is.")(info.info)
app.command("convert", short_help="Writes a checkpoint in this project's form.")(convert.convert)
app.command("bench", short_help="Measures tokens a second.")(bench.bench)
app.command("serve", short_help="Serves a model over HTTP.")(serve.serve)
app.add_typer(evaluate.app, name="eval", short_help="Measures what a model remembers.")
app.command("train", short_help="Trains a small model from scratch.")(train.train)


def _version(wanted: bool) -> None:
    if wanted:
        import armt

        print(f"armt {armt.__version__}")
        raise typer.Exit


@app.callback()
def armt_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """Reads any amount of text in constant memory, and answers from it.

    Start with: armt demo. Every command has --help with an example.
    """


def run(arguments: Sequence[str]) -> int:
    """Runs one command line; the exit code. One line on standard error says what went wrong."""
    as_json = "--json" in arguments
    try:
        result = app(args=list(arguments), prog_name="armt", standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        result = INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone; Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _failed(error, as_json=as_json)
    code = result if isinstance(result, int) else 0
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code
        print_error("interrupted", as_json=False)
    return code


def _failed(error: Exception, *, as_json: bool) -> int:
    usage: Any = getattr(error, "format_message", None)
    if usage is not None:  # typer: wrong options
        if message := usage():
            context: Any = getattr(error, "ctx", None)
            command = "armt" if context is None else context.command_path
            hint = f"{one_line(message)} (see {command} --help)"
            print_error(hint, as_json=as_json, kind="Usage")
        return int(getattr(error, "exit_code", 2))
    if type(error).__name__ == "Abort":  # Ctrl-C in older releases of typer
        print_error("interrupted", as_json=False)
        return INTERRUPTED
    expected = (ValueError, OSError, RuntimeError, MemoryError, FloatingPointError)
    if not isinstance(error, expected) or os.environ.get("ARMT_TRACEBACK"):
        raise error
    print_error(str(error) or type(error).__name__, as_json=as_json, kind=type(error).__name__)
    return 1
