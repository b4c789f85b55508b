"""More sessions than fit into a GPU: those that rest move to host memory and come back."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import armt
from armt import _core
from variants import VARIANTS, Variant, Zoo

GPU = pytest.mark.skipif(_core.cuda_device_count() == 0, reason="no GPU can be used here")
MIB = 1 << 20

# About 1.6 MiB of memory a session, and a page of keys and values a layer.
BIG = Variant(
    "spill-llama",
    "llama",
    "modern",
    {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    {"segment_size": 60, "num_mem_tokens": 8, "d_mem": 64},
)
LIMIT = 256 * MIB
SESSIONS = 160


def engine(zoo: Zoo, **options: Any) -> armt.Engine:
    zoo.model(BIG)
    return armt.Engine.from_pretrained(zoo.path(BIG, "F32"), device="cuda", **options)


@GPU
def test_resting_sessions_spill_and_come_back(zoo: Zoo) -> None:
    ids = zoo.model(BIG).tokens((SESSIONS, 90), seed=1)
    free, tight = engine(zoo), engine(zoo, memory_limit=LIMIT)
    pairs = [(free.session(), tight.session()) for _ in range(SESSIONS)]
    for row, pair in zip(ids, pairs, strict=True):
        for session in pair:
            session.feed(row[:70])
    spilled = tight.stats()["spilled_bytes"]
    assert spilled > 32 * MIB
    assert free.stats()["spilled_bytes"] == 0
    assert tight.stats()["state_bytes"] == free.stats()["state_bytes"] > LIMIT - 150 * MIB
    for expected, found in pairs[:3]:  # read while spilled
        assert found.state.to_bytes() == expected.state.to_bytes()
        np.testing.assert_array_equal(found.logits, expected.logits)
    for row, (expected, found) in zip(ids, pairs, strict=True):
        again = [each.feed(row[70:], logits="last").logits for each in (expected, found)]
        np.testing.assert_array_equal(again[1], again[0])
    forks = [found.fork() for _, found in pairs[:4]]
    for _, found in pairs:
        found.close(wipe=True)
    for fork, (expected, _) in zip(forks, pairs, strict=False):
        assert list(fork.generate(5)) == list(expected.generate(5))
    for fork in forks:
        fork.close()
    assert tight.stats()["spilled_bytes"] == 0
    assert tight.stats()["state_bytes"] == 0


@GPU
def test_threads_that_spill_each_other(zoo: Zoo) -> None:
    ids = zoo.model(BIG).tokens((SESSIONS, 100), seed=3)
    free, tight = engine(zoo), engine(zoo, memory_limit=LIMIT)
    found: dict[int, Any] = {}

    def work(first: int) -> None:
        mine = [(i, tight.session()) for i in range(first, SESSIONS, 4)]
        for begin in (0, 50):
            for i, session in mine:
                session.feed(ids[i, begin : begin + 50])
        for i, session in mine:
            found[i] = session.logits
            session.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(0, SESSIONS, 16):
        session = free.session()
        session.feed(ids[i, :50])
        session.feed(ids[i, 50:])
        np.testing.assert_array_equal(found[i], session.logits)


@GPU
def test_no_room_at_all(zoo: Zoo) -> None:
    with pytest.raises(armt.OutOfMemory, match="its limit is 1 MiB"):
        engine(zoo, memory_limit=MIB)


@pytest.mark.parametrize("limit", [-1, MIB])
def test_a_limit_is_for_gpus(zoo: Zoo, limit: int, tmp_path: Path) -> None:
    VARIANTS[0].model().save(tmp_path)
    with pytest.raises(armt.InvalidArgument, match="memory_limit"):
        armt.Engine.from_pretrained(tmp_path, device="cpu", memory_limit=limit)
