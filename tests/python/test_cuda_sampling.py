"""Tokens drawn on a GPU: those of the plain rule on the very same logits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import armt
from armt import _core
from reference.random_models import RandomModel, random_model
from reference.sampling import choose

pytestmark = pytest.mark.skipif(_core.cuda_device_count() == 0, reason="no GPU can be used here")

SMALL, LARGE = 61, 128256
DRAWS = 4

CUTS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_k": 200_000},
    {"top_p": 0.1},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.95},
    {"top_k": 900, "min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.02},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.1},
]
SETTINGS = [{"temperature": t} | cut for t, cut in itertools.product([0.1, 0.8, 2.0, 60.0], CUTS)]

Logits = npt.NDArray[np.float64]


def model_with(vocab: int, dtype: str = "F32") -> RandomModel:
    return random_model(base="llama", dtype=dtype, base_options={"vocab_size": vocab})


def head_of(model: RandomModel) -> npt.NDArray[np.float64]:
    (name,) = (name for name in model.weights if name.endswith("lm_head.weight"))
    return model.weights[name]


def load(model: RandomModel, folder: Path, **options: Any) -> armt.Engine:
    return armt.Engine.from_pretrained(model.save(folder), **{"device": "cuda"} | options)


@pytest.fixture(scope="module", params=["small", "large", "large bfloat16", "ties"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> armt.Engine:
    kind = str(request.param)
    model = model_with(SMALL if kind == "small" else LARGE, "BF16" if "bf" in kind else "F32")
    if kind == "ties":
        head_of(model)[:] = np.repeat(head_of(model)[:96], LARGE // 96, axis=0)
    dtype = "bfloat16" if "bf" in kind else "float32"
    return load(model, tmp_path_factory.mktemp("model"), dtype=dtype)


def session_of(engine: armt.Engine, start: int = 0) -> armt.Session:
    session = engine.session()
    session.feed([5 + start, 9, 30])
    return session


def logits_of(session: armt.Session) -> Logits:
    return session.logits.astype(np.float64)


def draw(session: armt.Session, settings: dict[str, Any]) -> tuple[int, float]:
    (choice,) = _core.choose([session._core], [_core.SamplingParams(**settings)])
    return choice


def expected_logprobs(logits: Logits) -> Logits:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_are_those_of_the_plain_sampler(
    engine: armt.Engine, settings: dict[str, Any]
) -> None:
    session = session_of(engine)
    logits = logits_of(session)
    logprobs = expected_logprobs(logits)
    for seed in (1, 2**63 + 5):
        session._core.set_seed(seed)
        for index in range(DRAWS):
            token, logprob = draw(session, settings)
            assert token == choose(logits, _core.uniform(seed, index), **settings), (seed, index)
            assert logprob == pytest.approx(logprobs[token], abs=1e-5, rel=1e-6)


def test_draws_differ(engine: armt.Engine) -> None:
    session = session_of(engine)
    for settings in ({"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}):
        assert len({draw(session, settings)[0] for _ in range(20)}) > 5


def test_greedy_is_the_likeliest_and_draws_nothing(engine: armt.Engine) -> None:
    session = session_of(engine)
    logits = logits_of(session)
    session._core.set_seed(3)
    for settings in ({}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}):
        token, logprob = draw(session, {"temperature": 0.0} | settings)
        assert token == int(np.argmax(logits))
        assert logprob == pytest.approx(expected_logprobs(logits)[token], abs=1e-5)
    token, _ = draw(session, {"temperature": 1.0})
    assert token == choose(logits, _core.uniform(3, 0), temperature=1.0)


def test_a_repetition_penalty_is_drawn_with_too(engine: armt.Engine) -> None:
    session = session_of(engine)
    session._core.set_seed(4)
    penalised = draw(session, {"temperature": 1.0, "repetition_penalty": 1e9})[0]
    assert penalised not in (5, 9, 30)
    logits = logits_of(session)
    token, _ = draw(session, {"temperature": 1.0})
    assert token == choose(logits, _core.uniform(4, 1), temperature=1.0)


def test_rows_with_a_penalty_among_others(engine: armt.Engine) -> None:
    """Those are drawn by the host, the others on the GPU; each as if it were alone."""
    settings = [{"temperature": 0.9, "repetition_penalty": p} for p in (1.0, 1.3, 1.0, 2.0)]
    sessions = [session_of(engine, start) for start in range(4)]
    for session in sessions:
        session._core.set_seed(6)
    params = [_core.SamplingParams(**one) for one in settings]
    for _ in range(2):
        alone = []
        for session, one in zip(sessions, settings, strict=True):
            fork = session.fork()
            alone.append(draw(fork, one)[0])
            fork.close()
        together = _core.choose([session._core for session in sessions], params)
        assert [token for token, _ in together] == alone


@pytest.mark.parametrize("count", [3, 70])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=str,
)
def test_a_batch_draws_what_single_sessions_do(
    tmp_path: Path, settings: dict[str, Any], count: int
) -> None:
    engine = load(model_with(SMALL), tmp_path)
    sessions = [session_of(engine, i % 40) for i in range(count)]
    for seed, session in enumerate(sessions):
        session._core.set_seed(seed)
    params = _core.SamplingParams(**settings)
    found = [_core.choose([s._core for s in sessions], [params] * count) for _ in range(2)]
    for seed, session in enumerate(sessions):
        logits = logits_of(session)
        for index, row in enumerate(found):
            token, logprob = row[seed]
            assert token == choose(logits, _core.uniform(seed, index), **settings), (seed, index)
            assert logprob == pytest.approx(expected_logprobs(logits)[token], abs=1e-5)


@pytest.mark.parametrize("vocab", [SMALL, LARGE])
def test_logits_that_are_not_finite(tmp_path: Path, vocab: int) -> None:
    """A NaN counts as less than any number; an infinite logit takes all the weight."""
    model = model_with(vocab)
    head_of(model)[::2] = np.nan
    engine = load(model, tmp_path / "nan", on_nonfinite="ignore")
    session = session_of(engine)
    logits = logits_of(session)
    assert np.isnan(logits[::2]).all()
    logits[np.isnan(logits)] = -np.inf
    for settings in ({"temperature": 1.0}, {"temperature": 1.0, "top_k": vocab, "top_p": 0.9}):
        session._core.set_seed(1)
        for index in range(DRAWS):
            token, logprob = draw(session, settings)
            assert token == choose(logits, _core.uniform(1, index), **settings)
            assert np.isnan(logprob)

    model = model_with(vocab)
    likeliest = int(np.argmax(logits_of(session_of(load(model, tmp_path / "finite")))))
    head_of(model)[likeliest] *= 1.5e38
    engine = load(model, tmp_path / "infinite", on_nonfinite="ignore")
    session = session_of(engine)
    assert np.flatnonzero(session.logits == np.inf).tolist() == [likeliest]
    for settings in ({"temperature": 1.0}, {"temperature": 2.0, "top_p": 0.9, "top_k": 3}):
        assert draw(session, settings)[0] == likeliest


def test_a_logprob_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    model = model_with(SMALL)
    head_of(model)[11] = np.nan
    session = session_of(load(model, tmp_path))
    session._core.set_seed(2)
    with pytest.raises(armt.NonFiniteError, match="log probability of the chosen token"):
        draw(session, {"temperature": 1.0})
