"""How fast an engine reads and writes tokens, after a check that its answers agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from armt.engine import Engine
from armt.errors import DeviceError

Ids = npt.NDArray[np.int32]
LARGEST_DIFFERENCE = {"cpu": 0.0}
"""Between one reading and the same in pieces, as a share of the largest logit; GPUs are less
exact."""


def random_ids(engine: Engine, count: int, seed: int = 0) -> Ids:
    """[count] ids of the engine's vocabulary."""
    return np.random.default_rng(seed).integers(0, engine.vocab_size, count).astype(np.int32)


def self_check(engine: Engine) -> float:
    """Reads two and a half segments whole and in pieces; the largest difference of the last logits
    as a share of the largest logit. DeviceError where it is too large."""
    ids = random_ids(engine, max(engine.segment_size * 5 // 2, 2), seed=1)
    with engine.session() as whole, engine.session() as pieces:
        expected = whole.feed(ids, logits="last").logits
        cut = len(ids) // 3 or 1
        pieces.feed(ids[:cut])
        found = pieces.feed(ids[cut:], logits="last").logits
    assert expected is not None and found is not None
    difference = float(np.abs(expected - found).max() / max(np.abs(expected).max(), 1e-9))
    allowed = LARGEST_DIFFERENCE.get(engine.device, 0.05)
    if not difference <= allowed:
        raise DeviceError(
            f"self-check: reading in pieces differs by {difference:.2e} from reading at once, "
            f"expected at most {allowed:.2e}; please report this machine"
        )
    return difference


def timed(
    work: Callable[[], int], *, seconds: float, report: Callable[[], Any] | None = None
) -> dict[str, Any]:
    """Tokens a second of ``work``, which returns its number of tokens: one run to warm up, then at
    least three for ``seconds`` seconds or more."""
    work()
    rates: list[float] = []
    tokens = 0
    start = time.perf_counter()
    while len(rates) < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        tokens = work()
        rates.append(tokens / (time.perf_counter() - before))
        if report is not None:
            report()
    return {
        "tokens_per_second": statistics.median(rates),
        "least": min(rates),
        "most": max(rates),
        "runs": len(rates),
        "tokens": tokens,
    }


def reader(engine: Engine, tokens: int) -> Callable[[], int]:
    """Reads ``tokens`` tokens into an empty session."""
    ids = random_ids(engine, tokens)

    def work() -> int:
        with engine.session() as session:
            session.feed(ids)
        return tokens

    return work


def writer(engine: Engine, tokens: int, sessions: int) -> Callable[[], int]:
    """Writes ``tokens`` tokens one by one in each of ``sessions`` sessions, read beforehand."""
    read = [engine.session() for _ in range(sessions)]
    ids = random_ids(engine, engine.segment_size // 2 or 1)
    engine.feed_many([(session, ids) for session in read])

    def work() -> int:
        branches = [session.fork() for session in read]
        engine.generate_many(branches, tokens)
        for branch in branches:
            branch.close()
        return tokens * sessions

    return work
