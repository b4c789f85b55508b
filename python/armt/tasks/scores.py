"""Shares of right answers, with what chance leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """``right`` of ``samples`` answers, in ``seconds``, after reading ``tokens`` tokens in all."""

    right: int
    samples: int
    tokens: int
    seconds: float

    @classmethod
    def of(cls, answers: Sequence[Mapping[str, Any]]) -> Score:
        """The score of answers with the fields right, tokens and seconds."""
        return cls(
            sum(bool(a["right"]) for a in answers),
            len(answers),
            sum(int(a["tokens"]) for a in answers),
            sum(float(a["seconds"]) for a in answers),
        )

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        n, p, z2 = self.samples, self.accuracy, 1.96**2
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = (z2 * (p * (1 - p) / n + z2 / (4 * n * n))) ** 0.5 / (1 + z2 / n)
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "right": self.right,
            "samples": self.samples,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
        }
