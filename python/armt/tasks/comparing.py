"""The same questions put to two implementations of one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from armt.tasks.reading import Reader, answers_of

Ids = npt.NDArray[np.int32]
TIE = 1e-3
"""Logits closer than this are the same but for rounding."""


def compare(
    reader: Reader,
    other: Reader,
    prompts: Sequence[Ids],
    answers: Sequence[Sequence[int]],
    longest: int,
    stop_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """What ``other`` answers, and where that differs, by how much each side preferred its own token
    (``gap``, ``other_gap``: in logits, None where a reader does not tell)."""
    found = answers_of(other, prompts, longest, stop_ids)
    lines: list[dict[str, Any]] = [
        {"other": list(map(int, theirs)), "same": list(mine) == list(theirs)}
        for mine, theirs in zip(answers, found, strict=True)
    ]
    if all(line["same"] for line in lines):
        return lines
    forks = [_fork(mine, theirs) for mine, theirs in zip(answers, found, strict=True)]
    asked = [
        np.concatenate([prompt, np.array(mine[:at], np.int32)])
        for prompt, mine, at in zip(prompts, answers, forks, strict=True)
    ]
    ours, theirs = _logits(reader, asked), _logits(other, asked)
    for row, line in enumerate(lines):
        if not line["same"]:
            line["gap"] = _lead(ours, theirs, row)
            line["other_gap"] = _lead(theirs, ours, row)
    return lines


def is_tie(line: dict[str, Any]) -> bool:
    """Whether a compared answer is the same, or differs by rounding only."""
    gap = line.get("gap")
    return bool(line["same"] or (gap is not None and gap < TIE))


def _fork(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """The first place at which two answers differ."""
    pairs = zip(mine, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(theirs)))


def _logits(reader: Reader, asked: Sequence[Ids]) -> npt.NDArray[np.float32] | None:
    ask = getattr(reader, "ask_logits", None)
    return None if ask is None else np.asarray(ask(asked), np.float32)


def _lead(
    ours: npt.NDArray[np.float32] | None, theirs: npt.NDArray[np.float32] | None, row: int
) -> float | None:
    """How far our token is ahead of theirs in our logits."""
    if ours is None or theirs is None:
        return None
    return float(ours[row].max() - ours[row, int(theirs[row].argmax())])
