"""Options that several commands share, and the engine that they ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import armt
    from armt.checkpoint import Checkpoint
    from armt.engine import DType as DTypeName

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint folder or file, or the model of the package: demo.",
        show_default=False,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, or auto: a GPU if this build can use one.",
    ),
]
DType = Annotated[
    str,
    typer.Option(
        metavar="TYPE", help="Weights as float32, bfloat16, float16, or auto: as they are stored."
    ),
]
Threads = Annotated[int, typer.Option(min=0, metavar="N", help="CPU threads; 0 uses all cores.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def load_engine(model: str, *, device: str, dtype: str, threads: int) -> armt.Engine:
    """The engine of a model by path or name."""
    from armt.checkpoint import load_checkpoint
    from armt.models import resolve

    weights = check_dtype(dtype)
    return engine_over(load_checkpoint(resolve(model)), device, weights, threads)


def engine_over(checkpoint: Checkpoint, device: str, dtype: DTypeName, threads: int) -> armt.Engine:
    """The engine of a checkpoint; a bar shows the reading of large ones."""
    from armt.cli.loading import reading_weights
    from armt.engine import Engine

    with reading_weights(checkpoint, "loading") as shown:
        engine = Engine.from_checkpoint(shown, device=device, dtype=dtype, threads=threads)
    return engine


def check_dtype(name: str) -> DTypeName:
    """``name`` if it is a type of weights."""
    from armt.errors import InvalidArgument

    known: tuple[DTypeName, ...] = ("auto", "float32", "bfloat16", "float16")
    for dtype in known:
        if name == dtype:
            return dtype
    raise InvalidArgument(f"--dtype: found {name}, expected one of {', '.join(known)}")


def where(engine: armt.Engine) -> str:
    """Device and type of an engine for people."""
    return f"{engine.description}, {engine.dtype} weights"
