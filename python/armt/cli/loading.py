"""A bar for weights that take a while to read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from armt.checkpoint import Checkpoint
from armt.checkpoint.arrays import ITEM_BYTES, Array
from armt.checkpoint.checkpoint import TensorPlan

LARGE = 200 * 2**20
"""Bytes of weights from which on a bar is shown."""


@contextmanager
def reading_weights(checkpoint: Checkpoint, label: str) -> Iterator[Checkpoint]:
    """The same checkpoint, whose tensors move a bar on standard error when they are read.

    The bar vanishes at the end; there is none for small models and where that is no terminal.
    """
    from rich.console import Console

    console = Console(stderr=True)
    total = sum(map(_bytes, checkpoint.plans))
    if total < LARGE or not console.is_terminal:
        yield checkpoint
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        plans = (_told(plan, lambda size: bar.advance(task, size)) for plan in checkpoint.plans)
        yield dataclasses.replace(checkpoint, plans=tuple(plans))


def _bytes(plan: TensorPlan) -> int:
    return math.prod(plan.shape) * ITEM_BYTES[plan.dtype]


def _told(plan: TensorPlan, tell: Callable[[int], None]) -> TensorPlan:
    def read() -> Array:
        array = plan.read()
        tell(_bytes(plan))
        return array

    return dataclasses.replace(plan, read=read)
