"""Sizes of a model that is trained here, and the config.json that tells them to a loader."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from armt.errors import InvalidArgument

SYSTEMS = ("armt", "rmt", "mamba")
DIALECTS = ("paper", "modern")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; those of another system are ignored."""

    vocab_size: int
    segment_size: int
    system: str = "armt"
    width: int = 128
    layers: int = 4
    heads: int = 4
    memory_tokens: int = 4
    d_mem: int = 64
    """Width of a memory key (armt)."""
    dialect: str = "modern"
    """Of armt: "paper" as published in 2024, "modern" with features of length 1."""
    denominator: bool = False
    """Of the modern dialect: whether reads are divided by z . phi."""
    state_size: int = 64
    """Values that Mamba keeps for each of its inner channels."""

    def __post_init__(self) -> None:
        for name, known in (("system", SYSTEMS), ("dialect", DIALECTS)):
            if getattr(self, name) not in known:
                raise InvalidArgument(
                    f"{name}: found {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )
        for name, value in asdict(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise InvalidArgument(f"{name}: found {value}, expected 1 or more")
        if self.width % self.heads:
            raise InvalidArgument(
                f"heads: found {self.heads}, expected a divisor of the width {self.width}"
            )

    @property
    def divided(self) -> bool:
        """Whether reads are divided, so that a normaliser z is kept."""
        return self.dialect == "paper" or self.denominator

    @property
    def positions(self) -> int:
        """Rows of the table of positions."""
        ends = {"armt": 1, "rmt": 2, "mamba": 0}[self.system]
        return self.segment_size + ends * self.memory_tokens

    @property
    def state_bytes(self) -> int:
        """Bytes of the state between two segments, in float32."""
        if self.system == "rmt":
            return 4 * self.memory_tokens * self.width
        if self.system == "mamba":
            inner = 2 * self.width
            return 4 * self.layers * (inner * self.state_size + 3 * (inner + 2 * self.state_size))
        rows = 6 * self.d_mem
        return 4 * self.layers * rows * (self.width + self.divided)

    def config(self) -> dict[str, Any]:
        """The ``config.json`` that tells a loader what the tensors do not."""
        if self.system == "mamba":
            return {"dialect": "mamba", "mamba": asdict(self)}
        base = {
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_embd": self.width,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_positions": self.segment_size,
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
        }
        memory: dict[str, Any] = {
            "num_mem_tokens": self.memory_tokens,
            "segment_size": self.segment_size,
            "segment_alignment": "left",
            "wrap_pos": True,
            "sliding_window": False,
            "layers_attr": "transformer.h",
        }
        if self.system == "armt":
            memory |= {"d_mem": self.d_mem, "nu": 3, "correction": True}
        if self.system == "armt" and self.dialect == "modern":
            memory |= {"n_heads": 1, "use_denom": self.denominator}
            memory |= {"gating": False, "use_sink": False}
        return {
            "dialect": "rmt" if self.system == "rmt" else self.dialect,
            "base_model": base,
            "armt": memory,
            "weights": {"file": "model.safetensors", "cell_prefix": "memory_cell."},
        }
