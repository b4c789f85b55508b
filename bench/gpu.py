"""Timings of the CUDA backend against floors measured in the same run.

    python bench/gpu.py --out results.json [--add] [--what prefill fp8 decode ...] [--quick]

Weights are random (conditioned: embeddings are large, memory values small), ids are random, the
head is left off in prefill. The floor of a prefill is its arithmetic over the rate of an 8192 bf16
matrix product sustained in this very run (attention over 400 TFLOP/s).

prefill    by length, both geometries, the diagonal and the sequential schedule
segments   the 1B geometry at other segment sizes
fp8        prefill in 8 bits beside bfloat16, both geometries
decode     one stream, greedy and with a temperature
sessions   64 sessions stepping together
rival      eager PyTorch on the GPU, the same weights (rival_torch.py)
drift      bfloat16 and 8 bits against float32 over long streams, the rival beside (gpu_long.py)
endless    50 million tokens: latency, memory, numbers (gpu_long.py)
spill      sessions of which half rest in host memory, beside an engine that keeps all (gpu_long.py)
profile    device time by kernel and by kind of operation, with shares of the ceilings
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

import gpu_long
from armt import _core
from gpu_models import GEOMETRIES, Geometry, feed, make_engine, random_ids
from harness import git_commit

ATTENTION_RATE = 400e12
PARTS = ["prefill", "segments", "fp8", "decode", "sessions", "rival", "drift", "endless", "spill"]
PARTS += ["profile"]  # what is run unless asked otherwise is all but this


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

    def bandwidth(self) -> float:
        """Bytes read and written a second by a copy of 4 GiB."""
        torch = self.torch
        a, b = (torch.empty(1 << 32, device="cuda", dtype=torch.uint8) for _ in range(2))
        b.copy_(a)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            b.copy_(a)
        torch.cuda.synchronize()
        return 20 * 2.0 * a.numel() / (time.perf_counter() - begin)


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


def decode(
    geometry: Geometry, core: Any, bandwidth: float, *, behind: int, temperature: float = 0.0
) -> dict[str, Any]:
    """One stream, so many tokens behind it; the floor is reading each weight once a token."""
    new = 64
    params = _core.SamplingParams(temperature=temperature)
    session = _core.Session(core)
    feed(session, random_ids(geometry, behind), "last")

    def run() -> None:
        stream = session.fork()
        for _ in range(new):
            ((token, _),) = _core.choose([stream], [params])
            feed(stream, np.array([token], np.int32))
        stream.last_logits()

    found = timed(run)
    rate = new / found["median_s"]
    return found | {
        "geometry": geometry.name,
        "behind": behind,
        "temperature": temperature,
        "tokens_per_s": rate,
        "bandwidth": bandwidth,
        "of_bandwidth": rate * geometry.decoded_bytes() / bandwidth,
    }


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


# Operations by their kernels' names, the first that fits; the rest are a library's products.
OPERATIONS = {
    "attention": r"armt.*(hopper_kernel|flash_kernel|attention)",
    "gated product": r"armt.*gated_kernel",
    "8-bit products": r"armt.*fp8_kernel",
    "8-bit rows": r"armt.*quantise",
    "memory read": r"armt.*(read_|round_matri)",
    "memory write": r"armt.*(write_|gather_writers)",
    "norms": r"armt.*norm",
    "keys and values": r"armt.*(store_|kv)",
    "other of ours": r"armt",
    "copies": r"(?i)mem(cpy|set)",
}


def operations(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds by kind of operation."""
    found: dict[str, float] = {}
    for row in rows:
        named = (kind for kind, name in OPERATIONS.items() if re.search(name, row["kernel"]))
        kind = next(named, "products")
        found[kind] = found.get(kind, 0.0) + row["us"]
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def busy(events: Any) -> dict[str, float]:
    """From the first kernel's start to the last one's end, and how much of it some kernel ran."""
    times = sorted(
        (e.time_range.start, e.time_range.end)
        for e in events
        if str(e.device_type).endswith("CUDA")
    )
    total, end = 0.0, times[0][0]
    for begin, stop in times:
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return {"span_us": end - times[0][0], "busy_us": total}


def profile(body: Callable[[], Any]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Device time by kernel of one run, and how busy the device was."""
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
    return sorted(rows, key=lambda row: -row["us"]), busy(found.events())


def show(title: str, row: dict[str, Any]) -> None:
    parts = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()]
    print(f"{title}: " + " ".join(parts), flush=True)


LENGTHS = {"1b": [4096, 16384, 32768, 131072], "gpt2": [131072, 1048576]}


class Run:
    """One run: what was asked for, what was found so far."""

    def __init__(self, out: Path, commit: str, quick: bool, add: bool = False) -> None:
        self.out, self.quick = out, quick
        self.ceiling = Ceiling()
        rate = self.ceiling.measure()
        print(f"sustained GEMM: {rate / 1e12:.0f} TFLOP/s", flush=True)
        self.result: dict[str, Any] = {
            "commit": commit,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": platform.node(),
            "dtype": "bfloat16",
            "gemm_flops": rate,
            "rows": [],
            "profiles": {},
        }
        if add and out.exists():
            self.result = json.loads(out.read_text())

    def note(self, kind: str, row: dict[str, Any]) -> None:
        self.result["rows"].append({"kind": kind} | row)
        show(kind, row)
        self.write()

    def write(self) -> None:
        self.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def prefill(
        self, kind: str, geometry: Geometry, tokens: int, schedule: str, core: Any = None
    ) -> float:
        """Seconds of one prefill, beside a ceiling measured just before."""
        rate = self.ceiling.measure()
        row = prefill(geometry, tokens, schedule, rate, core) | {"gemm_flops": rate}
        self.note(kind, row)
        return float(row["median_s"])

    def lengths(self, geometry: Geometry) -> list[int]:
        all_lengths = LENGTHS[geometry.name]
        return all_lengths[:1] + all_lengths[-1:] if self.quick else all_lengths

    def geometry(self, geometry: Geometry, what: list[str]) -> None:
        """All parts that share one engine."""
        core = make_engine(geometry, schedule="diagonal")
        self.result.setdefault("device", core.description)
        if "prefill" in what:
            for tokens in self.lengths(geometry):
                self.prefill("prefill", geometry, tokens, "diagonal", core)
        if "fp8" in what:
            self.fp8(geometry, core)
        if "profile" in what:
            self.profile(geometry.name, geometry, core)
        if "decode" in what:
            self.decode(geometry, core)
        if "sessions" in what and not self.quick:
            self.note("sessions", sessions(geometry, 64, 2, core))
        del core
        if "prefill" in what and not self.quick:
            tokens = {"1b": 32768, "gpt2": 131072}[geometry.name]
            self.prefill("prefill", geometry, tokens, "sequential")

    def decode(self, geometry: Geometry, core: Any) -> None:
        """Inside the first segment, then also behind a written memory, and with a temperature."""
        bandwidth, half = self.ceiling.bandwidth(), geometry.segment // 2
        self.note("decode", decode(geometry, core, bandwidth, behind=half))
        if self.quick:
            return
        self.note("decode", decode(geometry, core, bandwidth, behind=half, temperature=0.8))
        later = geometry.segment + half
        self.note("decode", decode(geometry, core, bandwidth, behind=later))

    def fp8(self, geometry: Geometry, core: Any) -> None:
        """In turn with bfloat16, so that both meet the same clock."""
        short = make_engine(geometry, schedule="diagonal", prefill_dtype="fp8")
        for tokens in self.lengths(geometry)[-1:] if self.quick else LENGTHS[geometry.name][-2:]:
            rate = self.ceiling.measure()
            before = prefill(geometry, tokens, "diagonal", rate, core, seconds=0.8)
            row = prefill(geometry, tokens, "diagonal", rate, short, seconds=0.8)
            gain = before["median_s"] / row["median_s"]
            self.note("fp8", row | {"bf16_s": before["median_s"], "times_faster": gain})
        if not self.quick:
            self.profile(geometry.name + " fp8", geometry, short)

    def profile(self, name: str, geometry: Geometry, core: Any) -> None:
        segments = 48
        ids = random_ids(geometry, geometry.segment * segments)
        rate = self.ceiling.measure()
        rows, times = profile(lambda: feed(_core.Session(core), ids))
        self.result["profiles"][name] = rows[:40]
        products, attention = geometry.floor_flops(geometry.segment * segments)
        kinds = operations(rows)
        self.note(
            "operations",
            {"geometry": geometry.name, "name": name, "tokens": geometry.segment * segments}
            | {"gemm_flops": rate, "us": kinds, "products_flop": products}
            | {"attention_flop": attention, "kernels": sum(row["calls"] for row in rows)}
            | times,
        )
        total = sum(row["us"] for row in rows)
        for row in rows[:20]:
            share = f"{row['us'] / total:6.1%} {row['calls']:>6}"
            print(f"  {row['us']:>10.0f} us {share} {row['kernel'][:110]}")
        print(f"  {total:>10.0f} us in all: {name}", flush=True)

    def segments(self) -> None:
        for segment in (512, 4096):
            geometry = replace(GEOMETRIES["1b"], segment=segment)
            for schedule in ("diagonal", "sequential"):
                self.prefill("prefill", geometry, 131072, schedule)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--what", nargs="*", default=PARTS[:-1], choices=PARTS)
    parser.add_argument("--add", action="store_true", help="to what the file holds already")
    parser.add_argument("--quick", action="store_true", help="few lengths, no comparisons")
    parser.add_argument("--geometries", nargs="*", default=list(GEOMETRIES), choices=GEOMETRIES)
    parser.add_argument("--tokens", type=int, default=50_000_000, help="of the endless stream")
    parser.add_argument("--drift", type=int, nargs="*", default=[32768, 131072, 1048576])
    parser.add_argument("--rival-tokens", type=int, default=131072, help="that the rival reads")
    parser.add_argument("--commit", default="", help="where git does not say it")
    options = parser.parse_args()
    run = Run(options.out, options.commit or git_commit(), options.quick, options.add)
    if {"prefill", "fp8", "profile", "decode", "sessions"} & set(options.what):
        for name in options.geometries:
            run.geometry(GEOMETRIES[name], options.what)
    if "segments" in options.what:
        run.segments()
    if "rival" in options.what:
        run.note("rival", gpu_long.rival_prefill(32768))
    if "drift" in options.what:
        for row in gpu_long.drift(options.drift, options.rival_tokens):
            run.note("drift", row)
    if "endless" in options.what:
        run.note("endless", gpu_long.endless(options.tokens))
    if "spill" in options.what:
        run.note("spill", gpu_long.spill())
    run.write()


if __name__ == "__main__":
    main()
