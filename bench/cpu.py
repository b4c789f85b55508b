"""The CPU engine against plain eager PyTorch, two threads each, interleaved in one process.

    python bench/cpu.py [--quick] [--what prefill decode schedule threads isa gemm memory]
                        [--gemm-bench PATH] [--out bench/results/cpu.json]

The gate comes first: where engine and rival disagree nothing is timed.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import armt
import harness
import models
from models import GEOMETRIES, Geometry

THREADS = 2
SECTIONS = ("prefill", "decode", "schedule", "threads", "isa", "gemm", "memory")
# What a ratio of this benchmark should reach (rival's time over ours).
TARGETS = {
    ("prefill", "gpt2", "float32"): 1.15,
    ("prefill", "gpt2", "bfloat16"): 2.0,
    ("prefill", "retrieval", "float32"): 10.0,
    ("decode", "gpt2", "bfloat16"): 2.0,
}
# Largest difference of logits, relative to the largest logit, that the gate lets pass. PyTorch's
# bfloat16 rounds activations too, the engine only weights: so it is the rival that is off there.
GATE = {"float32": 2e-5, "bfloat16": 2e-2}
DTYPES = ("float32", "bfloat16")
FLAT_FROM = 50_000


class Contest:
    """Engine and rival over the same weights, in one dtype."""

    def __init__(self, geometry: Geometry, weights: dict[str, Any], dtype: str) -> None:
        import torch

        from rival_torch import TorchArmt

        torch.set_num_threads(THREADS)
        self.geometry = geometry
        self.dtype = dtype
        self.engine = models.make_engine(geometry, weights, dtype=dtype, threads=THREADS)
        self.rival = TorchArmt(geometry, weights, getattr(torch, dtype))

    def gate(self, segments: int, new: int) -> dict[str, Any]:
        """Differences of logits (prefill and decode) and memory; raises where they are large."""
        import torch

        g = self.geometry
        ids = models.random_ids(g, g.segment * segments, seed=7)
        tail = models.random_ids(g, 3 + new, seed=8)
        session = self.engine.session()
        ours = session.feed(ids, logits="all").logits
        session.close_segment()
        matrix, normaliser = session.state.memory(g.layers - 1)
        decoded = [session.feed(tail[:3], logits="last").logits]
        decoded += [session.feed(tail[i : i + 1], logits="last").logits for i in range(3, 3 + new)]

        self.rival.reset()
        theirs = torch.cat(self.rival.prefill(ids, "all")).numpy()
        memory = self.rival.memories[-1]
        steps = [self.rival.open_segment(tail[:3], new)]
        steps += [self.rival.extend(tail[i : i + 1]) for i in range(3, 3 + new)]

        found = {
            "logits": worst(ours, theirs),
            "decode": worst(np.stack(decoded), torch.stack(steps).numpy()),
            "matrix": worst(matrix[0], memory.matrix.numpy()),
            "normaliser": worst(normaliser[0], memory.normaliser.numpy()),
            "bound": GATE[self.dtype],
        }
        off = {k: v for k, v in found.items() if not v <= GATE[self.dtype]}
        if off:
            raise SystemExit(f"gate: {g.name} {self.dtype}: engine and rival disagree: {off}")
        return found

    def prefill(self, ids: Any, logits: str) -> dict[str, Callable[[], Any]]:
        def ours() -> None:
            session = self.engine.session()
            session.feed(ids, logits=logits)
            session.close_segment()

        def theirs() -> None:
            self.rival.reset()
            self.rival.prefill(ids, logits)

        return {f"engine {self.dtype}": ours, f"torch {self.dtype}": theirs}

    def decode(self, prompt: Any, new: int) -> dict[str, Callable[[], Any]]:
        """Greedy; the prompt is read before the clock starts (each run forks or rewinds)."""
        session = self.engine.session()
        session.feed(prompt)
        last = self.rival.open_segment(prompt, new)
        start = self.rival.cached

        def ours() -> None:
            for _ in session.fork().generate(new):
                pass

        def theirs() -> None:
            self.rival.cached = start
            self.rival.generate(new, last)

        return {f"engine {self.dtype}": ours, f"torch {self.dtype}": theirs}


def worst(found: Any, expected: Any) -> float:
    """Largest difference relative to the largest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def rates(samples: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    rows = {}
    for name, seconds in samples.items():
        row = harness.median_spread(seconds)
        rows[name] = row | {"tokens_per_s": tokens / row["median"]}
    return rows


def against_torch(
    section: str, geometry: Geometry, samples: dict[str, list[float]], tokens: int
) -> dict[str, Any]:
    """Rates, ratios per dtype, and the targets where there are any."""
    result: dict[str, Any] = {"tokens": tokens, "rates": rates(samples, tokens), "ratios": {}}
    for dtype in DTYPES:
        row = harness.ratio(samples, f"torch {dtype}", f"engine {dtype}")
        target = TARGETS.get((section, geometry.name, dtype))
        if target is not None:
            row |= {"target": target, "reached": row["median"] >= target}
        result["ratios"][dtype] = row
        shown = {
            f"{k}_tokens_per_s": result["rates"][f"{k} {dtype}"]["tokens_per_s"]
            for k in ("engine", "torch")
        }
        harness.show(
            f"{section} {geometry.name} {dtype}",
            shown | {"ratio": row["median"], "spread": row["spread"], "target": target},
        )
    return result


@functools.cache
def contests(name: str, segments: int) -> dict[str, tuple[Contest, dict[str, Any]]]:
    """Both dtypes of a geometry, each through its gate."""
    geometry = GEOMETRIES[name]
    weights = models.random_weights(geometry)
    found = {}
    for dtype in DTYPES:
        contest = Contest(geometry, weights, dtype)
        gate = contest.gate(segments, 5)
        harness.show(f"gate {name} {dtype}", gate)
        found[dtype] = (contest, gate)
    return found


def prefill(quick: bool) -> dict[str, Any]:
    results = {}
    for name, segments, repeats in (("gpt2", 4, 5), ("retrieval", 1000, 7)):
        pairs = contests(name, 3 if name == "gpt2" else 20)
        geometry = GEOMETRIES[name]
        ids = models.random_ids(geometry, geometry.segment * (segments // 2 if quick else segments))
        for logits in ("none",) if quick else ("none", "all"):
            candidates: dict[str, Callable[[], Any]] = {}
            for contest, _ in pairs.values():
                candidates |= contest.prefill(ids, logits)
            # Logits of all tokens cost more time and are not what the targets are about.
            rounds = 3 if quick or logits == "all" else repeats
            samples = harness.interleave(candidates, rounds)
            row = against_torch(
                "prefill" if logits == "none" else "prefill+logits", geometry, samples, len(ids)
            )
            row["gate"] = {dtype: gate for dtype, (_, gate) in pairs.items()}
            results[f"{name} logits={logits}"] = row
    return results


def decode(quick: bool) -> dict[str, Any]:
    results = {}
    for name, prompt, new in (("gpt2", 256, 32), ("retrieval", 3, 6)):
        pairs = contests(name, 3 if name == "gpt2" else 20)
        geometry = GEOMETRIES[name]
        candidates: dict[str, Callable[[], Any]] = {}
        for contest, _ in pairs.values():
            candidates |= contest.decode(models.random_ids(geometry, prompt), new)
        samples = harness.interleave(candidates, 3 if quick else 7)
        results[name] = against_torch("decode", geometry, samples, new) | {"prompt": prompt}
    return results


def compare_engines(
    name: str, segments: int, options: dict[str, dict[str, Any]], repeats: int
) -> dict[str, Any]:
    """Prefill of one model by engines that differ in their options; answers must be bit-equal."""
    geometry = GEOMETRIES[name]
    weights = models.random_weights(geometry)
    ids = models.random_ids(geometry, geometry.segment * segments)
    engines = {key: models.make_engine(geometry, weights, **more) for key, more in options.items()}

    def read(engine: armt.Engine) -> Any:
        return engine.session().feed(ids, logits="last").logits

    answers = {key: read(engine) for key, engine in engines.items()}
    first = next(iter(answers.values()))
    samples = harness.interleave(
        {k: functools.partial(read, e) for k, e in engines.items()}, repeats
    )
    result = rates(samples, len(ids))
    for key, answer in answers.items():
        result[key]["worst_difference"] = worst(answer, first)
    harness.show(f"{name}", {k: row["tokens_per_s"] for k, row in result.items()})
    return result


def by_schedule(quick: bool) -> dict[str, Any]:
    options = {
        schedule: {"schedule": schedule, "threads": THREADS, "dtype": "float32"}
        for schedule in ("sequential", "diagonal", "auto")
    }
    return {
        name: compare_engines(name, segments, options, 3 if quick else 5)
        for name, segments in (("gpt2", 4 if quick else 6), ("retrieval", 200))
    }


def by_threads(quick: bool) -> dict[str, Any]:
    options = {f"{n} threads": {"threads": n, "dtype": "float32"} for n in (1, THREADS)}
    return {
        name: compare_engines(name, segments, options, 3 if quick else 7)
        for name, segments in (("gpt2", 2), ("retrieval", 200))
    }


def by_isa(quick: bool) -> dict[str, Any]:
    """Instruction sets; only those with fused multiply-add agree bit for bit."""
    options = {
        f"{isa} {dtype}": {"isa": isa, "threads": THREADS, "dtype": dtype}
        for isa in harness.engine_isas()
        for dtype in DTYPES
    }
    return {"gpt2": compare_engines("gpt2", 1, options, 1 if quick else 5)}


def gemm(program: Path | None) -> dict[str, Any]:
    """Rates of the packed product beside the peak of a core, from tests/cpp/gemm_bench."""
    if program is None or not program.exists():
        return {"left_out": "no gemm_bench given; build with -DARMT_BUILD_TESTS=ON"}
    text = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    peak = float(re.search(r"([\d.]+) GFLOP/s a core in L1", text).group(1))
    pattern = r"(\w+) K +(\d+) N +(\d+) M +(\d+): 1 thread +([\d.]+), 2 threads +([\d.]+)"
    rows = [
        {
            "weights": dtype,
            "k": int(k),
            "n": int(n),
            "m": int(m),
            "gflops_1": float(one),
            "gflops_2": float(two),
            "share_1": float(one) / peak,
            "share_2": float(two) / (2 * peak),
        }
        for dtype, k, n, m, one, two in re.findall(pattern, text)
    ]
    big = [row for row in rows if row["m"] >= 528]
    harness.show("gemm", {"peak_gflops": peak, "least_share_1_big": min(r["share_1"] for r in big)})
    return {"peak_gflops_per_core": peak, "rows": rows}


def read_long_stream(name: str, tokens: int) -> dict[str, Any]:
    """Resident memory while one call feeds `tokens` tokens; runs in a process of its own."""
    geometry = GEOMETRIES[name]
    engine = models.make_engine(geometry, dtype="float32", threads=THREADS)
    ids = models.random_ids(geometry, tokens)
    points: list[tuple[int, int]] = []

    def note(done: int, *_: Any) -> None:
        if not points or done - points[-1][0] >= tokens // 200:
            points.append((done, harness.resident_bytes()))

    engine.session().feed(ids, progress=note)
    points.append((tokens, harness.resident_bytes()))
    settled = [size for done, size in points if done >= FLAT_FROM]
    return {
        "tokens": tokens,
        "resident_mib_at_start": points[0][1] / harness.MIB,
        "resident_mib_from_50000": [min(settled) / harness.MIB, max(settled) / harness.MIB],
        "growth_from_50000": max(settled) / settled[0] - 1.0,
        "flat_within_1_percent": max(settled) <= 1.01 * settled[0],
    }


def memory(quick: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    results = {}
    for name, tokens in (("retrieval", 200_000 if quick else 1_000_000),):
        with context.Pool(1) as pool:
            results[name] = pool.apply(read_long_stream, (name, tokens))
        harness.show(f"memory {name}", results[name])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few repeats, short streams")
    parser.add_argument("--what", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--gemm-bench", type=Path, help="tests/cpp/gemm_bench of a build folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    arguments = parser.parse_args()
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "prefill": lambda: prefill(arguments.quick),
        "decode": lambda: decode(arguments.quick),
        "schedule": lambda: by_schedule(arguments.quick),
        "threads": lambda: by_threads(arguments.quick),
        "isa": lambda: by_isa(arguments.quick),
        "gemm": lambda: gemm(arguments.gemm_bench),
        "memory": lambda: memory(arguments.quick),
    }
    results: dict[str, Any] = {"threads": THREADS, "quick": arguments.quick}
    for name in arguments.what:
        results[name] = sections[name]()
        harness.write(arguments.out, "cpu", results)


if __name__ == "__main__":
    main()
