"""All tolerances of the tests, one table, and the comparison that uses them.

A tolerance allows |found - expected| <= absolute + relative * max |expected| for every element:
relative to the largest value of the array, since a sum that cancels loses absolute accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Tolerance:
    absolute: float = 0.0
    relative: float = 0.0

    def bound(self, expected: npt.NDArray[Any]) -> float:
        """The largest difference that passes."""
        return self.absolute + self.relative * float(np.abs(expected).max(initial=0.0))


EXACT = Tolerance()

# (operation, element type) -> tolerance. Float64 rows are for the reference itself, the others for
# the engine against the reference run on the same, already rounded weights and inputs.
TOLERANCES: dict[tuple[str, str], Tolerance] = {
    ("conformance_logits", "float64"): Tolerance(absolute=1e-10, relative=1e-10),
    ("conformance_memory", "float64"): Tolerance(relative=1e-10),
    ("conformance_trace", "float64"): Tolerance(absolute=1e-12, relative=1e-10),
    ("conformance_unit", "float64"): Tolerance(relative=1e-12),
    # the stored feature map vectors are float32
    ("feature_map", "float32"): Tolerance(relative=2e-7),
    # single operations against float64 on the same float32 inputs
    ("memory_read", "float32"): Tolerance(relative=5e-6),
    ("memory_write", "float32"): Tolerance(relative=5e-6),
    ("rotate", "float32"): Tolerance(relative=5e-7),
    ("attend", "float32"): Tolerance(relative=5e-6),
    # stored logits of earlier releases, made with another instruction set
    ("state_corpus", "float32"): Tolerance(relative=1e-4),
    # on a GPU: the published cases, and random models against the CPU engine with the same weights
    ("cuda_conformance", "float32"): Tolerance(relative=1e-4),
    # beside what rounding the weights does to the very model (test_cuda.py)
    ("cuda_half", "bfloat16"): Tolerance(relative=5e-2),
    ("cuda_half", "float16"): Tolerance(relative=1e-2),
    ("cuda_engine", "float32"): Tolerance(relative=1e-4),
    # the largest difference (a small denominator magnifies rounding in a row or two), and the root
    # mean square of all
    ("cuda_engine", "bfloat16"): Tolerance(relative=2.5e-1),
    ("cuda_engine_rms", "bfloat16"): Tolerance(relative=1e-2),
    # prefill in 8 bits, logits of bfloat16 models, root mean square over that of the logits
    ("cuda_fp8_rms", "fp8"): Tolerance(relative=1e-1),
    ("identity", "float64"): Tolerance(absolute=1e-12, relative=1e-12),
}


def tolerance(operation: str, dtype: str) -> Tolerance:
    """The entry of the table; a missing one is an error of the test."""
    return TOLERANCES[operation, dtype]


def worst_difference(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Largest |found - expected|; infinite where one of them is not a number."""
    difference = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
    return float(np.where(np.isnan(difference), np.inf, difference).max(initial=0.0))


def assert_close(
    what: str,
    found: npt.NDArray[Any],
    expected: npt.NDArray[Any],
    limit: Tolerance,
    *,
    where: npt.NDArray[np.bool_] | None = None,
) -> None:
    """Compares two arrays and names the worst element. `where` covers the leading axes."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    difference = np.where(np.isnan(difference), np.inf, difference)
    if where is not None:
        where = where.reshape(where.shape + (1,) * (expected.ndim - where.ndim))
        difference = np.where(where, difference, 0.0)
        expected_used = np.where(where, expected, 0.0)
    else:
        expected_used = expected
    bound = limit.bound(expected_used)
    if difference.size and difference.max() > bound:
        worst = np.unravel_index(int(difference.argmax()), difference.shape)
        index = ", ".join(str(int(i)) for i in worst)
        raise AssertionError(
            f"{what}[{index}]: found {found[worst]!r}, expected {expected[worst]!r}, "
            f"difference {difference[worst]:.3g} > {bound:.3g}; "
            f"{int((difference > bound).sum())} of {difference.size} elements differ"
        )


# Random models: a float32 engine may differ by this many times what one float32 rounding of every
# weight changes (reference.sensitivity), as the conformance tolerances are eight times the
# published code's own error. The floor is theirs too.
MEASURED_FACTOR = 8.0
MEASURED_FLOOR = 2e-5


def measured_bound(change: float) -> float:
    """The difference allowed where one rounding of every weight changes the answer by `change`."""
    return max(MEASURED_FLOOR, MEASURED_FACTOR * change)
