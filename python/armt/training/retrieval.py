"""Learning to remember pairs: what is read, what is asked, and the curriculum.

A step reads n pairs of key and value, one a segment, in every row of its batch. From the second
segment on a few questions are asked in passing, over the memory as it is and without a trace, and
more at the end: so the gradient reaches every write. The gradient runs through all segments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from armt.errors import InvalidArgument
from armt.tasks.retrieval import Layout
from armt.training.model import Armt, Shape
from armt.training.start import start

Ids = npt.NDArray[np.int64]
SMOOTHING = 0.9
"""Of the running accuracy."""


@dataclass(frozen=True)
class Plan:
    """What to train, and how. The same plan and threads give the same model."""

    steps: int = 2000
    batch: int = 64
    pairs: tuple[int, ...] = (5, 10, 20)
    """The curriculum: most pairs of a sample in each stage."""
    rewrite: float = 0.5
    """Share of samples whose keys come again."""
    enough: float = 0.95
    """The next stage begins at this accuracy, or when the stage's share of steps is used."""
    asked: int = 2
    """Questions in passing."""
    asked_last: int = 8
    lr: float = 1e-3
    warm_up: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    key_symbols: int = 2
    width: int = 128
    layers: int = 4
    heads: int = 4
    memory_tokens: int = 4
    d_mem: int = 64

    def __post_init__(self) -> None:
        counts = ("steps", "batch", "asked", "asked_last", "key_symbols")
        for name in counts:
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name}: found {getattr(self, name)}, expected 1 or more")
        keys = self.layout.keys
        rising = all(a < b for a, b in zip(self.pairs, self.pairs[1:], strict=False))
        if not self.pairs or not rising or not 1 <= self.pairs[0] <= self.pairs[-1] <= keys:
            raise InvalidArgument(
                f"pairs: found {self.pairs}, expected rising numbers from 1 to {keys}, the number "
                "of different keys"
            )
        if not 0 <= self.rewrite <= 1:
            raise InvalidArgument(f"rewrite: found {self.rewrite}, expected 0 .. 1")

    @property
    def layout(self) -> Layout:
        """The tokens of pairs and questions."""
        return Layout(key_symbols=self.key_symbols)

    @property
    def shape(self) -> Shape:
        """Sizes of the model."""
        layout = self.layout
        return Shape(
            vocab_size=layout.filler + 1,
            segment_size=layout.segment,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            memory_tokens=self.memory_tokens,
            d_mem=self.d_mem,
        )

    def rate(self, step: int) -> float:
        """The learning rate: up in a line, down in a cosine to a tenth."""
        if step < self.warm_up:
            return self.lr * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(self.steps - self.warm_up, 1)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))

    def to_json(self) -> dict[str, Any]:
        """For files."""
        return asdict(self) | {"pairs": list(self.pairs)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Plan:
        """The reverse; unknown names are refused."""
        names = {f.name for f in fields(cls)}
        if set(found) != names:
            raise InvalidArgument(f"plan: found {sorted(found)}, expected {sorted(names)}")
        return cls(**found | {"pairs": tuple(found["pairs"])})


@dataclass
class Standing:
    """Where a training stands."""

    step: int = 0
    stage: int = 0
    stage_began: int = 0
    accuracy: float = 0.0
    """Of this stage, a running mean."""

    def advance(self, plan: Plan, right: float) -> None:
        """One step was made, with so many questions answered rightly."""
        self.step += 1
        self.accuracy = SMOOTHING * self.accuracy + (1 - SMOOTHING) * right
        last = self.stage == len(plan.pairs) - 1
        share = (plan.steps - self.stage_began) / (len(plan.pairs) - self.stage)
        used_up = self.step - self.stage_began >= share
        if not last and (self.accuracy >= plan.enough or used_up):
            self.stage += 1
            self.stage_began = self.step
            self.accuracy = 0.0


@dataclass(frozen=True)
class Report:
    """One step's figures."""

    step: int
    pairs: int
    loss: float
    accuracy: float
    tokens: int


@dataclass(frozen=True)
class Batch:
    """Pairs, and what is asked before each segment and behind the last."""

    pairs: Tensor
    """[B, n, segment] token ids."""
    questions: list[Tensor] = field(default_factory=list)
    """n + 1 of [B, Q, key symbols + 1]; nothing is asked before the first segment: Q = 0."""
    answers: list[Tensor] = field(default_factory=list)
    """n + 1 of [B, Q]"""


def make_batch(plan: Plan, most: int, rng: np.random.Generator) -> Batch:
    """A random batch of up to ``most`` pairs, more than half as many."""
    layout = plan.layout
    count = int(rng.integers((most + 1) // 2, most + 1))
    keys = _keys(plan, count, rng)
    values = rng.integers(0, layout.alphabet, keys.shape)
    rows = np.stack([layout.pairs(k, v) for k, v in zip(keys, values, strict=True)])
    questions, answers = [], []
    for seen in range(count + 1):
        asked = 0 if seen == 0 else plan.asked if seen < count else plan.asked_last
        which = rng.integers(0, max(seen, 1), (plan.batch, asked))
        wanted = np.take_along_axis(keys, which, axis=1)
        questions.append(torch.from_numpy(_question(layout, wanted)))
        answers.append(torch.from_numpy(_newest(keys[:, :seen], values[:, :seen], wanted)))
    pairs = torch.from_numpy(rows.reshape(plan.batch, count, layout.segment).astype(np.int64))
    return Batch(pairs, questions, answers)


def _keys(plan: Plan, count: int, rng: np.random.Generator) -> Ids:
    """[B, count]; in a share of rows they are drawn from a few keys only."""
    keys = rng.permuted(np.tile(np.arange(plan.layout.keys), (plan.batch, 1)), axis=1)
    again = rng.random(plan.batch) < plan.rewrite
    few = int(rng.integers(1, count + 1))
    picked = np.take_along_axis(keys, rng.integers(0, few, (plan.batch, count)), axis=1)
    return np.where(again[:, None], picked, keys[:, :count])


def _question(layout: Layout, keys: Ids) -> Ids:
    """[B, Q] keys as [B, Q, key symbols + 1] token ids."""
    digits = layout.digits(keys.reshape(-1).astype(np.int32)).reshape(
        *keys.shape, layout.key_symbols
    )
    gen = np.full((*keys.shape, 1), layout.gen)
    return np.concatenate([digits, gen], axis=-1).astype(np.int64)


def _newest(keys: Ids, values: Ids, wanted: Ids) -> Ids:
    """[B, Q]: the newest value of each wanted key."""
    if keys.shape[1] == 0:
        return np.zeros(wanted.shape, np.int64)
    same = keys[:, None, :] == wanted[:, :, None]
    last = keys.shape[1] - 1 - same[:, :, ::-1].argmax(axis=2)
    return np.take_along_axis(values, last, axis=1)


def losses(model: Armt, batch: Batch) -> tuple[Tensor, float]:
    """The mean loss of all questions, and the share of those at the end that were right."""
    state = model.empty()
    logits, wanted = [], []
    device = model.memory_tokens.device
    segments = [*batch.pairs.to(device).unbind(1), batch.pairs[:, 0, :0].to(device)]
    for tokens, asked, answers in zip(segments, batch.questions, batch.answers, strict=True):
        _, found, state = model.segment(tokens, state, asked.to(device) if asked.numel() else None)
        if found is not None:
            logits.append(found[:, :, -1].flatten(0, 1))
            wanted.append(answers.to(device).flatten())
    loss = functional.cross_entropy(torch.cat(logits), torch.cat(wanted))
    right = (logits[-1].argmax(-1) == wanted[-1]).float().mean()
    return loss, float(right)


class Trainer:
    """A model on its way. Everything random is drawn from the plan's seed and the step's number."""

    def __init__(self, plan: Plan, *, device: str = "cpu") -> None:
        self.plan = plan
        self.standing = Standing()
        torch.manual_seed(plan.seed)
        self.model = Armt(plan.shape)
        start(self.model, [*range(plan.key_symbols), plan.key_symbols + 1])  # key, value
        self.model.to(device)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim == 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": plan.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=plan.lr,
            betas=(0.9, 0.98),
        )

    @property
    def done(self) -> bool:
        """Whether all steps were made."""
        return self.standing.step >= self.plan.steps

    def step(self) -> Report:
        """One step of the optimizer."""
        plan, standing = self.plan, self.standing
        for group in self._optimizer.param_groups:
            group["lr"] = plan.rate(standing.step)
        rng = np.random.default_rng([plan.seed, standing.step])
        batch = make_batch(plan, plan.pairs[standing.stage], rng)
        loss, right = losses(self.model, batch)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), plan.clip)
        self._optimizer.step()
        report = Report(
            standing.step, batch.pairs.shape[1], float(loss.detach()), right, batch.pairs.numel()
        )
        standing.advance(plan, right)
        return report

    def run(self) -> Iterator[Report]:
        """The steps that are left."""
        while not self.done:
            yield self.step()

    def progress(self) -> dict[str, Any]:
        """All that is needed to go on, as torch.load(weights_only=True) reads it."""
        return {
            "plan": self.plan.to_json(),
            "standing": asdict(self.standing),
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    @classmethod
    def resumed(cls, progress: dict[str, Any], *, steps: int, device: str = "cpu") -> Trainer:
        """A trainer that goes on where another stood, up to ``steps`` steps in all."""
        try:
            plan = Plan.from_json(progress["plan"] | {"steps": steps})
            trainer = cls(plan, device=device)
            trainer.standing = Standing(**progress["standing"])
            trainer.model.load_state_dict(progress["model"])
            trainer._optimizer.load_state_dict(progress["optimizer"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise InvalidArgument(f"training.pt: does not fit this version: {error}") from error
        return trainer

    def facts(self) -> dict[str, Any]:
        """What config.json says beside the model: the layout of the task, and the training."""
        return {
            "retrieval": asdict(self.plan.layout),
            "training": {"plan": self.plan.to_json(), "steps": self.standing.step},
        }


def stages(text: str) -> tuple[int, ...]:
    """ "1,2,5" as numbers."""
    parts: Sequence[str] = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise InvalidArgument(f"pairs: found {text!r}, expected whole numbers such as 1,2,5,10")
    return tuple(int(part) for part in parts)
