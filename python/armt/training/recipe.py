"""A recipe: everything that decides what a training gives, as a TOML file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from armt.errors import InvalidArgument
from armt.tasks.retrieval import Layout
from armt.training.babilong import StorySettings
from armt.training.pairs import PairSettings
from armt.training.shape import Shape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

TASKS: dict[str, type[StorySettings] | type[PairSettings]] = {
    "babilong": StorySettings,
    "retrieval": PairSettings,
}
T = TypeVar("T")
Signed: TypeAlias = float
"""Other numbers of a recipe are 0 or more."""


@dataclass(frozen=True)
class Material:
    """Where the text comes from."""

    tokenizer: str = ""
    """babilong: a checkpoint folder with tokenizer.json; empty: the one that comes with armt."""
    book: str = ""
    """babilong: a text file (also .xz, .gz); empty: sentences made up on the spot."""
    key_symbols: int = 2
    """retrieval: symbols of a key."""


@dataclass(frozen=True)
class Optimizing:
    """AdamW and what is around it."""

    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    """Largest norm of the gradient."""
    calm: float = 0.02
    """Weight of what is written beyond measure: a memory that feeds on what it reads grows without
    an end."""
    average: float = 0.0
    """Share of the old average in the running average of the weights that is saved; 0: none."""


@dataclass(frozen=True)
class Beginning:
    """What the weights are at first (:mod:`armt.training.start`)."""

    places: tuple[int, ...] = ()
    """Heads of even layers look at these places of a segment; none: some tokens back."""
    folder: str = ""
    """Goes on with the weights of this checkpoint."""


@dataclass(frozen=True)
class Gates:
    """How the memory's gates are saved: log odds x of layer i become about[i] + sharpen
    (x - about[i]). Gates are wide open at facts and all but shut in a text that holds nothing; what
    they let through there is little, but adds up over millions of tokens."""

    sharpen: float = 1.0
    about: tuple[Signed, ...] = ()
    """Log odds at facts, a value a layer: these stay."""


@dataclass(frozen=True)
class Stage:
    """A part of the training with batches of one size."""

    steps: int
    rows: int
    """Of the batch."""
    segments: int
    """Of a window, through all of which the gradient runs."""
    length: int
    """Tokens of a segment."""
    asks: int
    """Questions about a segment."""
    lr: tuple[float, float]
    """Learning rate at its beginning and its end; in between a straight line."""
    warm_up: int = 0
    """Steps at the beginning in which the rate rises from 0."""
    keep_quiet: float = 0.0
    """Weight of what is written into the memory in segments that hold nothing. Too early it teaches
    the memory to write nothing at all."""
    task: StorySettings | PairSettings = field(default_factory=StorySettings)

    def rate(self, step: int) -> float:
        """The learning rate of a step of this stage."""
        first, last = self.lr
        rate = first + (last - first) * step / max(self.steps - 1, 1)
        return rate * min((step + 1) / max(self.warm_up, 1), 1.0)


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how. The same recipe gives the same model on the same machine."""

    task: str
    model: Mapping[str, Any]
    """Sizes as in :class:`armt.training.shape.Shape`, but for the vocabulary and the segment."""
    stages: tuple[Stage, ...]
    segment_size: int
    seed: int = 0
    material: Material = field(default_factory=Material)
    optimizer: Optimizing = field(default_factory=Optimizing)
    start: Beginning = field(default_factory=Beginning)
    gates: Gates = field(default_factory=Gates)

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def layout(self) -> Layout:
        """retrieval: the tokens of pairs and questions."""
        return Layout(key_symbols=self.material.key_symbols)

    def at(self, step: int) -> tuple[int, int]:
        """The stage of a step, and the step inside it; the last stage's end behind the end."""
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number, step
            step -= stage.steps
        return len(self.stages) - 1, self.stages[-1].steps


def read_recipe(path: Path) -> tuple[Recipe, str]:
    """A recipe and its text; InvalidArgument for a file that is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: cannot be read: {error}") from error
    return parse_recipe(text, str(path)), text


def parse_recipe(text: str, where: str = "recipe") -> Recipe:
    """A recipe of TOML text; InvalidArgument names what is wrong, and where."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"{where}: {error}; expected TOML") from error
    task = found.get("task")
    if task not in TASKS:
        raise InvalidArgument(f"{where}: task: found {task!r}, expected {' or '.join(TASKS)}")
    stages = found.pop("stage", [])
    if not isinstance(stages, list) or not stages:
        raise InvalidArgument(f"{where}: found no [[stage]], expected one or more")
    found["stages"] = tuple(
        _stage(stage, TASKS[task], f"{where}: stage {i}") for i, stage in enumerate(stages, 1)
    )
    for name, cls in (
        ("material", Material),
        ("optimizer", Optimizing),
        ("start", Beginning),
        ("gates", Gates),
    ):
        found[name] = _build(cls, found.get(name, {}), f"{where}: {name}")
    recipe = _build(Recipe, found, where)
    for number, stage in enumerate(recipe.stages, 1):
        _check(stage, recipe, f"{where}: stage {number}")
    _check_gates(recipe, f"{where}: gates")
    return recipe


def _stage(found: Any, kind: type[StorySettings] | type[PairSettings], where: str) -> Stage:
    if not isinstance(found, dict):
        raise InvalidArgument(f"{where}: found {type(found).__name__}, expected a table")
    own = {f.name for f in fields(Stage)} - {"task"}
    rest = {name: value for name, value in found.items() if name not in own}
    settings = _build(kind, rest, where)
    return _build(Stage, {k: v for k, v in found.items() if k in own} | {"task": settings}, where)


def _build(cls: type[T], found: Any, where: str) -> T:
    """A dataclass from a table; unknown, missing and wrong entries are refused."""
    if not isinstance(found, dict):
        raise InvalidArgument(f"{where}: found {type(found).__name__}, expected a table")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise InvalidArgument(
            f"{where}: found {', '.join(unknown)}, expected some of {', '.join(sorted(known))}"
        )
    missing = [
        name
        for name, f in known.items()
        if f.default is MISSING and f.default_factory is MISSING and name not in found
    ]
    if missing:
        raise InvalidArgument(f"{where}: found no {', '.join(missing)}")
    values = {
        name: _fitting(value, str(known[name].type), f"{where}: {name}")
        for name, value in found.items()
    }
    return cls(**values)


def _fitting(value: Any, wanted: str, where: str) -> Any:
    """``value`` if it is of the written type."""
    if wanted.startswith("tuple[") and isinstance(value, list):
        parts = [part.strip() for part in wanted[6:-1].split(",")]
        kinds = parts[:1] * len(value) if parts[-1] == "..." else parts
        if not value or len(kinds) != len(value):
            raise InvalidArgument(f"{where}: found {len(value)} values, expected {wanted}")
        return tuple(_fitting(v, k, where) for v, k in zip(value, kinds, strict=True))
    kinds_of: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "Signed": (int, float),
        "str": (str,),
    }
    if wanted in kinds_of:
        fits = isinstance(value, kinds_of[wanted]) and not isinstance(value, bool)
        if not fits:
            name = "a number" if wanted == "Signed" else wanted
            raise InvalidArgument(f"{where}: found {value!r}, expected {name}")
        if isinstance(value, str):
            return value
        if value < 0 and wanted != "Signed":
            raise InvalidArgument(f"{where}: found {value!r}, expected 0 or more")
        return value if wanted == "int" else float(value)
    if wanted.startswith("Mapping") and not isinstance(value, dict):
        raise InvalidArgument(f"{where}: found {value!r}, expected a table")
    return value


def _check(stage: Stage, recipe: Recipe, where: str) -> None:
    for name in ("steps", "rows", "segments", "length", "asks"):
        if getattr(stage, name) < 1:
            raise InvalidArgument(f"{where}: {name}: found 0, expected 1 or more")
    if stage.length > recipe.segment_size:
        raise InvalidArgument(
            f"{where}: length: found {stage.length}, expected at most the segment_size "
            f"{recipe.segment_size}"
        )


def _check_gates(recipe: Recipe, where: str) -> None:
    gates, system = recipe.gates, recipe.model.get("system", Shape.system)
    if gates == Gates():
        return
    if system != "armt":
        raise InvalidArgument(f"{where}: {system} has none")
    if gates.sharpen < 1:
        raise InvalidArgument(f"{where}: sharpen: found {gates.sharpen:g}, expected 1 or more")
    layers = recipe.model.get("layers", Shape.layers)
    if len(gates.about) != layers:
        raise InvalidArgument(
            f"{where}: about: found {len(gates.about)} values, expected {layers}, one a layer"
        )
