"""Forms of CUDA kernels that are not in use yet, beside those that are (cuda/trial.h), in turns.

    python bench/gpu_variants.py --out variants.json

A form is on while ARMT_TRY names it. Before its times stand the differences of its last logits and
memories to those of the forms in use, relative, root mean square: no more than rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from armt import _core
from gpu import Ceiling, decode, operations, profile, show
from gpu_models import GEOMETRIES, Geometry, feed, make_engine, random_ids

PREFILL = ["", "attention", "halves", "attention,halves"]
DECODE = ["", "decode"]
TOKENS = {"1b": [4096, 65536], "gpt2": [65536, 524288]}


def use(form: str) -> None:
    os.environ["ARMT_TRY"] = form


def relative(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def outcome(core: Any, geometry: Geometry, segments: int) -> tuple[Any, Any]:
    """Logits behind a few segments and a half, and the first and last memories."""
    session = _core.Session(core)
    feed(session, random_ids(geometry, geometry.segment * segments + geometry.segment // 2), "last")
    state = session.snapshot()
    memories = [np.asarray(state.memory(layer)[0]) for layer in (0, geometry.layers - 1)]
    return np.asarray(session.last_logits()), np.concatenate([m.ravel() for m in memories])


def in_turns(
    forms: list[str], body: Callable[[str], None], rounds: int = 4
) -> dict[str, dict[str, float]]:
    """Seconds by form; the first round is not counted."""
    times: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(rounds + 1):
        for form in forms if number % 2 else reversed(forms):
            use(form)
            begin = time.perf_counter()
            body(form)
            if number:
                times[form].append(time.perf_counter() - begin)
    use("")
    return {
        form or "in use": {"median_s": statistics.median(t), "least_s": min(t), "most_s": max(t)}
        for form, t in times.items()
    }


def prefills(geometry: Geometry, rows: list[dict[str, Any]]) -> None:
    core = make_engine(geometry, schedule="diagonal")
    use("")
    expected = outcome(core, geometry, 6)
    for form in PREFILL[1:]:
        use(form)
        found = outcome(core, geometry, 6)
        row = {
            "kind": "difference",
            "geometry": geometry.name,
            "form": form,
            "logits": relative(found[0], expected[0]),
            "memory": relative(found[1], expected[1]),
        }
        rows.append(row)
        show("difference", row)
    for tokens in TOKENS[geometry.name]:
        ids = random_ids(geometry, tokens)

        def read(_: str, ids: Any = ids) -> None:
            session = _core.Session(core)
            feed(session, ids)
            session.close()

        for form, times in in_turns(PREFILL, read).items():
            row = {"kind": "prefill", "geometry": geometry.name, "tokens": tokens, "form": form}
            rows.append(row | times)
            show("prefill", row | times)
    ids = random_ids(geometry, geometry.segment * 40)
    for form in (PREFILL[0], PREFILL[-1]):
        use(form)
        kernels, times = profile(lambda: feed(_core.Session(core), ids))
        row = {"kind": "profile", "geometry": geometry.name, "form": form or "in use"} | times
        rows.append(row | {"us": operations(kernels), "kernels": kernels[:24]})
        show("profile", row | {"us": {k: round(v) for k, v in operations(kernels).items()}})
    use("")


def decodes(geometry: Geometry, rows: list[dict[str, Any]]) -> None:
    cores = {form: make_engine(geometry, schedule="diagonal") for form in DECODE}
    rates: dict[str, list[float]] = {form: [] for form in DECODE}
    for number in range(4):
        for form in DECODE if number % 2 else reversed(DECODE):
            use(form)  # while it records its graphs
            rates[form].append(decode(geometry, 64, cores[form])["tokens_per_s"])
    use("")
    for form, found in rates.items():
        row = {"kind": "decode", "geometry": geometry.name, "form": form or "in use"}
        seconds = sorted(1.0 / rate for rate in found)
        row |= {"median_s": statistics.median(seconds), "least_s": seconds[0]}
        row |= {"most_s": seconds[-1], "tokens_per_s": 1.0 / row["median_s"]}
        rows.append(row)
        show("decode", row)


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A line a form and size: its time beside that of the forms in use, from least to most."""
    lines = []
    timed = [row for row in rows if "median_s" in row]
    for row in timed:
        if row["form"] == "in use":
            before = row
            continue
        size = f"{row['tokens']} tokens" if "tokens" in row else "a token"
        lines.append(
            f"{row['form']}: {row['kind']} {row['geometry']}, {size}: {spread(before)} -> "
            f"{spread(row)} ms, {before['median_s'] / row['median_s']:.3f} times as fast"
        )
    return sorted(lines)


def spread(row: dict[str, Any]) -> str:
    return f"{row['median_s'] * 1e3:.3f} [{row['least_s'] * 1e3:.3f}, {row['most_s'] * 1e3:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("variants.json"))
    parser.add_argument("--geometries", nargs="*", default=["gpt2", "1b"], choices=GEOMETRIES)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    rate = Ceiling().measure()
    print(f"sustained GEMM: {rate / 1e12:.0f} TFLOP/s", flush=True)
    for part in (prefills, decodes):
        for name in options.geometries:
            part(GEOMETRIES[name], rows)
            options.out.write_text(json.dumps({"gemm_flops": rate, "rows": rows}, indent=1) + "\n")
    print(*summary(rows), sep="\n", flush=True)


if __name__ == "__main__":
    main()
