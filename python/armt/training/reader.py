"""The models trained here, read in PyTorch: to compare with the engine, and for Mamba."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from armt.errors import CheckpointError
from armt.training.folder import load_weights
from armt.training.shape import Shape
from armt.training.systems import build

Ids = npt.NDArray[np.int32]


class TorchReader:
    """Rows that read side by side, each with its own memory; a Reader of armt.tasks.reading."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """CheckpointError where ``folder`` holds no model that ``armt train`` can make."""
        self._shape = read_shape(folder)
        self._model = build(self._shape).to(device)
        load_weights(self._model, folder)
        self._device = device
        self.open(0)

    @property
    def segment_size(self) -> int:
        """Tokens of a full segment."""
        return self._shape.segment_size

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1."""
        return self._shape.vocab_size

    def open(self, rows: int) -> None:
        """So many rows with empty memories; all from before are forgotten."""
        self._state = self._model.empty(rows)
        self._waiting: list[Ids] = [np.zeros(0, np.int32)] * rows

    @torch.no_grad()
    def feed(self, ids: Sequence[Ids]) -> None:
        """Reads ids [tokens] in each row; of any lengths, 0 included."""
        pairs = zip(self._waiting, ids, strict=True)
        self._waiting = [np.concatenate(pair) for pair in pairs]
        size = self.segment_size
        done = [0] * len(ids)
        while full := [r for r, w in enumerate(self._waiting) if len(w) - done[r] >= size]:
            tokens = np.stack([self._waiting[r][done[r] : done[r] + size] for r in full])
            _, new = self._run(tokens, self._rows(self._state, full), write=True)
            for old, part in zip(self._state, new, strict=True):
                old[full] = part
            for row in full:
                done[row] += size
        self._waiting = [w[n:] for w, n in zip(self._waiting, done, strict=True)]

    def ask(self, ids: Sequence[Ids]) -> npt.NDArray[np.int64]:
        """[rows]: the likeliest token behind ids [tokens >= 1] in each row, which stays as it
        was."""
        best: npt.NDArray[np.int64] = self.ask_logits(ids).argmax(axis=1)
        return best

    @torch.no_grad()
    def ask_logits(self, ids: Sequence[Ids]) -> npt.NDArray[np.float32]:
        """[rows, vocab]: the logits behind ids."""
        pairs = zip(self._waiting, ids, strict=True)
        texts = [np.concatenate(pair) for pair in pairs]
        found = np.empty((len(texts), self.vocab_size), np.float32)
        for length in sorted({len(text) for text in texts}):
            rows = [r for r, text in enumerate(texts) if len(text) == length]
            tokens = np.stack([texts[r] for r in rows])
            state = self._rows(self._state, rows)
            parts = range(0, length, self.segment_size)
            for start in parts:
                last = start == parts[-1]
                piece = tokens[:, start : start + self.segment_size]
                x, state = self._run(piece, state, write=not last)
            found[rows] = self._model.decoder.logits(x[:, -1]).float().cpu().numpy()
        return found

    def _run(
        self, tokens: npt.NDArray[Any], state: tuple[Tensor, ...], *, write: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        given = torch.from_numpy(tokens.astype(np.int64)).to(self._device)
        x, _, new, _ = self._model.segment(given, state, write=write)
        return x, new

    @staticmethod
    def _rows(state: tuple[Tensor, ...], rows: list[int]) -> tuple[Tensor, ...]:
        return tuple(part[rows] for part in state)


def read_shape(folder: Path) -> Shape:
    """The sizes that a folder's config.json tells; CheckpointError for models of other kinds."""
    path = folder / "config.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["dialect"] == "mamba":
            return Shape(**found["mamba"])
        base, memory = found["base_model"], found["armt"]
        if base["model_type"] != "gpt2" or memory.get("n_heads", 1) != 1 or memory.get("gating"):
            raise KeyError("a GPT-2 decoder with one memory head")
        return Shape(
            vocab_size=base["vocab_size"],
            segment_size=memory["segment_size"],
            system="rmt" if found["dialect"] == "rmt" else "armt",
            width=base["n_embd"],
            layers=base["n_layer"],
            heads=base["n_head"],
            memory_tokens=memory["num_mem_tokens"],
            d_mem=memory.get("d_mem", 1),
            dialect="paper" if found["dialect"] == "rmt" else found["dialect"],
            denominator=memory.get("use_denom", True),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: {error}; PyTorch reads only the models that armt train makes"
        ) from error
