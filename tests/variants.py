"""One small random model of each kind that the engine knows: bases, dialects and switches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import armt
from reference.random_models import RandomModel, random_model


@dataclass(frozen=True)
class Variant:
    name: str
    base: str = "gpt2"
    dialect: str = "paper"
    base_options: dict[str, Any] = field(default_factory=dict)
    armt_options: dict[str, Any] = field(default_factory=dict)

    def model(self, *, seed: int = 0, dtype: str = "F32") -> RandomModel:
        return random_model(
            base=self.base,
            dialect=self.dialect,
            seed=seed,
            dtype=dtype,
            base_options=self.base_options,
            armt_options=self.armt_options,
        )


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_SLIDING_SINK = {"sliding_window": True, "use_sink": True}

VARIANTS = [
    Variant("paper-gpt2-wrap", armt_options={"wrap_pos": True}),
    Variant("paper-gpt2-plain", armt_options={"correction": False}),
    Variant("paper-gpt2-sliding", armt_options={"sliding_window": True, "wrap_pos": True}),
    Variant("paper-gpt2-inverse-scale", base_options={"scale_attn_by_inverse_layer_idx": True}),
    Variant("paper-llama", base="llama", base_options={"rope_scaling": _LLAMA3}),
    Variant(
        "paper-llama-biases",
        base="llama",
        base_options={
            "attention_bias": True,
            "mlp_bias": True,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
    Variant("paper-mistral-sliding", base="mistral", armt_options={"sliding_window": True}),
    Variant("paper-neox", base="gpt_neox"),
    Variant("paper-neox-serial", base="gpt_neox", base_options={"use_parallel_residual": False}),
    Variant("modern-llama", "llama", "modern"),
    Variant("modern-llama-heads", "llama", "modern", {}, {"n_heads": 4, "use_sink": True}),
    Variant("modern-llama-gating", "llama", "modern", {}, {"n_heads": 2, "gating": True}),
    Variant("modern-llama-nodenom", "llama", "modern", {}, {"n_heads": 2, "use_denom": False}),
    Variant("modern-llama-sliding", "llama", "modern", {}, {"sliding_window": True}),
    Variant("modern-llama-sliding-sink", "llama", "modern", {}, _SLIDING_SINK),
    Variant("modern-qwen2", "qwen2", "modern", {}, {"correction": False}),
    Variant("modern-qwen3", "qwen3", "modern", {}, {"n_heads": 2}),
    Variant("modern-gpt2-sliding", "gpt2", "modern", {}, {"sliding_window": True}),
    Variant("modern-neox", "gpt_neox", "modern", {}, _SLIDING_SINK),
    Variant("inner-llama", "llama", "modern-inner"),
    Variant("inner-llama-sliding-sink", "llama", "modern-inner", {}, _SLIDING_SINK),
    Variant("rmt-gpt2-wrap", "gpt2", "rmt", {}, {"wrap_pos": True}),
    Variant("rmt-llama", "llama", "rmt"),
    Variant("rmt-llama-sliding", "llama", "rmt", {}, {"sliding_window": True}),
]


class Zoo:
    """Saved variants and engines over them, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._models: dict[tuple[str, str], RandomModel] = {}
        self._engines: dict[tuple[Any, ...], armt.Engine] = {}

    def model(self, variant: Variant, dtype: str = "F32") -> RandomModel:
        key = (variant.name, dtype)
        if key not in self._models:
            self._models[key] = variant.model(dtype=dtype)
            self._models[key].save(self.path(variant, dtype))
        return self._models[key]

    def path(self, variant: Variant, dtype: str = "F32") -> Path:
        return self.folder / f"{variant.name}-{dtype}"

    def engine(self, variant: Variant, *, weights: str = "F32", **options: Any) -> armt.Engine:
        self.model(variant, weights)
        key = (variant.name, weights, *sorted(options.items()))
        if key not in self._engines:
            self._engines[key] = armt.Engine.from_pretrained(
                self.path(variant, weights), device="cpu", **options
            )
        return self._engines[key]
