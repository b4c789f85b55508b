"""Tables and the plot of docs/performance.md, from bench/results/*.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tables import load, table

PLOT = Path(__file__).resolve().parent.parent / "docs" / "assets" / "prefill.svg"

MODELS = {"gpt2": "GPT-2 small", "retrieval": "retrieval", "1b": "1B"}


def measured_on(environment: dict[str, Any]) -> str:
    isa = environment["isa"][-1] if environment["isa"] else "unknown"
    versions = environment["versions"]
    return (
        f"{environment['cpu']}, {environment['usable_cores']} cores, {isa}; "
        f"torch {versions['torch']}; load of the machine {environment['load_1m']}; "
        f"commit {environment['commit'][:7]}."
    )


def cpu_table() -> str:
    found = load("cpu")
    rows = []
    for kind in ("prefill", "decode"):
        for name, case in found["results"][kind].items():
            if "logits=all" in name:
                continue
            model = MODELS[name.split()[0]]
            for dtype, ratio in case["ratios"].items():
                speed = [
                    case["tokens"] / case["rates"][f"{who} {dtype}"]["median"]
                    for who in ("engine", "torch")
                ]
                rows.append(
                    [
                        f"{model}, {kind}, {dtype}",
                        f"{speed[0]:,.0f}",
                        f"{speed[1]:,.0f}",
                        f"{ratio['median']:.2f}",
                        f"{ratio['spread']:.0%}",
                    ]
                )
    head = ["", "engine, tokens/s", "PyTorch, tokens/s", "times faster", "spread"]
    return table(head, rows) + "\n\n" + measured_on(found["environment"])


def sessions_table() -> str:
    found = load("cpu_sessions")
    r = found["results"]
    steps, restore = r["steps"], r["restore"]
    rows = [
        ["fork", f"{r['fork']['fork_seconds']['median'] * 1e6:.2f} us"],
        ["checkpoint", f"{r['fork']['checkpoint_seconds']['median'] * 1e6:.2f} us"],
        [
            f"load a state of {restore['file_bytes'] / 1e6:.2f} MB",
            f"{restore['load_seconds']['median'] * 1e3:.2f} ms",
        ],
        ["save it (with fsync)", f"{restore['save_seconds']['median'] * 1e3:.0f} ms"],
        [
            "restore, as a part of reading 100,000 tokens again",
            f"{restore['restore_part_of_reading']['median']:.2%}",
        ],
        [
            f"step of {steps['segment_tokens']} tokens over {steps['stream_tokens'] / 1e6:.1f} M "
            "tokens, p50 / p99",
            f"{steps['step']['p50'] * 1e3:.2f} / {steps['step']['p99'] * 1e3:.2f} ms",
        ],
        [
            "generated token, p50 / p99",
            f"{steps['generated_token']['p50'] * 1e3:.2f} / "
            f"{steps['generated_token']['p99'] * 1e3:.2f} ms",
        ],
    ]
    return table(["", "median"], rows) + "\n\n" + measured_on(found["environment"])


def server_table() -> str:
    found = load("server_load")
    r = found["results"]
    first = r["first_token_seconds"]
    rows = [
        ["conversations played", f"{r['scripts_played']:,}"],
        ["wrong answers", str(r["wrong_answers"])],
        ["errors", str(sum(r["errors"].values()))],
        [
            "time to first token, p50 / p99",
            f"{first['p50'] * 1e3:.0f} / {first['p99'] * 1e3:.0f} ms",
        ],
        ["throughput, of the engine's own on the same work", f"{r['mixed_share_of_engine']:.0%}"],
    ]
    head = [f"{r['clients']} clients, {r['seconds']:.0f} s", ""]
    return table(head, rows) + "\n\n" + measured_on(found["environment"])


def gpu_rows(kind: str) -> list[dict[str, Any]]:
    return [row for row in load("h200")["rows"] if row["kind"] == kind]


def gpu_about() -> str:
    found = load("h200")
    return f"{found['device']}; {found['dtype']}; commit {found['commit'][:7]}."


def prefill_table() -> str:
    rows = [
        [
            f"{MODELS[r['geometry']]}, segment {r['segment']}, {r['schedule']}",
            f"{r['tokens']:,}",
            f"{r['median_s'] * 1e3:,.1f} ms",
            f"{r['floor_s'] * 1e3:,.1f} ms",
            f"{r['over_floor']:.2f}",
            f"{r['tokens'] / r['median_s']:,.0f}",
        ]
        for r in gpu_rows("prefill")
    ]
    head = ["", "tokens", "time", "floor", "over the floor", "tokens/s"]
    return table(head, rows) + "\n\n" + gpu_about()


def only(kind: str, **wanted: Any) -> dict[str, Any]:
    (row,) = (r for r in gpu_rows(kind) if all(r.get(k) == v for k, v in wanted.items()))
    return row


def aims() -> list[tuple[str, float, float, str]]:
    """What, aim (negative: at most that), found, format."""
    short = only("prefill", geometry="1b", schedule="diagonal", tokens=4096)
    long = only("prefill", geometry="1b", schedule="diagonal", tokens=131072, segment=1024)
    gpt2 = only("prefill", geometry="gpt2", schedule="diagonal", tokens=1048576)
    endless, sessions = only("endless"), only("sessions", geometry="1b")
    decoded = only("decode", geometry="1b", temperature=0.0, behind=512)
    drifted = {r["who"]: r["logits"] for r in gpu_rows("drift") if r["tokens"] == 32768}
    return [
        ("1B, 4,096 tokens, ms", -15, short["median_s"] * 1e3, ".1f"),
        ("1B, 131,072 tokens, times the floor", -1.05, long["over_floor"], ".2f"),
        *(
            (
                f"1B, segments of {segment:,}, times the floor",
                -1.08,
                only("prefill", geometry="1b", schedule="diagonal", segment=segment)["over_floor"],
                ".2f",
            )
            for segment in (512, 4096)
        ),
        ("GPT-2 small, 1,048,576 tokens, s", -0.45, gpt2["median_s"], ".2f"),
        ("GPT-2 small, 50 million tokens, s", -22, endless["seconds"], ".1f"),
        (
            "the same, p99 of the last calls over p50 of the first",
            -1.5,
            endless["last_p99_over_first_p50"],
            ".2f",
        ),
        (
            "1B, 64 sessions, of one long stream's rate",
            0.85,
            sessions["tokens_per_s"] * long["median_s"] / long["tokens"],
            ".0%",
        ),
        (
            "1B, one stream decoded, tokens/s",
            1250,
            decoded["tokens_per_s"],
            ",.0f",
        ),
        ("the same, of the memory's bandwidth", 0.70, decoded["of_bandwidth"], ".0%"),
        (
            "1B, 131,072 tokens in 8 bits, times faster",
            1.4,
            only("fp8", geometry="1b", tokens=131072)["times_faster"],
            ".2f",
        ),
        (
            "drift of bfloat16 at 32,768 tokens, of eager PyTorch's",
            -0.33,
            drifted["engine bfloat16"] / drifted["eager PyTorch bfloat16"],
            ".2f",
        ),
    ]


def aims_table() -> str:
    rows = []
    for what, aim, found, form in aims():
        if aim < 0:
            bound, missed = "at most", found / -aim - 1
        else:
            bound, missed = "at least", 1 - found / aim
        rows.append(
            [
                what,
                f"{bound} {abs(aim):{form}}",
                f"{found:{form}}",
                "reached" if missed <= 0 else f"missed by {missed:.0%}",
            ]
        )
    return table(["", "aim", "measured", ""], rows) + "\n\n" + gpu_about()


def fp8_table() -> str:
    rows = [
        [
            MODELS[r["geometry"]],
            f"{r['tokens']:,}",
            f"{r['bf16_s'] * 1e3:,.1f} ms",
            f"{r['median_s'] * 1e3:,.1f} ms",
            f"{r['times_faster']:.2f}",
        ]
        for r in gpu_rows("fp8")
    ]
    notes = "".join(f"\n\n{r['note']}." for r in gpu_rows("fp8") if r.get("note"))
    return table(["", "tokens", "bfloat16", "8 bits", "times faster"], rows) + (
        notes or "\n\n" + gpu_about()
    )


def drift_table() -> str:
    if not gpu_rows("drift"):
        return table([], [])
    rows = [
        [r["who"], f"{r['tokens']:,}", f"{r['logits']:.1e}", f"{r['memory']:.1e}"]
        for r in gpu_rows("drift")
    ]
    return table(["GPT-2 small", "tokens", "logits", "memory"], rows) + "\n\n" + gpu_about()


def long_table() -> str:
    rows = []
    for r in gpu_rows("rival"):
        gain = r["rival_s"] / r["engine_s"]
        rows.append(
            [
                f"eager PyTorch, {r['tokens']:,} tokens: times slower than the engine",
                f"{gain:.1f}",
            ]
        )
    for r in gpu_rows("endless"):
        first, last = r["call_s"]["first"], r["call_s"]["last"]
        millions = f"{r['tokens'] / 1e6:.0f} million tokens"
        growth = [round(r[f"{where}_mib_per_million"], 4) + 0.0 for where in ("device", "resident")]
        rows += [
            [f"{millions}, one session", f"{r['seconds']:.1f} s"],
            [
                f"a call of {r['call_tokens']:,}, p50 / p99, first tenth",
                f"{first['p50'] * 1e3:.1f} / {first['p99'] * 1e3:.1f} ms",
            ],
            ["the same, last tenth", f"{last['p50'] * 1e3:.1f} / {last['p99'] * 1e3:.1f} ms"],
            ["growth of device memory, MiB per million", f"{growth[0]:.4f}"],
            ["growth of resident memory, MiB per million", f"{growth[1]:.4f}"],
            ["values that are not finite", str(r["nonfinite"])],
        ]
    if not rows:
        return table([], [])
    return table(["GPT-2 small, bfloat16", ""], rows) + "\n\n" + gpu_about()


def gpu_sessions_table() -> str:
    rows = [
        [
            f"{MODELS[r['geometry']]}, one stream, "
            + (f"temperature {r['temperature']}" if r.get("temperature") else "greedy")
            + f", {r['behind']:,} tokens behind it",
            f"{r['tokens_per_s']:,.0f}",
        ]
        for r in gpu_rows("decode")
    ]
    rows += [
        [
            f"{MODELS[r['geometry']]}, {r['sessions']} sessions stepping together",
            f"{r['tokens_per_s']:,.0f}",
        ]
        for r in gpu_rows("sessions")
    ]
    for r in gpu_rows("spill"):
        tokens = r["sessions"] * r["segment"]
        rows += [
            [
                f"{MODELS[r['geometry']]}, {r['sessions']} sessions in turns",
                f"{tokens / r['free_s']:,.0f}",
            ],
            [
                f"the same, {r['spilled_mib']:,.0f} of {r['state_mib']:,.0f} MiB "
                "of state in host memory",
                f"{tokens / r['tight_s']:,.0f}",
            ],
        ]
    return table(["", "tokens/s"], rows) + "\n\n" + gpu_about()


def operations_table() -> str:
    """A column a profile; shares are of the kernels' times added up, which overlap a little."""
    found = gpu_rows("operations")
    if not found:
        return table([], [])
    names = [MODELS[r["geometry"]] + (", 8 bits" if "fp8" in r["name"] else "") for r in found]
    totals = [sum(r["us"].values()) for r in found]
    parts = [
        {kind: us / total for kind, us in r["us"].items()}
        for r, total in zip(found, totals, strict=True)
    ]
    kinds = sorted(
        {kind for r in parts for kind in r}, key=lambda k: -max(r.get(k, 0) for r in parts)
    )
    rows = []
    for kind in kinds:
        if max(part.get(kind, 0) for part in parts) >= 0.005:
            rows.append([kind, *(f"{part[kind]:.1%}" if kind in part else "" for part in parts)])
    products = [sum(us for kind, us in r["us"].items() if "product" in kind) for r in found]
    rows += [
        ["all of it", *(f"{total / 1e3:.1f} ms" for total in totals)],
        ["some kernel runs, of the time", *(f"{r['busy_us'] / r['span_us']:.1%}" for r in found)],
        [
            "products, of the ceiling",
            *(
                f"{r['products_flop'] / r['gemm_flops'] * 1e6 / us:.0%}"
                for r, us in zip(found, products, strict=True)
            ),
        ],
        [
            "attention, of the ceiling",
            *(f"{r['attention_flop'] / 400e6 / r['us']['attention']:.0%}" for r in found),
        ],
    ]
    return table(["", *names], rows) + "\n\n" + gpu_about()


SECTIONS: dict[str, Callable[[], str]] = {
    "cpu": cpu_table,
    "sessions": sessions_table,
    "server": server_table,
    "gpu-prefill": prefill_table,
    "gpu-aims": aims_table,
    "gpu-operations": operations_table,
    "gpu-sessions": gpu_sessions_table,
    "gpu-fp8": fp8_table,
    "gpu-drift": drift_table,
    "gpu-long": long_table,
}


def draw() -> None:
    """Time of a prefill over its floor, by length."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "armt"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, segment in (("1b", 1024), ("gpt2", 512)):
        rows = [
            r
            for r in gpu_rows("prefill")
            if (r["geometry"], r["schedule"], r["segment"]) == (name, "diagonal", segment)
        ]
        axes.plot(
            [r["tokens"] for r in rows], [r["over_floor"] for r in rows], "o-", label=MODELS[name]
        )
    axes.axhline(1.0, color="0.6", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("time over the floor")
    axes.legend()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})
