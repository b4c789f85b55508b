"""The Python face: what it takes, what it returns, and what it says of bad input."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import armt
from variants import VARIANTS, Zoo

GPT2 = VARIANTS[0]


@pytest.fixture
def engine(zoo: Zoo) -> armt.Engine:
    return zoo.engine(GPT2)


# ------------------------------------------------------------------------------------ input


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64])
def test_every_integer_type_gives_the_same_answer(engine: armt.Engine, dtype: Any) -> None:
    ids = [3, 1, 4, 1, 5]
    expected = engine.session().feed(ids, logits="last").logits
    found = engine.session().feed(np.array(ids, dtype), logits="last").logits
    assert expected is not None
    assert np.array_equal(found, expected)


def test_strided_and_foreign_arrays(engine: armt.Engine) -> None:
    class Foreign:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __dlpack__(self, **options: Any) -> Any:
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self.array.__dlpack_device__()

    wide = np.arange(20, dtype=np.int64)
    expected = engine.session().feed(wide[::2].tolist(), logits="last").logits
    assert expected is not None
    for ids in (wide[::2], Foreign(wide[::2].copy()), Foreign(wide[::2].astype(np.int32))):
        assert np.array_equal(engine.session().feed(ids, logits="last").logits, expected)


def test_torch_tensors_go_in_and_out(engine: armt.Engine) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    ids = torch.tensor([3, 1, 4])
    out = engine.session().feed(ids, logits="all")
    assert torch.from_dlpack(out.logits).shape == (3, engine.vocab_size)
    with pytest.raises(armt.InvalidArgument, match="float32"):
        engine.session().feed(torch.ones(3))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "empty"),
        (np.zeros(0, np.int64), "empty"),
        ([[1, 2]], "shape"),
        ([1.5], "float64"),
        ([True], "bool"),
        ("text", "tokenizer"),
        (7, "int"),
        ([1, [2]], "unequal"),
        ([1, 61], "found 61 at position 1"),
        ([-1], "found -1"),
        ([2**40], "found -1"),
        ([2**70], "object"),
        (None, "NoneType"),
    ],
)
def test_bad_ids_are_refused_and_change_nothing(
    engine: armt.Engine, ids: Any, message: str
) -> None:
    session = engine.session()
    session.feed([1, 2, 3])
    before = session.state.to_bytes()
    for call in (session.feed, session.step, session.score):
        with pytest.raises(armt.InvalidArgument, match=message):
            call(ids)
    if message != "shape":
        with pytest.raises(armt.InvalidArgument):
            engine.forward(ids)
    assert session.state.to_bytes() == before


def test_too_long_for_step(engine: armt.Engine) -> None:
    session = engine.session()
    with pytest.raises(armt.InvalidArgument, match="use feed"):
        session.step([1] * (engine.segment_size + 1))
    assert session.tokens == 0


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 2**64},
        {"stop_sequences": [[]]},
        {"max_new_tokens": -1},
        {"max_new_tokens": 1.5},
    ],
)
def test_impossible_generation_settings(engine: armt.Engine, options: dict[str, Any]) -> None:
    session = engine.session()
    session.feed([1, 2])
    with pytest.raises(armt.InvalidArgument):
        session.generate(options.pop("max_new_tokens", 3), **options)
    assert session.tokens == 2


def test_generate_before_the_first_token(engine: armt.Engine) -> None:
    with pytest.raises(armt.InvalidArgument, match="no token"):
        engine.session().generate(1)


def test_wrong_options(engine: armt.Engine, zoo: Zoo) -> None:
    with pytest.raises(armt.InvalidArgument, match="none, last or all"):
        engine.session().feed([1], logits="some")  # type: ignore[arg-type]
    with pytest.raises(armt.InvalidArgument, match="attention_mask"):
        engine.forward([[1, 2]], [[1]])
    for options in ({"device": "tpu"}, {"schedule": "zigzag"}, {"dtype": "int3"}, {"isa": "mmx"}):
        with pytest.raises((armt.InvalidArgument, armt.DeviceError)):
            armt.Engine.from_pretrained(zoo.path(GPT2), **({"device": "cpu"} | options))
    with pytest.raises(armt.InvalidArgument):
        armt.Engine.from_pretrained(zoo.path(GPT2), device="cpu", threads=-1)


def test_cuda_without_a_gpu(zoo: Zoo, engine: armt.Engine) -> None:
    from armt import _core

    if _core.cuda_device_count() > 0:
        pytest.skip("there is a GPU here")
    with pytest.raises(armt.DeviceError):
        armt.Engine.from_pretrained(zoo.path(GPT2), device="cuda")
    assert armt.Engine.from_pretrained(zoo.path(GPT2), device="auto").device == "cpu"


def test_sessions_of_another_engine(zoo: Zoo, engine: armt.Engine) -> None:
    other = zoo.engine(VARIANTS[4])
    with pytest.raises(armt.InvalidArgument, match="another engine"):
        engine.feed_many([(other.session(), [1])])
    session = engine.session()
    with pytest.raises(armt.InvalidArgument, match="same session"):
        engine.feed_many([(session, [1]), (session, [2])])
    with pytest.raises(armt.InvalidArgument):
        engine.feed_many([(None, [1])])  # type: ignore[list-item]
    assert session.tokens == 0


def test_one_bad_row_leaves_all_rows_alone(engine: armt.Engine) -> None:
    a, b = engine.session(), engine.session()
    with pytest.raises(armt.InvalidArgument):
        engine.feed_many([(a, [1] * 30), (b, [10_000])])
    assert (a.tokens, b.tokens) == (0, 0)


def test_closed_sessions_and_foreign_checkpoints(engine: armt.Engine) -> None:
    session = engine.session()
    session.feed([1, 2, 3])
    fork = session.fork()
    with pytest.raises(armt.StateError, match="another session"):
        fork.rollback(session.checkpoint())
    with pytest.raises(armt.StateError):
        session.rollback(b"bytes")  # type: ignore[arg-type]
    with session:
        pass
    session.close()
    assert session.closed
    for use in (
        lambda: session.feed([1]),
        lambda: session.generate(1),
        lambda: session.state,
        session.fork,
        session.reset,
    ):
        with pytest.raises(armt.StateError, match="closed"):
            use()
    assert fork.feed([1], logits="last").logits is not None


# ---------------------------------------------------------------------------------- results


def test_lazy_closing(engine: armt.Engine) -> None:
    size = engine.segment_size
    session = engine.session()
    session.feed([1] * size)
    assert (session.segments, session.open_tokens) == (0, size)
    session.feed([1])
    assert (session.segments, session.open_tokens) == (1, 1)
    session.close_segment()
    session.close_segment()
    assert (session.segments, session.open_tokens) == (2, 0)
    session.feed([1, 2])
    session.step([3])
    assert (session.segments, session.open_tokens, session.tokens) == (4, 0, size + 4)
    session.reset()
    assert (session.segments, session.open_tokens, session.tokens) == (0, 0, 0)


def test_step_on_the_engine_writes_memory(engine: armt.Engine) -> None:
    engine.reset()
    out = engine.step([5, 6, 7])
    assert out.logits is not None
    assert out.logits.shape == (engine.vocab_size,)
    assert out.logits.dtype == np.float32
    assert engine.step([5, 6, 7], logits="none").logits is None
    everything = engine.step([5, 6, 7], logits="all").logits
    assert everything is not None
    assert everything.shape == (3, engine.vocab_size)
    assert not np.array_equal(everything[-1], out.logits)
    engine.reset()
    assert np.array_equal(engine.step([5, 6, 7]).logits, out.logits)


def test_memory_before_and_after_the_first_write(engine: armt.Engine) -> None:
    session = engine.session()
    a, z = session.state.memory(0)
    assert a.dtype == np.float32
    assert z is not None
    assert not a.any() and not z.any()
    session.step([1, 2, 3])
    after, after_z = session.state.memory(0)
    assert after.any()
    assert after_z is not None and (after_z >= 0).all()
    assert not a.any()
    with pytest.raises((armt.InvalidArgument, IndexError)):
        session.state.memory(99)


def test_sampling_is_reproducible_and_follows_its_settings(engine: armt.Engine) -> None:
    session = engine.session()
    session.feed([1, 2, 3])

    def draw(**options: Any) -> list[int]:
        return list(session.generate(30, write=False, **options))

    hot = draw(temperature=1.5, seed=7)
    assert hot == draw(temperature=1.5, seed=7)
    assert hot != draw(temperature=1.5, seed=8)
    greedy = draw()
    assert draw(temperature=2.0, top_k=1, seed=1) == greedy
    assert draw(temperature=2.0, top_p=1e-9, seed=1) == greedy
    assert draw(temperature=2.0, min_p=1.0, seed=1) == greedy
    assert len(set(draw(repetition_penalty=50.0))) > len(set(greedy)) or len(set(greedy)) == 30


def test_the_generator_is_the_same_on_every_platform() -> None:
    """Against the same 64-bit mix in Python's unbounded integers."""
    from armt import _core

    def mix(seed: int, index: int) -> float:
        mask = 2**64 - 1
        x = seed ^ 0x5851F42D4C957F2D
        for word in (index, seed):
            x = (x + 0x9E3779B97F4A7C15 * (word + 1)) & mask
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
            x ^= x >> 31
        return float(x >> 11) * 2.0**-53

    for seed, index in [(0, 0), (7, 1), (7, 2), (2**64 - 1, 2**40)]:
        assert _core.uniform(seed, index) == mix(seed, index)
    draws = [_core.uniform(7, i) for i in range(20_000)]
    assert abs(np.mean(draws) - 0.5) < 0.01
    assert min(draws) >= 0 and max(draws) < 1


def test_stop_rules(engine: armt.Engine) -> None:
    session = engine.session()
    session.feed([1, 2, 3])
    tokens = list(session.generate(12, temperature=1.0, seed=3, write=False))
    at = next(i for i in range(1, 12) if tokens[i] not in tokens[:i])
    stopped = session.generate(12, temperature=1.0, seed=3, write=False, stop_ids=tokens[at])
    assert list(stopped) == tokens[: at + 1]
    assert stopped.finish_reason == "stop"
    pair = session.generate(
        12, temperature=1.0, seed=3, write=False, stop_sequences=[tokens[at - 1 : at + 1]]
    )
    assert list(pair) == tokens[: at + 1]
    full = session.generate(5, write=False)
    assert len(list(full)) == 5
    assert full.finish_reason == "length"
    assert len(full.logprobs) == 5 and all(value <= 0 for value in full.logprobs)


def test_score_equals_the_logits(engine: armt.Engine) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, engine.vocab_size, size=100)
    first, second = engine.session(), engine.session()
    scores = first.score(ids)
    logits = second.feed(ids, logits="all").logits
    assert logits is not None
    wide = logits.astype(np.float64)
    log_probs = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    expected = log_probs[np.arange(99), ids[1:]]
    assert math.isnan(scores[0])
    np.testing.assert_allclose(scores[1:], expected, atol=1e-6)
    more = first.score(ids[:5])
    assert abs(more[0] - log_probs[-1, ids[0]]) < 1e-6


def test_official_generation_grows_up_to_the_position_limit(engine: armt.Engine) -> None:
    """GPT-2 table of 64 rows: the last segment grows to 64 tokens, then a clear error."""
    session = engine.session()
    session.feed([1, 2, 3])
    generation = session.generate(100, rollover=False)
    tokens = []
    with pytest.raises(armt.InvalidArgument, match="roll over"):
        for token in generation:
            tokens.append(token)
    assert len(tokens) == 61
    assert (session.segments, session.tokens) == (0, 64)


def test_generate_many_equals_one_by_one(engine: armt.Engine) -> None:
    prompts = [[1, 2], [3], [4, 5, 6, 7, 8, 9, 10, 11, 12]]
    together = [engine.session() for _ in prompts]
    engine.feed_many(zip(together, prompts, strict=True))
    found = engine.generate_many(together, 15)
    for prompt, tokens in zip(prompts, found, strict=True):
        alone = engine.session()
        alone.feed(prompt)
        assert list(alone.generate(15)) == tokens


def test_rows_of_unequal_length(engine: armt.Engine) -> None:
    rows = [[5, 6, 7, 8], [9]]
    ragged = engine.generate(rows, max_new_tokens=6, pad_token_id=0)
    padded = engine.generate(
        [[5, 6, 7, 8], [0, 0, 0, 9]], [[1, 1, 1, 1], [0, 0, 0, 1]], max_new_tokens=6
    )
    np.testing.assert_array_equal(ragged, padded)
    np.testing.assert_array_equal(ragged[1, 4:], engine.generate([[9]], max_new_tokens=6)[0, 1:])


def test_progress(engine: armt.Engine) -> None:
    seen: list[int] = []
    ids = np.random.default_rng(0).integers(0, engine.vocab_size, size=60_000)
    engine.session().feed(ids, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(ids)
    with pytest.raises(armt.InvalidArgument, match="progress"):
        engine.session().feed([1], progress=3)  # type: ignore[arg-type]


def test_an_error_in_progress_undoes_the_call(engine: armt.Engine) -> None:
    class StopHereError(Exception):
        pass

    def stop(done: int) -> None:
        raise StopHereError

    session = engine.session()
    session.feed([1, 2, 3])
    before = session.state.to_bytes()
    with pytest.raises(StopHereError):
        session.feed(np.ones(300_000, np.int64), progress=stop)
    assert session.state.to_bytes() == before
    assert session.feed([1], logits="last").logits is not None


def test_ctrl_c_leaves_the_session_as_it_was(zoo: Zoo) -> None:
    zoo.model(GPT2)
    program = textwrap.dedent(
        f"""
        import numpy as np, armt
        engine = armt.Engine.from_pretrained({str(zoo.path(GPT2))!r}, device="cpu")
        session = engine.session()
        session.feed([1, 2, 3])
        before = session.state.to_bytes()
        print("reading", flush=True)
        try:
            session.feed(np.ones(50_000_000, np.int32))
        except KeyboardInterrupt:
            assert session.state.to_bytes() == before
            session.feed([1])
            print("interrupted", flush=True)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path.home()
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "reading"
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert out.strip() == "interrupted"


def test_resident_memory_is_flat(zoo: Zoo) -> None:
    """1,000,000 tokens through a small model: peak memory grows by 1% at most after 50,000."""
    zoo.model(GPT2)
    program = textwrap.dedent(
        f"""
        import numpy as np, resource, armt
        engine = armt.Engine.from_pretrained({str(zoo.path(GPT2))!r}, device="cpu")
        session = engine.session()
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ids = np.ones(50_000, np.int32)
        session.feed(ids)
        early = peak()
        for _ in range(19):
            session.feed(ids)
        print(early, peak())
        """
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path.home()
    ).stdout
    early, late = map(int, out.split())
    assert late <= 1.01 * early
