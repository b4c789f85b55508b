"""What every benchmark shares: the machine's description, interleaved timing, spread, JSON files.

A candidate is a function of no arguments; what it does is one sample. Candidates that are to be
compared run interleaved in one process, so that load and clock changes hit all of them alike.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

Candidate = Callable[[], Any]

PACKAGES = ("armt", "numpy", "torch")
MIB = 1024 * 1024


def environment() -> dict[str, Any]:
    """Machine, cores, cpu model, instruction sets, load, commit, versions of what was measured."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "cpu": cpu_model(),
        "isa": engine_isas(),
        "load_1m": round(os.getloadavg()[0], 2),
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def engine_isas() -> list[str]:
    """Instruction sets of the engine's CPU backend that this processor runs, least to best."""
    try:
        from armt._core import testing
    except ImportError:
        return []
    return list(testing.available_isas())


def git_commit() -> str:
    """The commit of the tree that this file lies in; "+changes" if files differ from it."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            module = sys.modules.get(name)
            found[name] = str(getattr(module, "__version__", "absent"))
    return found


def median_spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, least, greatest, quartiles and relative spread (quartile range / median)."""
    if not samples:
        raise ValueError("median_spread: found no samples, expected at least one")
    median = statistics.median(samples)
    low, high = min(samples), max(samples)
    if len(samples) >= 2:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {
        "median": median,
        "least": min(samples),
        "greatest": max(samples),
        "quartiles": [low, high],
        "spread": (high - low) / median if median else 0.0,
        "samples": len(samples),
    }


def interleave(
    candidates: Mapping[str, Candidate], repeats: int, *, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each run: `warmup` uncounted rounds, then `repeats` rounds of all candidates.

    Each round starts with another candidate, so that none always follows the same one.
    """
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            begin = time.perf_counter()
            candidates[name]()
            elapsed = time.perf_counter() - begin
            if turn >= warmup:
                samples[name].append(elapsed)
    return samples


def ratio(samples: Mapping[str, Sequence[float]], rival: str, ours: str) -> dict[str, Any]:
    """How many times faster `ours` is: the median of the per-round ratios, and their spread."""
    pairs = zip(samples[rival], samples[ours], strict=True)
    return median_spread([theirs / mine for theirs, mine in pairs])


def resident_bytes() -> int:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def write(path: str | os.PathLike[str], name: str, results: Any) -> Path:
    """Writes {"name", "environment", "results"} as JSON; the file is replaced in one step."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    document = {"name": name, "environment": environment(), "results": results}
    draft = target.with_name(target.name + ".part")
    draft.write_text(json.dumps(document, indent=1) + "\n")
    draft.replace(target)
    return target


def show(title: str, row: Mapping[str, Any]) -> None:
    """One line of figures for people."""
    parts = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()]
    print(f"{title}: " + " ".join(parts), flush=True)
