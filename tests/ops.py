"""What the tests of single operations share."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from armt._core import testing

Floats: TypeAlias = npt.NDArray[np.float32]

each_isa = pytest.mark.parametrize("isa", testing.available_isas())


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Floats:
    """Normal numbers in float32."""
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def assert_same_bits(what: str, found: Floats | None, expected: Floats | None) -> None:
    """memcmp, so that a NaN or the sign of a zero counts."""
    if found is None or expected is None:
        assert found is expected, what
        return
    assert found.shape == expected.shape, what
    differ = found.view(np.uint32) != expected.view(np.uint32)
    assert not differ.any(), f"{what}: {differ.sum()} of {differ.size} elements differ"
