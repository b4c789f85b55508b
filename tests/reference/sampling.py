"""Choosing a token as plainly as it can be said: sort, cut, draw."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def choose(
    logits: npt.NDArray[np.float64],
    u: float,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """The token for a uniform number u in [0, 1). Of equal logits the lower id counts as likelier.

    What is drawn from stands in the order of its ids, behind top_p in the order of likelihood.
    """
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    weights = np.exp((logits[order] - logits.max()) / temperature)
    if top_p < 1.0:
        reached = np.cumsum(weights) >= top_p * weights.sum()
        order = order[: int(np.argmax(reached)) + 1 if reached.any() else len(order)]
    kept = order[weights[: len(order)] >= min_p]
    if top_p == 1.0:
        kept = np.sort(kept)
    sums = np.cumsum(np.exp((logits[kept] - logits.max()) / temperature))
    return int(kept[np.searchsorted(sums, u * sums[-1], side="right")])
