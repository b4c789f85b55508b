"""Makes the corpus of state files of the present release, which every later release must load.

    python tests/make_state_corpus.py tests/data/states/0.1.0

One folder a model: its checkpoint, states at several points of a stream, and `expected.json` with
what reading on from each of them gives. All of it follows from fixed seeds. A corpus is made once,
at its release, and never again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import armt
from variants import Variant

_GPT2 = {"vocab_size": 23, "n_embd": 12, "n_positions": 40}
_LLAMA = {
    "vocab_size": 23,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_NEOX = {"vocab_size": 23, "hidden_size": 12, "intermediate_size": 20}
_SMALL = {"d_mem": 4, "segment_size": 5}
_HEADS = _SMALL | {"n_heads": 2}
_WINDOW = _SMALL | {"sliding_window": True}

MODELS = [
    Variant("paper-gpt2", "gpt2", "paper", _GPT2, _SMALL | {"wrap_pos": True}),
    Variant("paper-mistral-window", "mistral", "paper", _LLAMA, _WINDOW),
    Variant("paper-neox-plain", "gpt_neox", "paper", _NEOX, _SMALL | {"correction": False}),
    Variant("modern-llama-heads", "llama", "modern", _LLAMA, _HEADS | {"gating": True}),
    Variant("modern-qwen2-nodenom", "qwen2", "modern", _LLAMA, _HEADS | {"use_denom": False}),
    Variant("modern-qwen3-sink", "qwen3", "modern", _LLAMA, _WINDOW | {"use_sink": True}),
    Variant("inner-llama-window", "llama", "modern-inner", _LLAMA, _WINDOW),
    Variant("rmt-gpt2", "gpt2", "rmt", _GPT2, {"segment_size": 5}),
    Variant(
        "rmt-llama-window", "llama", "rmt", _LLAMA, {"segment_size": 5, "sliding_window": True}
    ),
]
SEED = 2**63 + 7
FOLLOW, DRAWS = 8, 6


def states_of(engine: armt.Engine) -> dict[str, armt.Session]:
    """Sessions at the points of a stream that a format may get wrong."""
    ids = np.random.default_rng(31).integers(0, engine.vocab_size, size=13)
    points = {"first": 3, "full": 10, "open": 13}
    sessions = {"empty": engine.session(seed=SEED)}
    for name, count in points.items():
        sessions[name] = engine.session(seed=SEED)
        sessions[name].feed(ids[:count])
    sessions["closed"] = sessions["open"].fork()
    sessions["closed"].close_segment()
    sessions["drawn"] = sessions["open"].fork()
    list(sessions["drawn"].generate(4, temperature=1.2))
    return sessions


def continuation(session: armt.Session) -> dict[str, Any]:
    """What reading and generating from here gives; the session moves on."""
    follow = np.random.default_rng(37).integers(0, session.engine.vocab_size, size=FOLLOW)
    logits = session.feed(follow, logits="all").logits
    assert logits is not None
    greedy = list(session.generate(DRAWS, write=False))
    return {
        "follow": follow.tolist(),
        "logits": [[round(float(x), 7) for x in row] for row in logits[::4]],
        "greedy": greedy,
        "drawn": list(session.generate(DRAWS, temperature=1.2)),
    }


def make(folder: Path) -> None:
    """Writes the whole corpus; FileExistsError if there is one."""
    for variant in MODELS:
        place = folder / variant.name
        place.mkdir(parents=True)
        variant.model(seed=41).save(place)
        engine = armt.Engine.from_pretrained(place, device="cpu", threads=1, isa="baseline")
        expected = {}
        for name, session in states_of(engine).items():
            path = place / f"{name}.armt-state"
            session.state.save(path)
            path.chmod(0o644)
            expected[name] = continuation(session)
        (place / "expected.json").write_text(json.dumps(expected) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)


if __name__ == "__main__":
    main()
