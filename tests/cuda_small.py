"""What compute-sanitizer runs: every kind of kernel once, on small models that take the fast paths.

python tests/cuda_small.py [--case N | --count | --describe N]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import armt
from reference.random_models import random_model

_LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
_GPT2 = {"n_embd": 96, "n_layer": 3, "n_head": 2, "n_positions": 256}
_SEGMENTS = {"segment_size": 140, "num_mem_tokens": 20, "d_mem": 32}
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("llama", "paper", _LLAMA, {}, {"dtype": "bfloat16"}),
    ("llama", "modern", _LLAMA, {"n_heads": 2, "sliding_window": True}, {"dtype": "float32"}),
    (
        "gpt2",
        "paper",
        _GPT2,
        {"wrap_pos": True, "d_mem": 64, "num_mem_tokens": 16},
        {"dtype": "float16"},
    ),
    (
        "llama",
        "modern",
        _LLAMA,
        {"segment_size": 300, "sliding_window": True},
        {"dtype": "bfloat16", "prefill_dtype": "fp8"},
    ),
    ("llama", "modern", _LLAMA | {"head_dim": 128}, {"sliding_window": True}, {"dtype": "float16"}),
]


def run(base: str, dialect: str, sizes: Any, memory: Any, options: Any, folder: Path) -> None:
    model = random_model(
        base=base,
        dialect=dialect,
        dtype="BF16",
        base_options=sizes,
        armt_options=_SEGMENTS | memory,
    )
    model.save(folder)
    engine = armt.Engine.from_pretrained(folder, device="cuda", schedule="diagonal", **options)
    rng = np.random.default_rng(0)
    first, second = (engine.session() for _ in range(2))
    ids = rng.integers(0, engine.vocab_size, (2, 450))
    engine.feed_many([(first, ids[0]), (second, ids[1, :300])], logits="last")
    list(first.generate(6))
    list(first.generate(2, temperature=0.8, seed=1))
    list(first.generate(2, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=1))
    fork = first.fork()
    fork.feed(ids[1, :9], logits="all")
    restored = engine.session(state=armt.State.from_bytes(first.state.to_bytes()))
    restored.close_segment()
    out = engine.forward(ids[:, :200], np.arange(200) < np.array([[200], [150]]))
    assert out.logits is not None and np.isfinite(out.logits).all()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help="only this model")
    parser.add_argument("--count", action="store_true", help="say how many models there are")
    parser.add_argument("--describe", type=int, choices=range(len(CASES)), help="say what it is")
    options = parser.parse_args()
    if options.count:
        print(len(CASES))
        return
    if options.describe is not None:
        print(*CASES[options.describe][:2], CASES[options.describe][4])
        return
    for case in CASES if options.case is None else [CASES[options.case]]:
        with tempfile.TemporaryDirectory() as folder:
            run(*case, Path(folder))
        print("ran", *case[:2], case[4], flush=True)


if __name__ == "__main__":
    main()
