"""Very many sessions over one engine: nothing leaks from one to another, and nothing stays."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import numpy as np
import pytest

import armt
from armt._core import testing
from variants import VARIANTS, Variant, Zoo

CHOSEN = [
    v
    for v in VARIANTS
    if v.name in ("paper-gpt2-sliding", "modern-neox", "inner-llama", "rmt-llama-sliding")
]
VARIANT = pytest.mark.parametrize("variant", CHOSEN, ids=lambda v: v.name)


@pytest.fixture
def engine(zoo: Zoo, variant: Variant) -> Iterator[armt.Engine]:
    """Every block and workspace is full of NaN before it is written."""
    engine = zoo.engine(variant, threads=2, schedule="diagonal")
    testing.set_poison(engine._core, True)
    yield engine
    testing.set_poison(engine._core, False)


def churn(engine: armt.Engine, sessions: int) -> None:
    """Makes sessions, forks and rollbacks among them, and drops them in random order; each must
    answer as alone."""
    rng = np.random.default_rng(16)
    texts = [rng.integers(0, engine.vocab_size, size=int(n)) for n in rng.integers(3, 25, size=40)]
    question = rng.integers(0, engine.vocab_size, size=3)

    def answer(session: armt.Session) -> bytes:
        logits = session.feed(question, logits="all").logits
        assert logits is not None and not np.isnan(logits).any()
        return logits.tobytes()

    expected = []
    for text in texts:
        alone = engine.session()
        alone.feed(text)
        expected.append(answer(alone))
    living: list[tuple[int, armt.Session]] = []
    made = 0
    while made < sessions:
        which = int(rng.integers(len(texts)))
        session = engine.session()
        cut = int(rng.integers(1, len(texts[which])))
        session.feed(texts[which][:cut])
        if rng.random() < 0.3:  # a stray branch, and back
            checkpoint = session.checkpoint()
            session.feed(texts[(which + 1) % len(texts)])
            session.rollback(checkpoint)
        session.feed(texts[which][cut:])
        living.append((which, session))
        made += 1
        if rng.random() < 0.3:
            living.append((which, session.fork()))
            made += 1
        while len(living) > 50:
            which, session = living.pop(int(rng.integers(len(living))))
            assert answer(session) == expected[which]


@VARIANT
def test_no_cross_talk_between_poisoned_sessions(
    engine: armt.Engine, variant: Variant, long_run: bool
) -> None:
    """10,000 sessions over four models; --long-run: 100,000."""
    held = engine.stats()["state_bytes"]
    churn(engine, 25_000 if long_run else 2_500)
    gc.collect()
    assert engine.stats()["state_bytes"] == held


def test_resident_memory_stays_flat(zoo: Zoo) -> None:
    """100,000 sessions made, used and dropped: resident memory grows by 1% at most."""
    zoo.model(VARIANTS[0])
    path = str(zoo.path(VARIANTS[0]))
    program = f"""
        import os
        from pathlib import Path
        import numpy as np
        import armt

        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1])

        engine = armt.Engine.from_pretrained({path!r}, device="cpu", threads=1)
        ids = np.ones(engine.segment_size + 2, np.int32)

        def use(count):
            living = []
            for _ in range(count):
                session = engine.session()
                session.feed(ids)
                living.append(session)
                if len(living) == 1000:
                    living.clear()

        use(10_000)
        early = resident()
        use(90_000)
        print(early, resident(), engine.stats()["state_bytes"])
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    early, late, held = map(int, found.stdout.split())
    assert late <= 1.01 * early
    assert held == 0


def test_forks_of_one_document(zoo: Zoo) -> None:
    """Many questions to one document: bit-equal to reading it again, and only what is written
    takes memory."""
    zoo.model(VARIANTS[0])
    engine = armt.Engine.from_pretrained(zoo.path(VARIANTS[0]), device="cpu", threads=1)
    size = engine.segment_size
    rng = np.random.default_rng(17)
    document = rng.integers(0, engine.vocab_size, size=5 * size + 2)
    reader = engine.session()
    reader.feed(document)
    alone = engine.stats()["state_bytes"]
    branches = [reader.fork() for _ in range(1000)]
    assert engine.stats()["state_bytes"] == alone
    # The open segment stays open, so no memory is written: only pages of keys, and the last row.
    most = alone - engine._core.association_bytes
    for branch in branches:
        question = rng.integers(0, engine.vocab_size, size=3)
        before = engine.stats()["state_bytes"]
        found = branch.feed(question, logits="all").logits
        assert 0 < engine.stats()["state_bytes"] - before <= most
        again = engine.session()
        expected = again.feed(np.concatenate([document, question]), logits="all").logits
        assert found is not None and expected is not None
        assert found.tobytes() == expected[len(document) :].tobytes()
    branches.clear()
    del branch, again
    assert engine.stats()["state_bytes"] == alone
