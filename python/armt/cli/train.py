"""``armt train``: small models from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armt.cli.options import Json

if TYPE_CHECKING:
    from armt.training.retrieval import Trainer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
INTERRUPTED = 130


@app.callback()
def train() -> None:
    """Trains small models from scratch with PyTorch.

    Example:

    \b
      armt train retrieval my-model --steps 2000
    """


@app.command("retrieval", short_help="A memory for pairs of key and value.")
def retrieval(
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A new or empty folder.", show_default=False),
    ],
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps in all.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Samples in a step.")] = 64,
    pairs: Annotated[
        str, typer.Option(metavar="N,N,...", help="The curriculum: most pairs in each stage.")
    ] = "5,10,20",
    rewrite: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of samples with keys that come again.")
    ] = 0.5,
    key_symbols: Annotated[int, typer.Option(min=1, max=3, metavar="N", help="In a key.")] = 2,
    width: Annotated[int, typer.Option(min=1, metavar="N", help="Of the model.")] = 128,
    layers: Annotated[int, typer.Option(min=1, metavar="N", help="Of the model.")] = 4,
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="Of attention.")] = 4,
    memory_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Of a segment.")] = 4,
    d_mem: Annotated[int, typer.Option(min=1, metavar="N", help="Width of a memory key.")] = 64,
    lr: Annotated[float, typer.Option(min=0.0, metavar="R", help="Highest learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Another seed: other model.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, metavar="N", help="Steps.")] = 100,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in OUT; its own settings but --steps.")
    ] = False,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu or cuda.")] = "cpu",
    threads: Annotated[
        int, typer.Option(min=0, metavar="N", help="CPU threads; 0: PyTorch decides.")
    ] = 0,
    as_json: Json = False,
) -> int:
    """Trains an ARMT to remember pairs of key and value, one pair a segment.

    Number of pairs rises by stages. OUT becomes a model folder (armt eval retrieval OUT) with
    training.pt beside it to go on from; it is written every --save-every steps and at the end.
    Ctrl-C finishes the step, saves, and ends with exit code 130. Needs the extra "torch".

    Example:

    \b
      armt train retrieval my-model --steps 2000
      armt train retrieval my-model --steps 4000 --resume
    """
    job = _import()
    from armt.cli.output import print_json, say

    if resume:
        trainer = job.Trainer.resumed(job.read_progress(out), steps=steps, device=_known(device))
    else:
        plan = job.Plan(
            steps=steps,
            batch=batch,
            pairs=job.stages(pairs),
            rewrite=rewrite,
            key_symbols=key_symbols,
            width=width,
            layers=layers,
            heads=heads,
            memory_tokens=memory_tokens,
            d_mem=d_mem,
            lr=lr,
            seed=seed,
        )
        trainer = job.Trainer(plan, device=_known(device))
        job.new_folder(out)
    if threads:
        _set_threads(threads)
    weights = sum(p.numel() for p in trainer.model.parameters())
    if not as_json:
        say(f"training {weights:,} weights on {device}, float32")
    result = _run(trainer, out, save_every=save_every, shown=not as_json)
    result |= {"folder": str(out), "weights": weights, "device": device, "dtype": "float32"}
    if as_json:
        print_json(result)
    else:
        print(out)
        say(
            f"{result['step']:,} steps, {result['tokens_per_second']:,.0f} tokens/s; loss "
            f"{result['loss']:.3f}, {result['accuracy']:.1%} right at up to {result['pairs']} pairs"
        )
    return INTERRUPTED if result["interrupted"] else 0


def _run(trainer: Trainer, out: Path, *, save_every: int, shown: bool) -> dict[str, Any]:
    """Trains to the end or to Ctrl-C; the last figures."""
    import time

    from armt.cli.training_bar import PatientInterrupt, TrainingBar

    start, tokens, loss, right = time.perf_counter(), 0, 0.0, 0.0
    with PatientInterrupt() as asked, TrainingBar(trainer.plan.steps, shown=shown) as bar:
        while not trainer.done and not asked.stop:
            report = trainer.step()
            tokens += report.tokens
            fresh = tokens == report.tokens
            loss = report.loss if fresh else 0.9 * loss + 0.1 * report.loss
            right = report.accuracy if fresh else 0.9 * right + 0.1 * report.accuracy
            bar.update(trainer, loss, right, tokens)
            if trainer.standing.step % save_every == 0 and not trainer.done:
                _save(trainer, out)
        _save(trainer, out)
    seconds = time.perf_counter() - start
    return {
        "step": trainer.standing.step,
        "steps": trainer.plan.steps,
        "pairs": trainer.plan.pairs[trainer.standing.stage],
        "loss": loss,
        "accuracy": right,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "interrupted": asked.stop,
    }


def _save(trainer: Trainer, out: Path) -> None:
    from armt.training.folder import write_model, write_progress

    write_model(out, trainer.model, trainer.facts())
    write_progress(out, trainer.progress())


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
