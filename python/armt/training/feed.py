"""Windows for the trainer, made here or by processes beside it."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from armt.training.window import Rows, Window

AHEAD = 3
"""Windows that each process makes in advance."""
MakeRows = Callable[[Sequence[int]], Rows]


class Feed:
    """The rows of a batch, spread over ``workers`` processes (0: made in this one).

    ``keep(n)`` says whether the state behind the n-th window will be asked for.
    """

    def __init__(
        self,
        make: MakeRows,
        rows: int,
        *,
        workers: int = 0,
        state: str | None = None,
        keep: Callable[[int], bool] = lambda n: False,
    ) -> None:
        self._states: list[str] = []
        self._queues: list[Any] = []
        self._processes: list[Any] = []
        self._own: Rows | None = None
        self._keep, self._count = keep, 0
        known = json.loads(state) if state is not None else None
        if not workers:
            self._own = make(range(rows))
            if state is not None:
                self._own.restore(state)
            return
        context = multiprocessing.get_context("fork")
        for part in np.array_split(np.arange(rows), min(workers, rows)):
            queue = context.Queue(AHEAD)
            first, last = int(part[0]), int(part[-1]) + 1
            before = json.dumps(known[first:last]) if known is not None else None
            arguments = (make, range(first, last), before, keep, queue)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            self._queues.append(queue)
            self._processes.append(process)

    def next(self) -> Window:
        """The next window."""
        self._count += 1
        if self._own is not None:
            return self._own.next()
        parts = [queue.get() for queue in self._queues]
        for _, state in parts:
            if isinstance(state, BaseException):
                raise state
        if self._keep(self._count):
            self._states = [state for _, state in parts]
        arrays = [values for values, _ in parts]
        return Window(**{n: np.concatenate([a[n] for a in arrays]) for n in arrays[0]})

    def state(self) -> str:
        """Where the rows stand behind the last window, which ``keep`` must have named."""
        if self._own is not None:
            return self._own.state()
        return json.dumps([row for part in self._states for row in json.loads(part)])

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        self._processes, self._queues = [], []


def _work(
    make: MakeRows,
    numbers: Sequence[int],
    state: str | None,
    keep: Callable[[int], bool],
    queue: Any,
) -> None:
    parent = os.getppid()
    try:
        rows = make(numbers)
        if state is not None:
            rows.restore(state)
        count = 0
        while os.getppid() == parent:
            window = rows.next()
            count += 1
            queue.put((window.arrays(), rows.state() if keep(count) else None))
    except KeyboardInterrupt:
        pass
    except BaseException as error:  # it is raised again where the window is asked for
        queue.put(({}, error))
