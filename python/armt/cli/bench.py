"""``armt bench``: how fast this machine reads and writes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from armt.cli.options import Device, DType, Json, Threads


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint, or random weights of a known size: gpt2, llama-1b, retrieval.",
        ),
    ] = "demo",
    tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tokens to read at a time; 0: 32 segments.")
    ] = 0,
    decode: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to write in each session.")
    ] = 32,
    sessions: Annotated[
        int, typer.Option(min=1, metavar="N", help="Sessions that write at the same time.")
    ] = 8,
    seconds: Annotated[
        float, typer.Option(min=0.0, metavar="S", help="Time for each of the measurements.")
    ] = 2.0,
    device: Device = "auto",
    dtype: DType = "auto",
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Measures tokens a second: reading, writing, and writing in many sessions at once.

    First it checks that a text read in pieces gives the same answer as read at once. Figures are
    medians with the slowest and the fastest run.

    Example:

    \b
      armt bench gpt2 --dtype bfloat16 --json
    """
    from armt.cli.options import where
    from armt.cli.output import print_json, say
    from armt.demo.exam import peak_memory
    from armt.tasks import speed

    engine = _engine(model, device=device, dtype=dtype, threads=threads)
    if not as_json:
        say(f"model {model} on {where(engine)}")
    count = tokens or 32 * engine.segment_size
    parts = {
        "read": speed.reader(engine, count),
        "write": speed.writer(engine, decode, 1),
        f"write, {sessions} sessions": speed.writer(engine, decode, sessions),
    }
    difference = speed.self_check(engine)
    results: dict[str, dict[str, Any]] = {}
    with _spinner(shown=not as_json) as status:
        for name, work in parts.items():
            status.update(f"measuring: {name}")
            results[name] = speed.timed(work, seconds=seconds)
    if as_json:
        read, write, many = results.values()
        print_json(
            _facts(engine, model)
            | {
                "self_check_difference": difference,
                "read": read,
                "write": write,
                "write_many": many | {"sessions": sessions},
                "peak_bytes": peak_memory(),
            }
        )
        return
    _print(results)


def _engine(model: str, *, device: str, dtype: str, threads: int) -> Any:
    from pathlib import Path

    from armt.cli.options import check_dtype, engine_over, load_engine
    from armt.tasks.geometries import GEOMETRIES, random_checkpoint

    if model not in GEOMETRIES or Path(model).exists():
        return load_engine(model, device=device, dtype=dtype, threads=threads)
    return engine_over(random_checkpoint(model), device, check_dtype(dtype), threads)


def _facts(engine: Any, model: str) -> dict[str, Any]:
    import os
    import platform

    import armt

    return {
        "model": model,
        "device": engine.device,
        "description": engine.description,
        "dtype": engine.dtype,
        "version": armt.__version__,
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }


def _spinner(*, shown: bool) -> Any:
    from rich.console import Console

    console = Console(stderr=True, quiet=not shown)
    return console.status("measuring")


def _print(results: dict[str, dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    from armt.cli.output import console

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in ("tokens/s", "slowest", "fastest", "runs"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, found in results.items():
        rates = (f"{found[k]:,.0f}" for k in ("tokens_per_second", "least", "most"))
        table.add_row(name, *rates, str(found["runs"]))
    console().print(table)
