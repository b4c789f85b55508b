"""Progress of long calls: a callable of the user's, or a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from armt.errors import InvalidArgument

ProgressLike: TypeAlias = "Callable[[int], Any] | bool | None"


@contextmanager
def reporting(
    progress: ProgressLike, *, total: int, unit: str = "tokens"
) -> Iterator[Callable[[int], Any] | None]:
    """The function to call with the number of tokens done so far.

    ``progress`` is None or False (nothing), True (a bar on standard error with rate and time left)
    or a callable that receives the tokens done.
    """
    if progress is None or progress is False:
        yield None
    elif progress is True:
        with progress_bar(total=total, unit=unit) as report:
            yield report
    elif callable(progress):
        yield progress
        progress(total)
    else:
        raise InvalidArgument(
            f"progress: found {type(progress).__name__}, expected a callable, True or None"
        )


@contextmanager
def progress_bar(
    *, total: int, unit: str = "tokens", label: str = "reading"
) -> Iterator[Callable[[int], Any]]:
    """A bar on standard error; prints nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} / {task.total:,.0f} " + unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=False, disable=not console.is_terminal
    ) as bar:
        task: TaskID = bar.add_task(label, total=total, rate="")

        def report(done: int) -> None:
            speed = bar.tasks[0].speed if bar.tasks else None
            rate = f"{speed:,.0f} {unit}/s" if speed else ""
            bar.update(task, completed=done, rate=rate)

        yield report
        report(total)
