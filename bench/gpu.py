"""Timings of the CUDA backend against floors measured in the same run.

    python bench/gpu.py --out results.json [--what prefill decode sessions profile] [--quick]

Weights are random (conditioned: embeddings are large, memory values small), ids are random, the
head is left off in prefill. The floor of a prefill is its arithmetic over the rate of an 8192 bf16
matrix product sustained in this very run (attention over 400 TFLOP/s).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from armt import _core

ATTENTION_RATE = 400e12
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model; `segment` tokens and `memory` memory tokens make a segment's rows."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    segment: int
    memory: int
    d_mem: int
    llama: bool

    @property
    def rows(self) -> int:
        return self.segment + self.memory

    def decoder(self) -> dict[str, Any]:
        common = {
            "vocab_size": self.vocab,
            "d_model": self.width,
            "n_layers": self.layers,
            "n_heads": self.heads,
            "n_kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "d_ff": self.ffn,
        }
        if self.llama:
            return common | {
                "norm": "rms",
                "activation": "silu",
                "gated_mlp": True,
                "rotary_dims": self.head_dim,
                "rope_theta": 500000.0,
            }
        positions = self.rows + self.memory
        return common | {"norm": "layer", "activation": "gelu_tanh", "learned_positions": positions}

    def memory_settings(self) -> dict[str, Any]:
        return {
            "dialect": "paper",
            "memory_tokens": self.memory,
            "d_mem": self.d_mem,
            "segment_size": self.segment,
        }

    def floor_flops(self, tokens: int) -> tuple[float, float]:
        """Full arithmetic of a prefill: (matrix products, attention), in operations."""
        segments = -(-tokens // self.segment)
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        per_row = qkv + self.heads * self.head_dim + (3 if self.llama else 2) * self.ffn
        features = 6 * self.d_mem
        read = self.d_mem + features
        write = self.memory * (self.width + self.d_mem + 2 * features)
        products = 2.0 * self.width * (self.rows * (per_row + read) + write)
        attention = 2.0 * self.rows * self.rows * self.heads * self.head_dim  # causal half
        return products * self.layers * segments, attention * self.layers * segments


GEOMETRIES = {
    "1b": Geometry("1b", 16, 2048, 32, 8, 64, 8192, 128256, 1024, 128, 64, True),
    "gpt2": Geometry("gpt2", 12, 768, 12, 12, 64, 3072, 50257, 512, 16, 64, False),
}


def bf16(values: Array) -> Array:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def make_engine(
    geometry: Geometry, *, dtype: str = "bfloat16", schedule: str = "auto", seed: int = 0
) -> Any:
    """An engine with random weights; all layers share their values."""
    rng = np.random.default_rng(seed)
    g = geometry
    core = _core.Engine(
        decoder=g.decoder(),
        memory=g.memory_settings(),
        device="cuda",
        dtype=dtype,
        schedule=schedule,
    )

    def load(slot: str, layers: int, rows: int, cols: int, std: float) -> None:
        values = rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(std)
        for layer in range(layers):
            core.load_matrix(slot, layer, bf16(values), "bfloat16")

    def fill(slot: str, layers: int, size: int, value: float) -> None:
        for layer in range(layers):
            core.load_vector(slot, layer, np.full(size, value, np.float32))

    width, qkv = g.width, (g.heads + 2 * g.kv_heads) * g.head_dim
    deep = 0.02 / (2 * g.layers) ** 0.5
    load("qkv", g.layers, qkv, width, 0.02)
    load("attn_out", g.layers, width, g.heads * g.head_dim, deep)
    load("mlp_up", g.layers, g.ffn * (2 if g.llama else 1), width, 0.02)
    load("mlp_down", g.layers, width, g.ffn, deep)
    load("mem_query", g.layers, g.d_mem, width, 0.02)
    load("mem_key", g.layers, g.d_mem, width, 0.02)
    load("mem_value", g.layers, width, width, 0.002)
    load("mem_gate", g.layers, 1, width, 0.02)
    load("embedding", 1, g.vocab, width, 0.5)
    load("memory", 1, g.memory, width, 0.5)
    fill("mem_gate_bias", g.layers, 1, 0.0)
    for norm in ("norm1", "norm2"):
        fill(norm, g.layers, width, 1.0)
    fill("final_norm", 1, width, 1.0)
    if not g.llama:
        load("positions", 1, g.rows + g.memory, width, 0.02)
        sizes = {
            "qkv_bias": qkv,
            "attn_out_bias": width,
            "mlp_up_bias": g.ffn,
            "mlp_down_bias": width,
        }
        for slot, size in sizes.items():
            fill(slot, g.layers, size, 0.01)
        for norm in ("norm1_bias", "norm2_bias"):
            fill(norm, g.layers, width, 0.01)
        fill("final_norm_bias", 1, width, 0.01)
    core.finish_loading()
    return core


def random_ids(geometry: Geometry, count: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).integers(0, geometry.vocab, count).astype(np.int32)


def feed(session: Any, ids: Array, logits: str = "none") -> None:
    _core.run_many([(session, ids)], logits, False, True, False, None)


def timed(body: Callable[[], Any], *, least: int = 3, seconds: float = 1.5) -> dict[str, Any]:
    """Median and spread of repeated runs, after one that is not counted."""
    body()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < least or (time.perf_counter() - start < seconds and len(times) < 50):
        begin = time.perf_counter()
        body()
        times.append(time.perf_counter() - begin)
    return {
        "median_s": statistics.median(times),
        "least_s": min(times),
        "most_s": max(times),
        "runs": len(times),
    }


class Ceiling:
    """Rate of an 8192 bf16 matrix product on random data, sustained for half a second."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.a, self.b = (
            torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        self.out = torch.empty_like(self.a)

    def measure(self) -> float:
        torch = self.torch
        for _ in range(200):
            torch.matmul(self.a, self.b, out=self.out)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        count = 300
        for _ in range(count):
            torch.matmul(self.a, self.b, out=self.out)
        torch.cuda.synchronize()
        return count * 2.0 * 8192**3 / (time.perf_counter() - begin)


def prefill(
    geometry: Geometry,
    tokens: int,
    schedule: str,
    rate: float,
    core: Any = None,
    seconds: float = 1.5,
) -> dict[str, Any]:
    core = core or make_engine(geometry, schedule=schedule)
    ids = random_ids(geometry, tokens)

    def run() -> None:
        session = _core.Session(core)
        feed(session, ids)
        session.close()

    found = timed(run, seconds=seconds)
    products, attention = geometry.floor_flops(tokens)
    floor = products / rate + attention / ATTENTION_RATE
    return found | {
        "geometry": geometry.name,
        "segment": geometry.segment,
        "tokens": tokens,
        "schedule": schedule,
        "floor_s": floor,
        "over_floor": found["median_s"] / floor,
    }


def decode(geometry: Geometry, new: int, core: Any) -> dict[str, Any]:
    """One stream, greedy, half a segment behind it."""
    params = _core.SamplingParams()
    session = _core.Session(core)
    feed(session, random_ids(geometry, geometry.segment // 2), "last")

    def run() -> None:
        stream = session.fork()
        for _ in range(new):
            ((token, _),) = _core.choose([stream], params)
            feed(stream, np.array([token], np.int32))
        stream.last_logits()

    found = timed(run)
    return found | {"geometry": geometry.name, "tokens_per_s": new / found["median_s"]}


def sessions(geometry: Geometry, count: int, rounds: int, core: Any) -> dict[str, Any]:
    """`count` sessions, each stepping one segment a call."""
    streams = [_core.Session(core) for _ in range(count)]
    ids = [random_ids(geometry, geometry.segment, seed=i) for i in range(count)]

    def run() -> None:
        for _ in range(rounds):
            rows = list(zip(streams, ids, strict=True))
            _core.run_many(rows, "none", True, True, False, None)

    found = timed(run)
    return found | {
        "geometry": geometry.name,
        "sessions": count,
        "tokens_per_s": count * rounds * geometry.segment / found["median_s"],
    }


def profile(body: Callable[[], Any]) -> list[dict[str, Any]]:
    """Device time by kernel of one run."""
    import torch
    from torch.profiler import ProfilerActivity

    body()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        body()
        torch.cuda.synchronize()
    rows = [
        {"kernel": e.key, "calls": e.count, "us": e.self_device_time_total}
        for e in found.key_averages()
        if e.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row["us"])


def git_commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def show(title: str, row: dict[str, Any]) -> None:
    parts = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()]
    print(f"{title}: " + " ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--what", nargs="*", default=["prefill", "decode", "sessions", "profile"])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "commit": git_commit(),
        "host": platform.node(),
        "dtype": "bfloat16",
        "rows": [],
        "profiles": {},
    }
    ceiling = Ceiling()
    rate = ceiling.measure()
    result["gemm_flops"] = rate
    print(f"sustained GEMM: {rate / 1e12:.0f} TFLOP/s", flush=True)

    def note(kind: str, row: dict[str, Any]) -> None:
        result["rows"].append({"kind": kind} | row)
        show(kind, row)
        arguments.out.write_text(json.dumps(result, indent=1))

    for name in ("1b", "gpt2"):
        geometry = GEOMETRIES[name]
        core = make_engine(geometry, schedule="diagonal")
        result.setdefault("device", core.description)
        if "prefill" in arguments.what:
            lengths = {"1b": [4096, 16384, 32768, 131072], "gpt2": [131072, 1048576]}[name]
            for tokens in lengths[:1] + lengths[-1:] if arguments.quick else lengths:
                rate = ceiling.measure()
                note(
                    "prefill",
                    prefill(geometry, tokens, "diagonal", rate, core) | {"gemm_flops": rate},
                )
        if "profile" in arguments.what:
            ids = random_ids(geometry, geometry.segment * 48)

            def run(core: Any = core, ids: Array = ids) -> None:
                feed(_core.Session(core), ids)

            rows = profile(run)
            result["profiles"][name] = rows
            total = sum(row["us"] for row in rows)
            for row in rows[:24]:
                share = f"{row['us'] / total:6.1%} {row['calls']:>6}"
                print(f"  {row['us']:>10.0f} us {share} {row['kernel'][:110]}")
            print(f"  {total:>10.0f} us in all", flush=True)
        if "decode" in arguments.what:
            note("decode", decode(geometry, 64, core))
        if "sessions" in arguments.what and not arguments.quick:
            note("sessions", sessions(geometry, 64, 2, core))
        if "prefill" in arguments.what and not arguments.quick:
            tokens = {"1b": 32768, "gpt2": 131072}[name]
            note("prefill", prefill(geometry, tokens, "sequential", rate))
        del core
    if "segments" in arguments.what:
        for segment in (512, 4096):
            geometry = replace(GEOMETRIES["1b"], segment=segment)
            for schedule in ("diagonal", "sequential"):
                note("prefill", prefill(geometry, 131072, schedule, ceiling.measure()))
    arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
