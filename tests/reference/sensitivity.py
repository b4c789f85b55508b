"""How far rounding to float32 can move a model's answers: a yardstick for tolerances.

Random models differ widely: a small denominator in a read magnifies rounding by thousands. So the
tolerance of a float32 engine on a random model is measured, not guessed: every weight is moved by
one float32 rounding at random and the answers are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Array
from .checkpoint import model_from_tensors
from .model import State, forward

FLOAT32_ROUNDING = 2.0**-24


@dataclass(frozen=True)
class Sensitivity:
    """Largest changes seen: of a logit, and of the state relative to its largest value."""

    logits_absolute: float
    memory_relative: float


def perturbed(weights: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """Every element times 1 + e with |e| one float32 rounding."""
    return {
        name: tensor * (1.0 + FLOAT32_ROUNDING * rng.choice([-1.0, 1.0], size=tensor.shape))
        for name, tensor in weights.items()
    }


def rounding_sensitivity(
    config: Mapping[str, Any],
    weights: Mapping[str, Array],
    input_ids: npt.NDArray[Any],
    attention_mask: npt.NDArray[Any] | None = None,
    *,
    runs: int = 4,
    seed: int = 0,
) -> Sensitivity:
    """Changes of the answers over `runs` random perturbations of the weights."""
    real = np.ones(input_ids.shape, bool) if attention_mask is None else attention_mask != 0
    rng = np.random.default_rng(seed)
    exact, state = forward(model_from_tensors(config, weights), input_ids, attention_mask)
    logits, memory = 0.0, 0.0
    for _ in range(runs):
        model = model_from_tensors(config, perturbed(weights, rng))
        moved, moved_state = forward(model, input_ids, attention_mask)
        logits = max(logits, float(np.abs(moved - exact)[real].max()))
        memory = max(memory, _state_change(moved_state, state))
    return Sensitivity(logits, memory)


def _state_change(found: State, expected: State) -> float:
    pairs = (
        (found.A, expected.A),
        (found.z, expected.z),
        (found.memory_state, expected.memory_state),
    )
    return max(
        float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
        for a, b in pairs
        if a is not None and b is not None
    )
