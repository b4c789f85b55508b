"""Reading a folder of conformance vectors: stored cases, single steps, feature maps.

Everything is derived from config.json and from the files that are present, so folders of the same
form that nobody has seen yet work as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tolerances import Tolerance

AnyArray: TypeAlias = npt.NDArray[Any]
FLOAT64_SUFFIX = "_f64"


def read_npz(path: Path) -> dict[str, AnyArray]:
    """All arrays of an archive."""
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


@dataclass(frozen=True)
class Case:
    """One folder with a model, an input and the published answers."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def config(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return loaded

    @cached_property
    def arrays(self) -> dict[str, AnyArray]:
        return read_npz(self.folder / "case.npz")

    @cached_property
    def trace(self) -> dict[str, AnyArray] | None:
        """Every intermediate value in float64, where the folder stores them."""
        path = self.folder / "trace.npz"
        return read_npz(path) if path.is_file() else None

    @property
    def dialect(self) -> str:
        return str(self.config["dialect"])

    @property
    def armt(self) -> Mapping[str, Any]:
        settings: Mapping[str, Any] = self.config["armt"]
        return settings

    @property
    def base_model(self) -> Mapping[str, Any]:
        base: Mapping[str, Any] = self.config["base_model"]
        return base

    @property
    def input_ids(self) -> AnyArray:
        """[batch, tokens] int64."""
        return self.arrays["input_ids"]

    @property
    def attention_mask(self) -> AnyArray | None:
        """[batch, tokens], 0 at padding; None where the case has no padding."""
        return self.arrays.get("attention_mask")

    @property
    def real(self) -> npt.NDArray[np.bool_]:
        """[batch, tokens], true where logits mean something."""
        mask = self.attention_mask
        return np.ones(self.input_ids.shape, dtype=bool) if mask is None else mask != 0

    @property
    def segment_lengths(self) -> list[int] | None:
        """How the sequence is cut, where stored."""
        lengths = self.arrays.get("segment_lengths")
        return None if lengths is None else [int(length) for length in lengths]

    @property
    def generates(self) -> bool:
        return "generated_ids" in self.arrays

    def expected(self, name: str) -> AnyArray | None:
        """A stored answer, in float64 where there is one: logits, memory_A, memory_z, ..."""
        return self.arrays.get(name + FLOAT64_SUFFIX, self.arrays.get(name))

    @property
    def logits_tolerance(self) -> Tolerance:
        """What a float32 engine is asked to meet at unpadded positions."""
        return Tolerance(absolute=self.config["tolerance"]["logits_absolute_float32"])

    @property
    def memory_tolerance(self) -> Tolerance:
        """What a float32 engine is asked to meet in its final state."""
        return Tolerance(relative=self.config["tolerance"]["memory_relative_float32"])


def find_cases(directory: Path) -> list[Case]:
    """All folders with a configuration and answers, by name."""
    found = sorted(path.parent for path in directory.glob("*/case.npz"))
    return [Case(folder) for folder in found if (folder / "config.json").is_file()]


@dataclass(frozen=True)
class UnitStep:
    """Three writes and reads on one memory layer without a transformer."""

    name: str
    settings: Mapping[str, Any]
    arrays: Mapping[str, AnyArray]

    @property
    def writes(self) -> int:
        return sum(f"write{s}_tokens" in self.arrays for s in range(len(self.arrays)))

    def expected(self, name: str) -> AnyArray | None:
        """A stored answer, in float64 where there is one."""
        return self.arrays.get(name + FLOAT64_SUFFIX, self.arrays.get(name))


def find_unit_steps(directory: Path) -> list[UnitStep]:
    """All entries of units/index.json that describe a memory layer."""
    units = directory / "units"
    if not (units / "index.json").is_file():
        return []
    index: dict[str, Any] = json.loads((units / "index.json").read_text())
    return [
        UnitStep(name.removesuffix(".npz"), settings, read_npz(units / name))
        for name, settings in sorted(index.items())
        if isinstance(settings, dict)
    ]


@dataclass(frozen=True)
class FeatureMapCase:
    """Rows x [rows, n] and their features y [rows, 2 * nu * n]."""

    nu: int
    n: int
    x: AnyArray
    y: AnyArray

    @property
    def name(self) -> str:
        return f"nu{self.nu}_n{self.n}"


def find_feature_maps(directory: Path) -> list[FeatureMapCase]:
    """All pairs of units/feature_map.npz."""
    path = directory / "units" / "feature_map.npz"
    if not path.is_file():
        return []
    arrays = read_npz(path)
    cases = []
    for name, x in arrays.items():
        if name.startswith("x_"):
            y = arrays["y" + name[1:]]
            n = x.shape[-1]
            cases.append(FeatureMapCase(y.shape[-1] // (2 * n), n, x, y))
    return cases
