"""``armt train``: small models from scratch, by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armt.cli.options import Json

if TYPE_CHECKING:
    from armt.training.trainer import Trainer

INTERRUPTED = 130
REPORT_EVERY = 20


def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="A TOML file.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="A new or empty folder.", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Go on in this folder.", show_default=False),
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0.0, metavar="M", help="Stop and save after M; 0: at the end.")
    ] = 0.0,
    save_every: Annotated[int, typer.Option(min=1, metavar="N", help="Steps.")] = 100,
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="cpu or cuda.")] = "cpu",
    workers: Annotated[
        int, typer.Option(min=0, metavar="N", help="Processes that make text; 0: none.")
    ] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the layers with torch.compile.")
    ] = False,
    threads: Annotated[
        int, typer.Option(min=0, metavar="N", help="CPU threads; 0: PyTorch decides.")
    ] = 0,
    as_json: Json = False,
) -> int:
    """Trains ARMT, RMT or Mamba on retrieval or BABILong, as RECIPE says.

    OUT becomes a model folder (armt eval babilong OUT), with metrics.jsonl and with training.pt to
    go on from; all are written every --save-every steps and at the end. --resume loses nothing but
    the steps since then; with RECIPE it goes on by that recipe. Ctrl-C finishes the step, saves,
    and ends with exit code 130. Needs the extra "torch".

    Example:

    \b
      armt train bench/recipes/retrieval.toml my-model --device cuda --workers 8
      armt train --resume my-model --device cuda --workers 8
    """
    job = _import()
    from armt.cli.output import print_json, say

    options = {
        "device": _known(device),
        "workers": workers,
        "save_every": save_every,
        "compiled": compiled,
    }
    if threads:
        _set_threads(threads)
    if resume is not None:
        if out is not None:
            raise ValueError("--resume: found OUT beside it, expected only one of them")
        folder = resume
        given = job.read_recipe(recipe) if recipe is not None else None
        trainer = job.Trainer.resumed(job.read_progress(folder), given, **options)
    elif recipe is None or out is None:
        raise ValueError("found no RECIPE and OUT, expected both, or --resume FOLDER")
    else:
        trainer = job.Trainer(*job.read_recipe(recipe), **options)
        folder = out
        job.new_folder(folder)
    shape = trainer.shape
    if not as_json:
        say(
            f"training {shape.system}, {trainer.parameters:,} weights, {shape.state_bytes:,} bytes "
            f"of state, on {device}"
        )
    try:
        result = _run(trainer, folder, save_every, minutes, shown=not as_json)
    finally:
        trainer.close()
    result |= {"folder": str(folder), "weights": trainer.parameters, "device": device}
    if as_json:
        print_json(result)
    else:
        print(folder)
        right = ", ".join(f"{name} {share:.1%}" for name, share in result["right"].items())
        say(
            f"{result['step']:,} of {result['steps']:,} steps, "
            f"{result['tokens_per_second']:,.0f} tokens/s; loss {result['loss']:.3f}, {right}"
        )
    return INTERRUPTED if result["interrupted"] else 0


def _run(
    trainer: Trainer, folder: Path, save_every: int, minutes: float, *, shown: bool
) -> dict[str, Any]:
    """Trains to the end, to Ctrl-C or until the time is over; the last figures."""
    import time

    from armt.cli.training_bar import PatientInterrupt, TrainingBar
    from armt.training.folder import Metrics

    start, tokens, report = time.perf_counter(), 0, None
    with (
        PatientInterrupt() as asked,
        TrainingBar(trainer.recipe.steps, shown=shown) as bar,
        Metrics(folder, trainer.step) as metrics,
    ):
        over = False
        while not (trainer.done or asked.stop or over):
            tokens += trainer.advance()
            saving = trainer.step % save_every == 0
            if saving or trainer.done or trainer.step % REPORT_EVERY == 0:
                seconds = time.perf_counter() - start
                report = trainer.report()
                bar.update(report, tokens / seconds)
                metrics.add(report, tokens=tokens, seconds=seconds)
                over = bool(minutes) and seconds > 60 * minutes
            if saving or trainer.done or over:
                _save(trainer, folder)
        if asked.stop and trainer.step:
            _save(trainer, folder)
    seconds = time.perf_counter() - start
    return {
        "step": trainer.step,
        "steps": trainer.recipe.steps,
        "loss": report.loss if report else None,
        "right": report.right if report else {},
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "interrupted": asked.stop,
    }


def _save(trainer: Trainer, folder: Path) -> None:
    from armt.training.folder import write_model, write_progress

    write_model(folder, trainer.state_dict(), trainer.config(), trainer.files())
    write_progress(folder, trainer.progress())


def _import() -> Any:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ValueError(
            'training needs PyTorch, which is not installed: run pip install "armt[torch]"'
        ) from error
    from armt.training import job

    return job


def _known(device: str) -> str:
    """``device`` if PyTorch can use it."""
    import torch

    from armt.errors import DeviceError

    try:
        torch.zeros(1, device=device)
    except Exception as error:  # torch raises several kinds here
        found = str(error).splitlines()[0]
        raise DeviceError(f"--device: found {device}, which PyTorch cannot use: {found}") from error
    return device


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)
