"""Perplexity of a text of any length, in one streaming pass."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from armt.errors import InvalidArgument
from armt.session import Session
from armt.tasks.reading import SEGMENTS_A_CALL, blocks

Ids = npt.NDArray[np.int32]


@dataclass
class Perplexity:
    """What a model made of a text; log-likelihoods in nats."""

    tokens: int = 0
    """Tokens read."""
    scored: int = 0
    """Tokens with a prediction: all but the first of an empty session."""
    log_likelihood: float = 0.0
    seconds: float = 0.0

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        mean = -self.log_likelihood / max(self.scored, 1)
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_token(self) -> float:
        """Mean negative log-likelihood in bits."""
        return -self.log_likelihood / max(self.scored, 1) / math.log(2)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "perplexity": self.perplexity,
            "bits_per_token": self.bits_per_token,
            "log_likelihood": self.log_likelihood,
            "tokens": self.tokens,
            "scored": self.scored,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
        }


def evaluate(
    session: Session, stream: Iterable[Ids], report: Callable[[Perplexity], Any] | None = None
) -> Perplexity:
    """Scores the ids of ``stream`` as the continuation of ``session``, holding one block at a
    time. ``report`` is called after each block. InvalidArgument if there is nothing to score."""
    found = Perplexity()
    start = time.perf_counter()
    for ids in blocks(iter(stream), SEGMENTS_A_CALL * session.engine.segment_size):
        scores = session.score(ids)
        known = scores[~np.isnan(scores)] if found.tokens == 0 else scores
        found.tokens += len(ids)
        found.scored += len(known)
        found.log_likelihood += float(known.sum())
        found.seconds = time.perf_counter() - start
        if report is not None:
            report(found)
    if found.scored == 0:
        raise InvalidArgument("perplexity: the text is empty, expected at least two tokens")
    return found
