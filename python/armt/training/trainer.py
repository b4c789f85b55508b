"""Trains a system by a recipe, and can stop and go on at any step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armt.errors import InvalidArgument
from armt.models import resolve
from armt.tasks.babi import make_sentences
from armt.tasks.background import read_sentences
from armt.training.babilong import LONGEST, StoryRow, StorySettings, Text
from armt.training.feed import Feed
from armt.training.folder import load_weights
from armt.training.pairs import PairRow, PairSettings, PairText
from armt.training.recipe import Recipe, Stage, parse_recipe
from armt.training.start import start
from armt.training.step import Step
from armt.training.systems import Armt, Mamba, Rmt, Shape, build
from armt.training.window import Rows, Window

VERSION = 2


@dataclass(frozen=True)
class Report:
    """Means over the steps since the last report."""

    step: int
    stage: int
    loss: float
    written: float
    """Into the memory, in segments that hold nothing."""
    right: dict[str, float]
    """Share of right answers by kind of question."""


class Trainer:
    """A model on its way. Everything random comes from the recipe's seed."""

    def __init__(
        self,
        recipe: Recipe,
        text: str,
        *,
        device: str = "cpu",
        workers: int = 0,
        save_every: int = 100,
        compiled: bool = False,
    ) -> None:
        """``text`` is the recipe's TOML, kept with the model."""
        self.recipe, self._recipe_text = recipe, text
        self.step = 0
        self._workers, self._save_every = workers, save_every
        self.text = _material(recipe)
        torch.manual_seed(recipe.seed)
        self.shape = Shape(
            vocab_size=self.text.vocab_size, segment_size=recipe.segment_size, **recipe.model
        )
        self.model: Armt | Rmt | Mamba = build(self.shape)
        if not isinstance(self.model, Mamba):
            start(self.model, list(self.text.words.values()), recipe.start.places)
        if recipe.start.folder:
            load_weights(self.model, Path(recipe.start.folder))
        self.model.to(device)
        parameters = list(self.model.parameters())
        self._device = parameters[0].device
        self._cuda = self._device.type == "cuda"
        matrices = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim == 1]
        settings = recipe.optimizer
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=torch.zeros((), device=device) if self._cuda else 0.0,
            betas=settings.betas,
            capturable=self._cuda,
            fused=self._cuda,
        )
        self._average = [p.detach().clone() for p in parameters] if settings.average else []
        if compiled:
            _compile(self.model)
        self._feed: Feed | None = None
        self._now: Step | None = None
        self._stage = -1
        self._left: dict[str, Any] | None = None
        self._carry: list[Tensor] | None = None

    @property
    def done(self) -> bool:
        """Whether all steps were made."""
        return self.step >= self.recipe.steps

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.model.parameters())

    def advance(self) -> int:
        """One step of the optimizer; the tokens it read."""
        number, inside = self.recipe.at(self.step)
        stage = self.recipe.stages[number]
        if number != self._stage:
            self._enter(number)
        assert self._feed is not None
        window = self._feed.next()
        if self._now is None:
            self._now = self._begin(window)
        for group in self._optimizer.param_groups:
            if self._cuda:
                group["lr"].fill_(stage.rate(inside))
            else:
                group["lr"] = stage.rate(inside)
        self._now.run(window)
        self.step += 1
        return window.tokens.size

    def _enter(self, number: int) -> None:
        """A stage's rows; those that an interrupted training left, where there are some."""
        self.close()
        stage, first = self.recipe.stages[number], self.step
        left, self._left = self._left, None
        if left is not None and left["stage"] != number:
            left = None
        make = functools.partial(make_rows, self.text, stage, self.recipe.seed * 1000 + number)
        self._stage = number
        self._feed = Feed(
            make,
            stage.rows,
            workers=self._workers,
            state=left["rows"] if left else None,
            keep=lambda n: (first + n) % self._save_every == 0,
        )
        self._carry = [t.to(self._device) for t in left["carry"]] if left else None

    def _begin(self, window: Window) -> Step:
        settings = self.recipe.optimizer
        return Step(
            self.model,
            self._optimizer,
            window,
            clip=settings.clip,
            calm=settings.calm,
            keep_quiet=self.recipe.stages[self._stage].keep_quiet,
            kinds=len(self.text.kinds),
            average=self._average,
            average_decay=settings.average,
            carry=self._carry,
        )

    def report(self) -> Report:
        """Means over the steps since the last report; waits for the device."""
        assert self._now is not None
        sums = self._now.sums.tolist()
        self._now.sums.zero_()
        kinds = len(self.text.kinds)
        right = {
            name: sums[i] / sums[kinds + i]
            for i, name in enumerate(self.text.kinds)
            if sums[kinds + i]
        }
        steps = max(sums[-1], 1)
        return Report(self.step, self._stage, sums[-3] / steps, sums[-2] / steps, right)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights to save: their running average, where one is kept, with the gates that the
        recipe wants."""
        found: dict[str, Tensor] = dict(self.model.state_dict())
        if self._average:
            names = [name for name, _ in self.model.named_parameters()]
            found |= dict(zip(names, self._average, strict=True))
        sharpen = self.recipe.gates.sharpen
        for layer, about in enumerate(self.recipe.gates.about):
            gate = f"memory_cell.model.transformer.h.{layer}.W_mb"
            found[f"{gate}.weight"] = sharpen * found[f"{gate}.weight"]
            found[f"{gate}.bias"] = sharpen * found[f"{gate}.bias"] + (1 - sharpen) * about
        return found

    def config(self) -> dict[str, Any]:
        """config.json: the model, the task's form and the training."""
        training = {"recipe": self._recipe_text, "steps": self.step}
        found = self.shape.config() | {"training": training}
        if isinstance(self.text, Text):
            return found | self.text.config
        return found | {"retrieval": asdict(self.recipe.layout)}

    def files(self) -> dict[str, Path]:
        """What lies beside the model."""
        if isinstance(self.text, Text):
            return {"tokenizer.json": self.text.folder / "tokenizer.json"}
        return {}

    def progress(self) -> dict[str, Any]:
        """All that is needed to go on, as torch.load(weights_only=True) reads it."""
        assert self._feed is not None and self._now is not None
        return {
            "version": VERSION,
            "recipe": self._recipe_text,
            "step": self.step,
            "stage": self._stage,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": self._average,
            "carry": self._now.carry,
            "rows": self._feed.state(),
        }

    @classmethod
    def resumed(
        cls, progress: dict[str, Any], recipe: tuple[Recipe, str] | None, **options: Any
    ) -> Trainer:
        """A trainer that goes on where another stood; with another recipe, if one is given."""
        try:
            if progress["version"] != VERSION:
                raise InvalidArgument(
                    f"training.pt: found version {progress['version']}, expected {VERSION}"
                )
            text = progress["recipe"]
            trainer = cls(*(recipe or (parse_recipe(text), text)), **options)
            trainer.step = progress["step"]
            trainer.model.load_state_dict(progress["model"])
            rates = [group["lr"] for group in trainer._optimizer.param_groups]
            trainer._optimizer.load_state_dict(progress["optimizer"])
            for group, rate in zip(trainer._optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            if trainer._average and progress["average"]:
                for mine, other in zip(trainer._average, progress["average"], strict=True):
                    mine.copy_(other)
            trainer._left = {name: progress[name] for name in ("stage", "carry", "rows")}
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise InvalidArgument(f"training.pt: does not fit: {error}") from error
        return trainer

    def close(self) -> None:
        """Ends the processes that make windows."""
        if self._feed is not None:
            self._feed.close()
        self._feed, self._now = None, None


def _material(recipe: Recipe) -> Text | PairText:
    if recipe.task == "retrieval":
        return PairText(recipe.layout)
    material = recipe.material
    folder = Path(material.tokenizer) if material.tokenizer else resolve("babilong")
    if material.book:
        return Text(folder, read_sentences(material.book))
    return Text(folder, make_sentences(seed=recipe.seed))


def make_rows(text: Text | PairText, stage: Stage, seed: int, numbers: Sequence[int]) -> Rows:
    """Some rows of a stage's batch."""
    make: Callable[[int], Any]
    if isinstance(text, Text):
        assert isinstance(stage.task, StorySettings)
        make = functools.partial(StoryRow, stage.task, text, seed)
        longest = LONGEST
    else:
        assert isinstance(stage.task, PairSettings)
        make = functools.partial(PairRow, stage.task, text, seed)
        longest = text.layout.key_symbols + 1

    def blank(rows: int) -> Window:
        return Window.empty(rows, stage.segments, stage.length, stage.asks, longest)

    return Rows(make, numbers, blank)


def _compile(model: Armt | Rmt | Mamba) -> None:
    torch._dynamo.config.cache_size_limit = 64
    layers = model.layers if isinstance(model, Mamba) else model.decoder.h
    for layer in layers:
        layer.compile(dynamic=False)
