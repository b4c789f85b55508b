"""Long streams of the GPT-2 geometry on a GPU: drift against float32, the rival, 50 million tokens.

All engines have the very same weights, which bfloat16 holds exactly, so what differs is the
arithmetic. Differences are relative: root mean square of the difference over that of the float32
values, for the logits of the last segment's tokens and for the memory matrices of all layers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

import armt
import harness
import models

GEOMETRY = models.GEOMETRIES["gpt2"]
Floats = npt.NDArray[np.float32]
Marks = list[tuple[Floats, Floats]]  # at each length: logits [segment, vocab], memories


def relative(found: Floats, expected: Floats) -> float:
    difference = np.square(found - expected, dtype=np.float64).mean()
    return float(np.sqrt(difference / np.square(expected, dtype=np.float64).mean()))


def read_by_engine(engine: armt.Engine, ids: npt.NDArray[np.int32], lengths: list[int]) -> Marks:
    """Reads on and on; at each length the last segment is closed and looked at."""
    session, at, marks = engine.session(), 0, []
    for length in lengths:
        last = length - GEOMETRY.segment
        session.feed(ids[at:last])
        session.close_segment()
        logits = session.step(ids[last:length], logits="all").logits
        assert logits is not None
        memory = np.stack([session.state.memory(i)[0][0] for i in range(GEOMETRY.layers)])
        marks.append((logits, memory))
        at = length
    return marks


def read_by_rival(rival: Any, ids: npt.NDArray[np.int32], lengths: list[int]) -> Marks:
    marks, at = [], 0
    for length in lengths:
        last = length - GEOMETRY.segment
        rival.prefill(ids[at:last])
        logits = rival.step(ids[last:length], "all").cpu().numpy()
        memory = np.stack([memory.matrix.cpu().numpy() for memory in rival.memories])
        marks.append((logits, memory))
        at = length
    return marks


def compared(who: str, lengths: list[int], marks: Marks, exact: Marks) -> Iterator[dict[str, Any]]:
    for length, found, expected in zip(lengths, marks, exact, strict=False):
        yield {
            "geometry": GEOMETRY.name,
            "who": who,
            "tokens": length,
            "logits": relative(found[0], expected[0]),
            "memory": relative(found[1], expected[1]),
        }


def drift(lengths: list[int], rival_tokens: int) -> Iterator[dict[str, Any]]:
    """`lengths` ascend; the rival, which is slow, reads those up to `rival_tokens`."""
    weights = models.random_weights(GEOMETRY)
    ids = models.random_ids(GEOMETRY, lengths[-1])

    def engine(**options: Any) -> Marks:
        made = models.make_engine(GEOMETRY, weights, device="cuda", **options)
        return read_by_engine(made, ids, lengths)

    exact = engine(dtype="float32")
    yield from compared("engine bfloat16", lengths, engine(dtype="bfloat16"), exact)
    short = engine(dtype="bfloat16", prefill_dtype="fp8")
    yield from compared("engine fp8 prefill", lengths, short, exact)
    yield from rival_drift(weights, ids, [n for n in lengths if n <= rival_tokens], exact)


def rival_drift(
    weights: dict[str, Floats], ids: npt.NDArray[np.int32], lengths: list[int], exact: Marks
) -> Iterator[dict[str, Any]]:
    import torch

    from rival_torch import TorchArmt

    rivals = {
        dtype: read_by_rival(TorchArmt(GEOMETRY, weights, dtype, "cuda"), ids, lengths)
        for dtype in (torch.float32, torch.bfloat16)
    }
    yield from compared("PyTorch float32, against ours", lengths, rivals[torch.float32], exact)
    yield from compared(
        "eager PyTorch bfloat16", lengths, rivals[torch.bfloat16], rivals[torch.float32]
    )


def rival_prefill(tokens: int) -> dict[str, Any]:
    """Seconds of eager PyTorch, and of ours in the same minute, in bfloat16."""
    import torch

    from rival_torch import TorchArmt

    weights = models.random_weights(GEOMETRY)
    ids = models.random_ids(GEOMETRY, tokens)
    rival = TorchArmt(GEOMETRY, weights, torch.bfloat16, "cuda")
    engine = models.make_engine(GEOMETRY, weights, device="cuda", dtype="bfloat16")

    def theirs() -> None:
        rival.reset()
        rival.prefill(ids)
        torch.cuda.synchronize()

    def ours() -> None:
        session = engine.session()
        session.feed(ids)
        session.close_segment()

    seconds: dict[str, list[float]] = {"rival_s": [], "engine_s": []}
    theirs()
    ours()
    for _ in range(3):
        for name, body in (("rival_s", theirs), ("engine_s", ours)):
            begin = time.perf_counter()
            body()
            seconds[name].append(time.perf_counter() - begin)
    found = {name: statistics.median(times) for name, times in seconds.items()}
    return {"geometry": GEOMETRY.name, "tokens": tokens} | found


def endless(tokens: int, call_segments: int = 64) -> dict[str, Any]:
    """One session reads `tokens` tokens in calls of `call_segments` segments."""
    import torch

    engine = models.make_engine(GEOMETRY, device="cuda", dtype="bfloat16")
    size = call_segments * engine.segment_size
    ids = models.random_ids(GEOMETRY, 16 * size).reshape(16, size)
    session = engine.session()
    session.feed(ids[0])  # the buffers are there
    calls = max(20, tokens // size)
    seconds, used, resident = [], [], []
    start = time.perf_counter()
    for call in range(calls):
        begin = time.perf_counter()
        session.feed(ids[call % 16])
        seconds.append(time.perf_counter() - begin)
        free, total = torch.cuda.mem_get_info()
        used.append((total - free) / harness.MIB)
        resident.append(harness.resident_bytes() / harness.MIB)
    elapsed = time.perf_counter() - start
    part = calls // 10
    ends = {"first": np.array(seconds[:part]), "last": np.array(seconds[-part:])}
    last_p99 = float(np.quantile(ends["last"], 0.99))
    millions = np.arange(part, calls) * size / 1e6
    return {
        "geometry": GEOMETRY.name,
        "tokens": calls * size,
        "seconds": elapsed,
        "tokens_per_s": calls * size / elapsed,
        "call_tokens": size,
        "call_s": {
            end: {"p50": float(np.median(v)), "p99": float(np.quantile(v, 0.99))}
            for end, v in ends.items()
        },
        "last_p99_over_first_p50": last_p99 / float(np.median(ends["first"])),
        "device_mib": {"first": used[part], "last": used[-1]},
        "device_mib_per_million": float(np.polyfit(millions, used[part:], 1)[0]),
        "resident_mib_per_million": float(np.polyfit(millions, resident[part:], 1)[0]),
        "nonfinite": engine.stats()["nonfinite"],
        "logits_finite": bool(np.isfinite(session.logits).all()),
    }


def spill(count: int = 256) -> dict[str, Any]:
    """`count` sessions, four at a time, by an engine with room for about half of their states."""
    weights = models.random_weights(GEOMETRY)
    size = GEOMETRY.segment
    ids = models.random_ids(GEOMETRY, 4 * size).reshape(4, size)
    free = models.make_engine(GEOMETRY, weights, device="cuda", dtype="bfloat16")
    sessions = [free.session() for _ in range(count)]
    turns = [range(first, first + 4) for first in range(0, count, 4)]

    def read(engine: armt.Engine, all_sessions: list[armt.Session]) -> float:
        begin = time.perf_counter()
        for turn in turns:
            engine.feed_many([(all_sessions[i], ids[i % 4]) for i in turn])
        return time.perf_counter() - begin

    read(free, sessions)
    states = free.stats()["state_bytes"]
    limit = free.stats()["weight_bytes"] + states // 2 + 1536 * harness.MIB
    tight = models.make_engine(
        GEOMETRY, weights, device="cuda", dtype="bfloat16", memory_limit=limit
    )
    others = [tight.session() for _ in range(count)]
    read(tight, others)
    seconds: dict[str, list[float]] = {"free_s": [], "tight_s": []}
    for _ in range(3):
        seconds["free_s"].append(read(free, sessions))
        seconds["tight_s"].append(read(tight, others))
    same = all(
        np.array_equal(a.state.memory(0)[0], b.state.memory(0)[0])
        for a, b in zip(sessions[::16], others[::16], strict=True)
    )
    return {
        "geometry": GEOMETRY.name,
        "sessions": count,
        "segment": size,
        "state_mib": states / harness.MIB,
        "limit_mib": limit / harness.MIB,
        "spilled_mib": tight.stats()["spilled_bytes"] / harness.MIB,
        "same_states": same,
    } | {name: statistics.median(times) for name, times in seconds.items()}
