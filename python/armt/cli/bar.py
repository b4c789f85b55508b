"""The progress bar of a long reading: on standard error, and silent where that is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any


class ReadingBar:
    """Counts tokens; the bar itself follows ``done`` of ``total``, in whatever unit.

    A reading of unknown length (``total=None``) shows tokens and rate only.
    """

    def __init__(self, label: str, *, total: float | None, shown: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%" if total else ""),
            TextColumn("{task.fields[tokens]:,} tokens"),
            TextColumn("{task.fields[rate]:,.0f} tokens/s"),
            TextColumn("{task.fields[note]}"),
            *([TimeRemainingColumn()] if total else []),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._bar.add_task(label, total=total, tokens=0, rate=0.0, note="")
        self._since = time.perf_counter()
        self.tokens = 0
        """Tokens read in all."""
        self.seconds = 0.0
        """Time since the bar was shown, pauses left out."""

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / max(self.seconds, 1e-9)

    def update(self, done: float, tokens: int) -> None:
        """``done`` of the total and ``tokens`` have been read."""
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        self.tokens = tokens
        self._bar.update(self._task, completed=done, tokens=tokens, rate=self.rate)

    def relabel(self, label: str) -> None:
        """What is being read now."""
        self._bar.update(self._task, description=label)

    def note(self, resident: int, state: int) -> None:
        """Bytes of the process now, and of the session's state."""
        from armt.cli.output import size

        self._bar.update(self._task, note=f"memory {size(resident)}, state {size(state)}")

    def span(self, start: float, end: float, tokens: int, count: int) -> Callable[[int], None]:
        """What to call with the tokens done of a block of ``count`` that leads from ``start`` to
        ``end`` of the total, after ``tokens`` tokens."""
        return lambda n: self.update(start + (end - start) * n / count, tokens + n)

    def resume(self) -> None:
        """Time since the last update is not reading."""
        self._since = time.perf_counter()

    def __enter__(self) -> ReadingBar:
        self.resume()
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Any:
        self._bar.stop()
