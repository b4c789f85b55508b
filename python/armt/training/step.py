"""One step of a training: forward, backward, optimizer. On a GPU it is captured and replayed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from armt.training.decoder import Asks
from armt.training.systems import System
from armt.training.window import NO_ANSWER, Window

WARM_UPS = 3
LARGEST = 1e4
"""Of a value of a memory: a row with a larger one has broken down, and begins anew."""


class Step:
    """Steps over windows of one size. The memories of the rows stay here from step to step."""

    def __init__(
        self,
        model: System,
        optimizer: torch.optim.Optimizer,
        window: Window,
        *,
        clip: float,
        calm: float,
        keep_quiet: float,
        kinds: int,
        average: list[Tensor],
        average_decay: float,
        carry: list[Tensor] | None = None,
    ) -> None:
        """``window`` shows the sizes."""
        self._model, self._optimizer = model, optimizer
        self._parameters: list[Tensor] = list(model.parameters())
        self._clip, self._calm, self._keep_quiet = clip, calm, keep_quiet
        self._average, self._decay = average, average_decay
        self._device = self._parameters[0].device
        self._inputs = {
            name: torch.from_numpy(values).to(self._device)
            for name, values in window.arrays().items()
        }
        empty = model.empty(len(window.tokens))
        self.carry = [s.clone() for s in empty] if carry is None else carry
        self.sums = torch.zeros(2 * kinds + 3, device=self._device)
        """Right answers and questions of each kind, loss, what was written for nothing, steps."""
        self._kinds = kinds
        self._graph: Any = None

    def run(self, window: Window) -> None:
        """One step."""
        for name, values in window.arrays().items():
            source = torch.from_numpy(values)
            if self._device.type == "cuda":
                source = source.pin_memory()
            self._inputs[name].copy_(source, non_blocking=True)
        if self._device.type != "cuda":
            self._compute()
            return
        if self._graph is None:
            self._capture()
        self._graph.replay()

    def _capture(self) -> None:
        """Warm-up steps leave no trace: what they change is put back."""
        kept = [*self._parameters, *self.carry, self.sums, *self._average]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad():
            before = [t.detach().clone() for t in kept]
        states = _optimizer_tensors(self._optimizer)
        states_before = [t.clone() for t in states]
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for tensor, value in zip(kept, before, strict=True):
                tensor.copy_(value)
            if states:
                for tensor, value in zip(states, states_before, strict=True):
                    tensor.copy_(value)
            else:
                for tensor in _optimizer_tensors(self._optimizer):
                    tensor.zero_()
        del before, states_before
        self._optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._compute()

    def _compute(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        bf16 = self._device.type == "cuda"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            loss, beyond, wasted, right, state = self._losses()
        (loss + self._calm * beyond + self._keep_quiet * wasted).backward()  # type: ignore[no-untyped-call]
        for parameter in self._parameters:
            if parameter.grad is not None:
                torch.nan_to_num_(parameter.grad, 0.0, 0.0, 0.0)
        torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        with torch.no_grad():
            if self._average:
                torch._foreach_lerp_(self._average, self._parameters, 1 - self._decay)
            for old, new in zip(self.carry, state, strict=True):
                old.copy_(new)
            last = torch.stack((loss.detach(), wasted.detach(), torch.ones_like(loss)))
            self.sums.add_(torch.cat((right, last)))

    def _losses(self) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """The mean loss of the questions; what was written beyond measure, and in quiet segments;
        counts of right answers and of questions by kind; the new memories."""
        given = self._inputs
        state = self._begin()
        logits, beyond, wasted = [], [], []
        for segment in range(given["tokens"].shape[1]):
            asks = Asks(
                given["asks"][:, segment].long(),
                given["seen"][:, segment].long(),
                given["last"][:, segment].long(),
            )
            tokens = given["tokens"][:, segment].long()
            _, found, state, written = self._model.segment(tokens, state, asks)
            assert found is not None
            logits.append(self._model.decoder.logits(found).float())
            wasted.append(given["quiet"][:, segment] * written[:, 0])
            beyond.append(written[:, 1])
        guesses = torch.stack(logits, dim=1).flatten(0, 2)
        answers = given["answers"].flatten().long()
        total = functional.cross_entropy(guesses, answers, ignore_index=NO_ANSWER, reduction="sum")
        asked = answers != NO_ANSWER
        with torch.no_grad():
            kinds = given["kinds"].flatten().long()
            hit = (guesses.argmax(-1) == answers) & asked
            right = torch.zeros(2 * self._kinds, device=self._device)
            right.index_add_(0, kinds, hit.float())
            right.index_add_(0, kinds + self._kinds, asked.float())
        mean = total / asked.sum().clamp(min=1)
        return mean, torch.stack(beyond).mean(), torch.stack(wasted).mean(), right, state

    def _begin(self) -> tuple[Tensor, ...]:
        """The carried memories; empty ones for rows that begin anew or broke down."""
        largest = torch.stack([s.flatten(1).abs().amax(1) for s in self.carry]).amax(0)
        broken = (largest < LARGEST).logical_not()
        fresh = (self._inputs["fresh"] != 0) | broken
        return tuple(torch.where(fresh.view(-1, *[1] * (s.ndim - 1)), 0.0, s) for s in self.carry)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
