"""The same answer, bit for bit (CPU, float32), however the input is cut, batched or scheduled."""

from __future__ import annotations

import itertools
import struct
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import armt
import state_format as sf
from variants import VARIANTS, Variant, Zoo

VARIANT = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
SEGMENTS = 20
SPLITS_PER_VARIANT = 45  # with 24 variants: more than 1,000 in all; --long-run: 1,000 of each
ROWS_PER_VARIANT = 45  # rows with neighbours, likewise


def stream_of(model_tokens: Any) -> npt.NDArray[np.int64]:
    ids: npt.NDArray[np.int64] = model_tokens[0]
    return ids


def random_cuts(rng: np.random.Generator, total: int) -> list[int]:
    """A few pieces mostly; sometimes down to single tokens."""
    count = int(rng.integers(0, 12)) if rng.random() < 0.9 else int(rng.integers(12, 3 * total))
    cuts = sorted(int(c) for c in rng.integers(1, total, size=count))
    return [0, *dict.fromkeys(cuts), total]


def read_in_pieces(
    engine: armt.Engine, ids: npt.NDArray[Any], cuts: list[int]
) -> tuple[npt.NDArray[np.float32], armt.Session]:
    session = engine.session()
    parts = []
    for begin, end in itertools.pairwise(cuts):
        out = session.feed(ids[begin:end], logits="all")
        assert out.logits is not None
        parts.append(out.logits)
    return np.concatenate(parts), session


def assert_same_state(found: armt.Session, expected: armt.Session) -> None:
    """Everything but the call counter and the sampler: the content of the state file, keys and
    values of the open segment and the window included."""
    assert stream_blocks(found.state) == stream_blocks(expected.state)


def stream_blocks(state: armt.State) -> list[tuple[str, bytes]]:
    """The payloads of a state's blocks, without their sums."""
    data = state.to_bytes()
    blocks, at = [], 32
    while at < len(data) - 8:
        kind, layer, length = struct.unpack_from("<IIQ", data, at)
        payload = data[at + 20 : at + 20 + length]
        if kind == sf.COUNTERS:
            payload = payload[: 4 * 8]  # behind them: calls, seed, draws
        blocks.append((f"block {kind} of layer {layer}", payload))
        at += 24 + length
    return blocks


@VARIANT
def test_any_split_gives_the_same_bits(zoo: Zoo, variant: Variant, long_run: bool) -> None:
    engine = zoo.engine(variant, threads=2)
    size = engine.segment_size
    ids = stream_of(zoo.model(variant).tokens((1, SEGMENTS * size), seed=11))
    expected, whole = read_in_pieces(engine, ids, [0, len(ids)])
    rng = np.random.default_rng(1)
    for _ in range(1000 if long_run else SPLITS_PER_VARIANT):
        cuts = random_cuts(rng, len(ids))
        logits, session = read_in_pieces(engine, ids, cuts)
        assert logits.tobytes() == expected.tobytes(), cuts
        assert_same_state(session, whole)
        # What follows is the same too: the open segment's cache is part of the state.
        follow = ids[: size + 3]
        a, b = session.feed(follow, logits="all"), whole.fork().feed(follow, logits="all")
        assert a.logits is not None
        assert b.logits is not None
        assert a.logits.tobytes() == b.logits.tobytes(), cuts


@VARIANT
def test_schedules_and_threads_give_the_same_bits(zoo: Zoo, variant: Variant) -> None:
    size = zoo.engine(variant).segment_size
    ids = stream_of(zoo.model(variant).tokens((1, SEGMENTS * size + 2), seed=12))
    answers = []
    for options in (
        {"schedule": "sequential", "threads": 1},
        {"schedule": "sequential", "threads": 2},
        {"schedule": "diagonal", "threads": 1},
        {"schedule": "diagonal", "threads": 3},
    ):
        engine = zoo.engine(variant, **options)
        answers.append(read_in_pieces(engine, ids, [0, len(ids)]))
    for logits, session in answers[1:]:
        assert logits.tobytes() == answers[0][0].tobytes()
        assert_same_state(session, answers[0][1])


@VARIANT
def test_batch_neighbours_change_nothing(zoo: Zoo, variant: Variant, long_run: bool) -> None:
    """Rows with up to 32 neighbours of other lengths and ages, against each row alone."""
    engine = zoo.engine(variant, threads=2)
    rng = np.random.default_rng(3)
    compared = 0
    while compared < (1000 if long_run else ROWS_PER_VARIANT):
        rows = int(rng.integers(2, 34))
        inputs = [
            rng.integers(0, engine.vocab_size, size=int(rng.integers(1, 40))) for _ in range(rows)
        ]
        ages = [
            rng.integers(0, engine.vocab_size, size=int(rng.integers(1, 25))) for _ in range(rows)
        ]
        together = [engine.session() for _ in range(rows)]
        for session, age in zip(together, ages, strict=True):
            session.feed(age)
        outputs = engine.feed_many(zip(together, inputs, strict=True), logits="all")
        for session, output, age, ids in zip(together, outputs, ages, inputs, strict=True):
            alone = engine.session()
            alone.feed(age)
            expected = alone.feed(ids, logits="all")
            assert output.logits is not None
            assert expected.logits is not None
            assert output.logits.tobytes() == expected.logits.tobytes()
            assert_same_state(session, alone)
        compared += rows


@VARIANT
def test_step_and_generate_with_neighbours(zoo: Zoo, variant: Variant) -> None:
    """step_many and generate_many over sessions of unequal ages, against each alone."""
    engine = zoo.engine(variant, threads=2)
    rng = np.random.default_rng(14)
    together, alone = [], []
    for _ in range(7):
        age = rng.integers(0, engine.vocab_size, size=int(rng.integers(1, 25)))
        for group in (together, alone):
            group.append(engine.session())
            group[-1].feed(age)
    sizes = rng.integers(1, engine.segment_size + 1, size=7)
    segments = [rng.integers(0, engine.vocab_size, size=int(size)) for size in sizes]
    outputs = engine.step_many(zip(together, segments, strict=True))
    for output, session, segment in zip(outputs, alone, segments, strict=True):
        expected = session.step(segment).logits
        assert output.logits is not None and expected is not None
        assert output.logits.tobytes() == expected.tobytes()
    texts = engine.generate_many(together, 2 * engine.segment_size + 1)
    for found, mine, session in zip(texts, together, alone, strict=True):
        assert found == list(session.generate(2 * engine.segment_size + 1))
        assert_same_state(mine, session)


@VARIANT
def test_fed_and_generated_tokens_are_the_same_thing(zoo: Zoo, variant: Variant) -> None:
    engine = zoo.engine(variant)
    prompt = zoo.model(variant).tokens((1, 12), seed=4)[0]
    generated = engine.session(seed=5)
    generated.feed(prompt)
    tokens = list(generated.generate(20, temperature=0.9, top_p=0.95))
    fed = engine.session()
    fed.feed(prompt)
    fed.feed(tokens)
    assert_same_state(generated, fed)
    assert generated.logits.tobytes() == fed.logits.tobytes()


@VARIANT
def test_forks_equal_reading_again(zoo: Zoo, variant: Variant) -> None:
    engine = zoo.engine(variant, threads=2)
    document = zoo.model(variant).tokens((1, 38), seed=6)[0]
    reader = engine.session()
    reader.feed(document)
    rng = np.random.default_rng(8)
    for _ in range(20):
        question = rng.integers(0, engine.vocab_size, size=int(rng.integers(1, 20)))
        branch = reader.fork()
        found = branch.feed(question, logits="all")
        again = engine.session()
        expected = again.feed(np.concatenate([document, question]), logits="all")
        assert found.logits is not None
        assert expected.logits is not None
        assert found.logits.tobytes() == expected.logits[len(document) :].tobytes()
        assert_same_state(branch, again)


@VARIANT
def test_reading_without_writing_leaves_no_trace(zoo: Zoo, variant: Variant) -> None:
    engine = zoo.engine(variant)
    ids = zoo.model(variant).tokens((1, 45), seed=9)[0]
    session, other = engine.session(), engine.session()
    for s in (session, other):
        s.feed(ids[:20])
    session.feed(ids[20:], write=False)
    list(session.generate(9, write=False))
    session.score(ids[20:], write=False)
    session.step(ids[:3], write=False)
    assert_same_state(session, other)
    a, b = session.feed(ids[20:], logits="all"), other.feed(ids[20:], logits="all")
    assert a.logits is not None
    assert b.logits is not None
    assert a.logits.tobytes() == b.logits.tobytes()


@VARIANT
def test_rollback_returns_to_the_checkpoint(zoo: Zoo, variant: Variant) -> None:
    engine = zoo.engine(variant)
    ids = zoo.model(variant).tokens((1, 60), seed=10)[0]
    session, other = engine.session(), engine.session()
    session.feed(ids[:17])
    checkpoint = session.checkpoint()
    for end in (18, 25, 60):
        session.feed(ids[17:end])
        session.rollback(checkpoint)
    other.feed(ids[:17])
    assert_same_state(session, other)
    a, b = session.feed(ids[17:], logits="all"), other.feed(ids[17:], logits="all")
    assert a.logits is not None
    assert b.logits is not None
    assert a.logits.tobytes() == b.logits.tobytes()
    assert_same_state(session, other)


def test_many_threads_over_distinct_sessions(zoo: Zoo) -> None:
    """Eight threads, a thousand steps each in all sessions: every answer as from one thread."""
    variant = VARIANTS[0]
    engine = zoo.engine(variant, threads=2)
    rng = np.random.default_rng(13)
    segments = rng.integers(0, engine.vocab_size, size=(40, engine.segment_size))
    alone = engine.session()
    expected = [alone.step(segment).logits for segment in segments]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(25):
            session = engine.session()
            for i, segment in enumerate(segments):
                found = session.step(segment).logits
                if found is None or expected[i] is None or not np.array_equal(found, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_session_in_two_threads_is_an_error(zoo: Zoo) -> None:
    engine = zoo.engine(VARIANTS[0])
    session = engine.session()
    ids = np.random.default_rng(0).integers(0, engine.vocab_size, size=200_000)
    reading = threading.Event()
    reader = threading.Thread(target=lambda: session.feed(ids, progress=lambda done: reading.set()))
    reader.start()
    assert reading.wait(60)
    with pytest.raises(armt.StateError, match="another thread"):
        session.fork()
    reader.join()
    clean = engine.session()
    clean.feed(ids)
    assert_same_state(session, clean)
