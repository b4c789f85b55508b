"""A thin face in the style of Hugging Face's causal language models.

For code that calls ``AutoModelForCausalLM.from_pretrained`` and ``model.generate``. Tensors of
torch and NumPy arrays both go in; what comes out is of the same kind, on the same device.

A script for the library runs unchanged, with this class as its ``AutoModelForCausalLM``::

    python -m armt.clients.huggingface script.py --model_name my-model ...
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from armt.engine import Engine
from armt.errors import InvalidArgument
from armt.models import resolve

# Arguments that callers pass as a matter of course and that change nothing here.
_LOADING = ("trust_remote_code", "attn_implementation", "low_cpu_mem_usage", "use_safetensors")
_GENERATING = ("use_cache", "early_stopping", "length_penalty")
_FIXED = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}


@dataclass(frozen=True)
class Config:
    """What callers look up in ``model.config`` and ``model.generation_config``."""

    name_or_path: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    segment_size: int
    num_mem_tokens: int
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    max_position_embeddings: int | None = None
    """None: any number of tokens."""
    model_type: str = "armt"
    is_encoder_decoder: bool = False


@dataclass(frozen=True)
class Output:
    """What calling the model returns."""

    logits: Any
    """[batch, tokens, vocab] float32."""
    states: list[Any]
    """The memory of each row."""


class ArmtForCausalLM:
    """A model by :meth:`from_pretrained`, or over an engine that is already there."""

    def __init__(self, engine: Engine, *, name: str = "") -> None:
        self.engine = engine
        self.name_or_path = name or str(engine.checkpoint.path)
        self.config = self.generation_config = _config(engine, self.name_or_path)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        device_map: Any = "auto",
        torch_dtype: Any = "auto",
        dtype: Any = None,
        threads: int = 0,
        **others: Any,
    ) -> ArmtForCausalLM:
        """Loads a checkpoint. ``dtype`` is a name or a torch type; ``device_map`` a device."""
        for name in _LOADING:
            others.pop(name, None)
        name = os.fspath(pretrained_model_name_or_path)
        engine = Engine.from_pretrained(
            resolve(name),
            device=_device(device_map),
            dtype=_dtype(torch_dtype if dtype is None else dtype),  # type: ignore[arg-type]
            threads=threads,
            **others,
        )
        return cls(engine, name=name)

    @property
    def device(self) -> str:
        """Where the engine runs; tensors for it may be anywhere."""
        return self.engine.device

    def eval(self) -> ArmtForCausalLM:
        """Does nothing: an engine never trains."""
        return self

    def to(self, *_: Any, **__: Any) -> ArmtForCausalLM:
        """Does nothing: device and type are chosen when the model is loaded."""
        return self

    def __call__(self, input_ids: Any, attention_mask: Any = None, **others: Any) -> Output:
        """Logits of whole sequences, each read from an empty memory."""
        _refuse(others, ("use_cache", "return_dict"))
        out = self.engine.forward(_array(input_ids), _mask(attention_mask))
        return Output(_like(input_ids, out.logits), out.states)

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *,
        inputs: Any = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Any = None,
        **others: Any,
    ) -> Any:
        """[batch, prompt + new]: every prompt with its continuation, from an empty memory.

        Greedy unless ``do_sample``. A ``streamer`` (one row only) gets the prompt and then each new
        token through ``put``, and ``end`` at last. Beams are refused.
        """
        _refuse(others, _GENERATING)
        given = inputs if input_ids is None else input_ids
        prompts = _array(given)
        prompts = prompts[None] if prompts.ndim == 1 else prompts
        if max_new_tokens is None:
            max_new_tokens = 20 if max_length is None else max(max_length - prompts.shape[1], 0)
        eos = self.config.eos_token_id if eos_token_id is None else eos_token_id
        pad = next((p for p in (pad_token_id, self.config.pad_token_id) if p is not None), None)
        if pad is None:
            pad = (eos if isinstance(eos, int) else eos[0]) if eos else 0
        settings: dict[str, Any] = {"repetition_penalty": repetition_penalty}
        if do_sample:
            drawn = {"temperature": 1.0 if temperature is None else temperature}
            settings |= drawn | {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        settings = {name: value for name, value in settings.items() if value is not None}
        if streamer is None:
            ids = self.engine.generate(
                prompts,
                _mask(attention_mask),
                max_new_tokens=max_new_tokens,
                seed=seed,
                eos_token_id=eos,
                pad_token_id=pad,
                **settings,
            )
        else:
            ids = self._stream(prompts, streamer, max_new_tokens, eos, seed, settings)
        return _like(given, ids)

    def _stream(
        self,
        prompts: npt.NDArray[Any],
        streamer: Any,
        limit: int,
        eos: Any,
        seed: int | None,
        settings: dict[str, Any],
    ) -> npt.NDArray[np.int64]:
        if len(prompts) != 1:
            raise InvalidArgument(f"streamer: found {len(prompts)} rows, expected one")
        memory = self.engine.checkpoint.memory
        plain = self.engine.checkpoint.segment_alignment == "left" and memory["dialect"] != "inner"
        if not plain or (memory["sliding_window"] and memory["dialect"] in ("paper", "rmt")):
            raise InvalidArgument(
                "streamer: this model's published generation is not a stream (other alignment than "
                "left, inner loop, or a window); leave the streamer out, or use a session"
            )
        streamer.put(_like_torch(prompts))
        with self.engine.session(seed=0 if seed is None else seed) as session:
            session.feed(prompts[0])
            new = []
            for token in session.generate(limit, stop_ids=eos, rollover=False, **settings):
                new.append(token)
                streamer.put(_like_torch(np.array([token])))
        streamer.end()
        return np.concatenate([prompts[0], np.array(new, np.int64)])[None].astype(np.int64)


def _config(engine: Engine, name: str) -> Config:
    decoder, facts = engine.checkpoint.decoder, engine.checkpoint.generation
    eos = engine.checkpoint.eos_token_ids
    return Config(
        name_or_path=name,
        vocab_size=engine.vocab_size,
        hidden_size=decoder["d_model"],
        num_hidden_layers=decoder["n_layers"],
        num_attention_heads=decoder["n_heads"],
        segment_size=engine.segment_size,
        num_mem_tokens=engine.checkpoint.memory["memory_tokens"],
        bos_token_id=facts.get("bos_token_id"),
        eos_token_id=eos[0] if len(eos) == 1 else (eos or None),
        pad_token_id=facts.get("pad_token_id"),
    )


def _refuse(others: dict[str, Any], harmless: Sequence[str]) -> None:
    """InvalidArgument for arguments that would change the result and are not known here."""
    for name, value in others.items():
        if name in harmless or value is None or (name in _FIXED and value == _FIXED[name]):
            continue
        raise InvalidArgument(f"{name}: found {value!r}, which this model does not know")


def _device(device_map: Any) -> str:
    if isinstance(device_map, dict):  # {"": device}
        found = set(map(str, device_map.values()))
        if len(found) != 1:
            raise InvalidArgument(f"device_map: found {device_map}, expected one device")
        device_map = found.pop()
    name = "auto" if device_map is None else str(device_map)
    return f"cuda:{name}" if name.isdigit() else name


def _dtype(dtype: Any) -> str:
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")


def _array(ids: Any) -> npt.NDArray[Any]:
    """Ids as an array in host memory."""
    if ids is None:
        raise InvalidArgument("input_ids: found nothing, expected [batch, tokens]")
    return np.asarray(ids.cpu() if hasattr(ids, "cpu") else ids)


def _mask(mask: Any) -> npt.NDArray[Any] | None:
    return None if mask is None else _array(mask)


def _like(given: Any, result: Any) -> Any:
    """``result`` as what ``given`` is: a tensor of torch on the same device, or an array."""
    if result is None or not hasattr(given, "cpu"):
        return result
    import torch

    return torch.from_numpy(result).to(given.device)


def _like_torch(ids: npt.NDArray[Any]) -> Any:
    """What a streamer expects: a tensor where torch is there."""
    try:
        import torch
    except ImportError:
        return ids.astype(np.int64)
    return torch.from_numpy(ids.astype(np.int64))


def main() -> None:
    """Runs a Python script in which ``transformers.AutoModelForCausalLM`` is ours."""
    if len(sys.argv) < 2 or not os.path.isfile(sys.argv[1]):
        sys.exit("usage: python -m armt.clients.huggingface SCRIPT.py [ARGUMENTS]")
    transformers: Any = importlib.import_module("transformers")
    transformers.AutoModelForCausalLM = ArmtForCausalLM
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
