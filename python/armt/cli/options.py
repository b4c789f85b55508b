"""Options that several commands share, and the engine that they ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import armt

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint folder or file, or the model of the package: [bold]demo[/bold].",
        show_default=False,
    ),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, or auto: a GPU if this build can use one.")
]
DType = Annotated[
    str, typer.Option(help="Weights as float32, bfloat16, float16, or auto: as they are stored.")
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 uses all cores.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def load_engine(model: str, *, device: str, dtype: str, threads: int) -> armt.Engine:
    """The engine of a model by path or name."""
    from armt.engine import Engine
    from armt.errors import InvalidArgument
    from armt.models import resolve

    known = ("auto", "float32", "bfloat16", "float16")
    if dtype not in known:
        raise InvalidArgument(f"--dtype: found {dtype}, expected one of {', '.join(known)}")
    return Engine.from_pretrained(
        resolve(model),
        device=device,
        dtype=dtype,  # type: ignore[arg-type]
        threads=threads,
    )


def where(engine: armt.Engine) -> str:
    """Device and type of an engine for people."""
    return f"{engine.description}, {engine.dtype} weights"
