"""What the evaluations share: options, the model that is measured, the bar, and the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from armt.cli.bar import ReadingBar
    from armt.tasks.journal import Journal
    from armt.tasks.scores import Score
    from armt.tasks.subject import Subject

Samples = Annotated[int, typer.Option(min=1, metavar="N", help="Samples of each size.")]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Another seed: other samples.")]
Batch = Annotated[
    int,
    typer.Option(min=0, metavar="N", help="Samples read side by side; 0: as suits the device."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Write answers, tables (CSV, JSON) and plots there; the same command on the same "
        "folder goes on where an earlier one was interrupted.",
    ),
]
System = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="armt, rmt or mamba: refuse any other checkpoint; auto: what it is. Mamba runs in "
        "PyTorch, the others on the engine.",
    ),
]
Torch = Annotated[bool, typer.Option("--torch", help="Run in PyTorch, not on the engine.")]
CompareTorch = Annotated[
    bool,
    typer.Option(
        "--compare-torch", help="Ask PyTorch the same questions too, and compare every answer."
    ),
]


@dataclass(frozen=True)
class Place:
    """Where and how a model is to run, as the options say."""

    model: str
    system: str
    device: str
    dtype: str
    threads: int
    torch: bool
    compare_torch: bool


@dataclass
class Run:
    """One evaluation on its way."""

    subject: Subject
    other: Subject | None
    facts: dict[str, Any]
    out: Path | None
    as_json: bool

    def journal(self) -> Journal:
        """The folder's answers. They depend neither on where the model lies nor on its device."""
        from armt.tasks.journal import Journal

        hidden = ("model", "device", "description")
        return Journal(self.out, {k: v for k, v in self.facts.items() if k not in hidden})

    def batch(self, asked: int, *, on_gpu: int, on_cpu: int) -> int:
        """Samples side by side."""
        return asked or (on_gpu if self.subject.runs_on["device"].startswith("cuda") else on_cpu)

    @contextmanager
    def reading(self, label: str, total: int) -> Iterator[ReadingBar]:
        """A bar over all samples; says how to go on when it is interrupted."""
        from armt.cli.bar import ReadingBar
        from armt.cli.output import say

        try:
            with ReadingBar(label, total=max(total, 1), shown=not self.as_json) as bar:
                yield bar
        except KeyboardInterrupt:
            if self.out is not None:
                say(f"the answers so far are in {self.out}; the same command goes on from there")
            raise

    def finish(
        self,
        journal: Journal,
        rows: Sequence[dict[str, Any]],
        columns: Mapping[str, Callable[[dict[str, Any]], str]],
        draw: Callable[[dict[str, Any], Sequence[dict[str, Any]], Path], list[str]],
    ) -> None:
        """Prints and writes the results: those of the whole folder, earlier runs included."""
        from armt.cli import eval_output

        if self.other is not None:
            self.facts["compared"] = eval_output.compared(journal)
        if not self.as_json:
            title = f"{self.facts['evaluation']}, {self.subject.system}"
            eval_output.show(title, columns, rows)
            if self.other is not None:
                eval_output.show_compared(self.facts["compared"])
        eval_output.finish(self.facts, rows, self.out, draw, as_json=self.as_json)


def start(place: Place, evaluation: str, *, seed: int, out: Path | None, as_json: bool) -> Run:
    """Loads the model that is measured, and the same in PyTorch where that is to be compared."""
    from armt.cli.options import load_engine
    from armt.cli.output import say
    from armt.errors import InvalidArgument
    from armt.models import resolve
    from armt.tasks.subject import fingerprint, in_torch, on_engine, system_of

    kind = system_of(resolve(place.model), place.system)
    torch = place.torch or kind == "mamba"
    if torch and place.compare_torch:
        raise InvalidArgument("--compare-torch: found PyTorch alone, expected a run on the engine")
    if torch:
        subject = in_torch(place.model, place.device, place.system)
    else:
        engine = load_engine(
            place.model, device=place.device, dtype=place.dtype, threads=place.threads
        )
        subject = on_engine(engine, place.system)
    other = None
    if place.compare_torch:
        other = in_torch(place.model, place.device, place.system)
    facts = {"evaluation": evaluation, "model": place.model, "system": subject.system, "seed": seed}
    facts |= subject.runs_on | {"fingerprint": fingerprint(subject.folder)}
    if not as_json:
        where = f"{facts['description']}, {facts['dtype']} weights"
        say(f"model {place.model} ({subject.system}) on {where}")
    return Run(subject, other, facts, out, as_json)


def counting(bar: ReadingBar) -> Callable[[int], None]:
    """Moves the bar on from where it stands."""
    before = bar.tokens
    return lambda n: bar.update(before + n, before + n)


def score_of(journal: Journal, cell: Mapping[str, Any]) -> Score:
    """The score of all answers of a cell."""
    from armt.tasks.scores import Score

    return Score.of(journal.of(cell))
