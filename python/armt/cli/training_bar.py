"""What is shown while a model trains, and Ctrl-C that waits for the step to end."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from armt.training.trainer import Report


class TrainingBar:
    """Steps, rate, time left, stage, loss and accuracy; silent where there is no terminal."""

    def __init__(self, steps: int, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.completed:,}/{task.total:,} steps"),
            TextColumn("{task.fields[rate]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.3f}, {task.fields[right]}"),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._bar.add_task("", total=steps, rate=0.0, loss=0.0, right="")

    def update(self, report: Report, rate: float) -> None:
        """A report and the tokens read in a second."""
        right = " ".join(f"{name} {share:.0%}" for name, share in report.right.items())
        self._bar.update(
            self._task, completed=report.step, loss=report.loss, right=right, rate=rate
        )

    def __enter__(self) -> TrainingBar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


class PatientInterrupt:
    """Notes the first Ctrl-C instead of breaking off; the second one breaks off."""

    def __init__(self) -> None:
        self.stop = False
        self._before: Any = None

    def __enter__(self) -> PatientInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
