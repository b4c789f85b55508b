"""Endless streams: memory, latency and numbers over millions of tokens, float32 against float64.

python bench/endless.py --tokens 50000000 --writes 100000 --out bench/results/endless_cpu.json

stream     one session reads random tokens in calls of 1,000 segments: growth of resident memory,
           values that are not finite, time of a call at the end against the beginning: seconds,
           and seconds of processor time, which other work on the machine changes little.
precision  one layer's memory in float32 against the reference's rule in float64
           (tests/reference), both written from the same rows.
adversary  the same with keys that are zero, huge, repeated, orthogonal, or alternate between
           these: they drive the denominator to its floor of 1e-5.

Ends with 1 if a bound of BOUNDS is broken.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import harness
import models
from armt._core import testing
from reference.memory import LayerMemory, MemoryMaps, MemoryRule, empty_memory, write

Floats = npt.NDArray[np.float32]

BOUNDS = {"mib_per_million_tokens": 1.0, "last_to_first": 1.5, "relative_difference": 1e-4}
PROGRESS_CALLS = 100
CALL_SEGMENTS = 1000
D, D_MEM, MEMORY_TOKENS = 32, 8, 4  # of the precision part: width, key width, rows a write


def stream(geometry: models.Geometry, tokens: int, device: str, threads: int) -> dict[str, Any]:
    """Reads `tokens` tokens, at least three calls of them."""
    engine = models.make_engine(geometry, device=device, dtype="float32", threads=threads)
    rng = np.random.default_rng(0)
    size = CALL_SEGMENTS * engine.segment_size
    calls = max(3, tokens // size)
    session = engine.session()
    seconds: list[float] = []
    processor: list[float] = []
    resident: list[int] = []
    finite = True
    for call in range(calls):
        ids = rng.integers(0, engine.vocab_size, size)
        begin, begin_processor = time.perf_counter(), time.process_time()
        session.feed(ids)
        seconds.append(time.perf_counter() - begin)
        processor.append(time.process_time() - begin_processor)
        resident.append(harness.resident_bytes())
        finite = finite and bool(np.isfinite(session.logits).all())
        if call % PROGRESS_CALLS == PROGRESS_CALLS - 1:
            harness.show(
                "stream", {"tokens": session.tokens, "rss_mib": resident[-1] / harness.MIB}
            )
    part = max(1, calls // 10)
    # The first calls fill caches of the allocator: the slope is that of the rest.
    kept = np.asarray(resident[part:], np.float64) / harness.MIB
    millions = np.arange(len(kept)) * size / 1e6
    slope = float(np.polyfit(millions, kept, 1)[0]) if len(kept) > 1 else 0.0
    # Of a device's time the processor sees nothing.
    ratio = last_to_first(processor if device == "cpu" else seconds, part)
    return {
        "geometry": geometry.name,
        "device": engine.description,
        "tokens": session.tokens,
        "segments": session.segments,
        "tokens_per_second": session.tokens / sum(seconds),
        "mib_per_million_tokens": slope,
        "resident_mib": {"first": resident[0] / harness.MIB, "last": resident[-1] / harness.MIB},
        "call_seconds": ends(seconds, part),
        "call_processor_seconds": ends(processor, part),
        "last_to_first": ratio,
        "last_to_first_wall": last_to_first(seconds, part),
        "finite": finite and engine.stats().get("nonfinite", 0) == 0,
    }


def ends(values: list[float], part: int) -> dict[str, float]:
    """Medians of the first and the last ``part`` values."""
    return {"first": statistics.median(values[:part]), "last": statistics.median(values[-part:])}


def last_to_first(values: list[float], part: int) -> float:
    found = ends(values, part)
    return found["last"] / found["first"]


def normal_rows(rng: np.random.Generator) -> Iterator[Floats]:
    while True:
        yield rng.standard_normal((MEMORY_TOKENS, D)).astype(np.float32)


def zero_rows(rng: np.random.Generator) -> Iterator[Floats]:
    while True:
        yield np.zeros((MEMORY_TOKENS, D), np.float32)


def huge_rows(rng: np.random.Generator) -> Iterator[Floats]:
    for rows in normal_rows(rng):
        yield rows * np.float32(1e4)


def repeated_rows(rng: np.random.Generator) -> Iterator[Floats]:
    row = next(normal_rows(rng))[:1]
    while True:
        yield np.repeat(row, MEMORY_TOKENS, axis=0)


def orthogonal_rows(rng: np.random.Generator) -> Iterator[Floats]:
    """Rows of an orthogonal matrix, one after the other: new directions first, then old ones."""
    basis = np.linalg.qr(rng.standard_normal((D, D)))[0].astype(np.float32)
    at = 0
    while True:
        yield basis[[(at + i) % D for i in range(MEMORY_TOKENS)]]
        at += MEMORY_TOKENS


def mixed_rows(rng: np.random.Generator) -> Iterator[Floats]:
    kinds = [kind(rng) for kind in (normal_rows, zero_rows, repeated_rows, orthogonal_rows)]
    while True:
        yield next(kinds[int(rng.integers(len(kinds)))])


ADVERSARIES: dict[str, Callable[[np.random.Generator], Iterator[Floats]]] = {
    "zero": zero_rows,
    "huge": huge_rows,
    "repeated": repeated_rows,
    "orthogonal": orthogonal_rows,
    "mixed": mixed_rows,
}


def both_memories(dialect: str) -> tuple[Any, MemoryRule, MemoryMaps]:
    """The engine's operations and the reference's rule over the same weights."""
    paper = dialect == "paper"
    decoder = {"d_model": D, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 4}
    memory = {"dialect": dialect, "memory_tokens": MEMORY_TOKENS, "d_mem": D_MEM, "rolls": 3}
    operations = testing.Operations(decoder, memory | {"normalise_keys": not paper}, threads=1)
    rng = np.random.default_rng(7)
    shapes = {
        "mem_query": (D_MEM, D),
        "mem_key": (D_MEM, D),
        "mem_value": (D, D),
        "mem_gate": (1, D),
        "mem_gate_bias": (1,),
    }
    weights = {
        name: (rng.standard_normal(shape) * D**-0.5).astype(np.float32)
        for name, shape in shapes.items()
    }
    for name, values in weights.items():
        operations.load(name, 0, values)
    rule = MemoryRule(normalise=not paper, gamma_epsilon=1e-5 if paper else 0.0)
    return operations, rule, MemoryMaps(*(w.astype(np.float64) for w in weights.values()))


def relative(found: Floats, expected: npt.NDArray[np.float64]) -> float:
    """The largest difference in units of the largest value."""
    largest = float(np.abs(expected).max())
    return float(np.abs(found - expected).max()) / (largest if largest > 0 else 1.0)


def compare(
    dialect: str, rows: Callable[[np.random.Generator], Iterator[Floats]], writes: int
) -> dict[str, Any]:
    """`writes` writes of the same rows in float32 and in float64."""
    operations, rule, maps = both_memories(dialect)
    exact: LayerMemory = empty_memory(rule, maps, batch=1)
    memory: tuple[Floats, Floats] | None = None
    worst = {"A": 0.0, "z": 0.0}
    source = rows(np.random.default_rng(3))
    finite = True
    for number in range(writes):
        y = next(source)
        a, z = operations.memory_write(y, [memory], [MEMORY_TOKENS], [MEMORY_TOKENS])[0][:2]
        memory = (a, z)
        exact, _ = write(rule, maps, exact, y.astype(np.float64)[None])
        if number % 97 == 0 or number == writes - 1:
            assert exact.z is not None
            worst["A"] = max(worst["A"], relative(a, exact.A[0]))
            worst["z"] = max(worst["z"], relative(z, exact.z[0]))
            finite = finite and bool(np.isfinite(a).all() and np.isfinite(z).all())
    return {"writes": writes, "worst": worst, "finite": finite, "largest_A": float(np.abs(a).max())}


def broken(results: dict[str, Any]) -> list[str]:
    """The bounds that did not hold."""
    faults = []
    run = results.get("stream")
    if run is not None:
        for name in ("mib_per_million_tokens", "last_to_first"):
            if run[name] > BOUNDS[name]:
                faults.append(f"stream: {name} is {run[name]:.3g}, expected at most {BOUNDS[name]}")
        if not run["finite"]:
            faults.append("stream: values that are not finite")
    for name, row in results.items():
        if "worst" not in row:
            continue
        if not row["finite"]:
            faults.append(f"{name}: values that are not finite")
        difference = max(row["worst"].values())
        if difference > BOUNDS["relative_difference"]:
            faults.append(f"{name}: float32 differs from float64 by {difference:.3g}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=50_000_000, help="0: no stream")
    parser.add_argument("--geometry", default="retrieval", choices=sorted(models.GEOMETRIES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--writes", type=int, default=100_000, help="0: no comparison")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    if options.writes:
        for dialect in ("paper", "modern"):
            name = f"precision {dialect}"
            results[name] = compare(dialect, normal_rows, options.writes)
            harness.show(name, results[name])
            for kind, rows in ADVERSARIES.items():
                name = f"adversary {dialect} {kind}"
                results[name] = compare(dialect, rows, max(1, options.writes // 10))
                harness.show(name, results[name])
    if options.tokens:
        geometry = models.GEOMETRIES[options.geometry]
        results["stream"] = stream(geometry, options.tokens, options.device, options.threads)
        harness.show("stream", results["stream"])
    if options.out is not None:
        harness.write(options.out, "endless", results | {"bounds": BOUNDS})
    for fault in broken(results):
        print(f"BROKEN: {fault}")
    return 1 if broken(results) else 0


if __name__ == "__main__":
    sys.exit(main())
