"""Training: the PyTorch model and the engine agree, losses fall, and a training can be resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import armt
from armt.cli.app import run
from armt.tasks import retrieval as task

torch = pytest.importorskip("torch", reason='needs the extra "torch"')

from armt.training.folder import new_folder, read_progress, write_model, write_progress  # noqa: E402
from armt.training.model import Armt, Shape  # noqa: E402
from armt.training.retrieval import (  # noqa: E402
    Plan,
    Standing,
    Trainer,
    losses,
    make_batch,
    stages,
)

SMALL = Plan(
    steps=80,
    batch=16,
    pairs=(1, 2),
    enough=0.9,
    lr=3e-3,
    warm_up=10,
    key_symbols=1,
    width=32,
    layers=2,
    heads=2,
    memory_tokens=2,
    d_mem=8,
)
SLACK = 8
"""Our error against float64, in PyTorch's own float32 errors: random tokens meet small
denominators, which make more of any rounding."""
LARGEST = 1e-3
"""Of the largest value."""


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained() -> tuple[Trainer, list[Any]]:
    torch.set_num_threads(1)
    trainer = Trainer(SMALL)
    return trainer, list(trainer.run())


def exported(trainer: Trainer, folder: Path) -> armt.Engine:
    folder.mkdir()
    write_model(folder, trainer.model, trainer.facts())
    return armt.Engine.from_pretrained(folder, device="cpu", dtype="float32", threads=1)


def assert_close(found: Any, single: Any, exact: Any) -> None:
    """``found`` is as near to float64 as PyTorch's own float32 is, within a small factor."""
    scale = float(exact.abs().max())
    error = float(np.abs(found - exact.numpy()).max())
    own = float((single.double() - exact).abs().max())
    assert error <= 1e-5 * scale + SLACK * own, (error, own, scale)
    assert error <= LARGEST * scale, (error, scale)


def assert_agreement(model: Armt, engine: armt.Engine, tokens: int, seed: int = 0) -> None:
    """Logits of all tokens, and A and z of all layers."""
    ids = np.random.default_rng(seed).integers(0, model.shape.vocab_size, (2, tokens))
    with torch.no_grad():
        logits, states = model(torch.from_numpy(ids))
        exact, exact_states = deepcopy(model).double()(torch.from_numpy(ids))
    found = engine.forward(ids)
    assert_close(found.logits, logits, exact)
    for row, state in enumerate(found.states):
        for layer, memory in enumerate(zip(states, exact_states, strict=True)):
            single, double = memory
            assert single is not None and double is not None
            for mine, one, other in zip(state.memory(layer), single, double, strict=True):
                assert_close(mine[0], one[row], other[row])


@pytest.mark.parametrize("tokens", [3, 4, 5, 17, 60])
def test_a_trained_model_and_the_engine_agree(
    trained: tuple[Trainer, list[Any]], tmp_path: Path, tokens: int
) -> None:
    trainer, _ = trained
    assert_agreement(trainer.model, exported(trainer, tmp_path / "model"), tokens)


def test_other_sizes_agree(tmp_path: Path) -> None:
    torch.manual_seed(1)
    shape = Shape(50, 13, width=24, layers=3, heads=3, memory_tokens=3, d_mem=5)
    model = Armt(shape)
    write_model(tmp_path, model, {})
    engine = armt.Engine.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert_agreement(model, engine, 40)


def test_names_and_shapes_are_the_published_ones() -> None:
    shape = Shape(50, 13, width=24, layers=1, heads=3, memory_tokens=3, d_mem=5)
    found = {name: tuple(t.shape) for name, t in Armt(shape).state_dict().items()}
    layer = "memory_cell.model.transformer.h.0."
    assert found["memory_cell.memory"] == (3, 24)
    assert found["memory_cell.model.transformer.wpe.weight"] == (16, 24)
    assert found[f"{layer}W_mq.weight"] == (5, 24)
    assert found[f"{layer}W_mb.bias"] == (1,)
    assert found[f"{layer}layer.attn.c_attn.weight"] == (24, 72)
    assert len(found) == 1 + 2 + 2 + 5 + 12


def test_questions_leave_no_trace_and_see_the_memory_before(
    trained: tuple[Trainer, list[Any]], tmp_path: Path
) -> None:
    """What is asked beside a segment is what an engine is asked before it."""
    trainer, _ = trained
    model, engine = trainer.model, exported(trainer, tmp_path / "model")
    batch = make_batch(SMALL, 6, np.random.default_rng(3))
    session, state = engine.session(), model.empty()
    for tokens, asked in zip(batch.pairs.unbind(1), batch.questions, strict=False):
        questions = asked if asked.numel() else None
        with torch.no_grad():
            plain, _, expected = model.segment(tokens, state)
            logits, answers, state = model.segment(tokens, state, questions)
        torch.testing.assert_close(plain, logits, rtol=1e-5, atol=1e-5)
        for one, other in zip(expected, state, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        for i, question in enumerate(asked[0]):
            found = session.feed(question.numpy(), logits="last", write=False).logits
            assert found is not None and answers is not None
            np.testing.assert_allclose(found, answers[0, i, -1].numpy(), rtol=1e-4, atol=1e-3)
        session.step(tokens[0].numpy())


def test_batches_ask_for_the_newest_value() -> None:
    plan = Plan(batch=50, pairs=(12,), rewrite=0.5, key_symbols=1, asked=3, asked_last=5)
    batch = make_batch(plan, 12, np.random.default_rng(0))
    count = batch.pairs.shape[1]
    assert 6 <= count <= 12 and len(batch.questions) == len(batch.answers) == count + 1
    again = 0
    for row in range(plan.batch):
        known: dict[int, int] = {}
        for n in range(count + 1):
            asked = batch.questions[n][row]
            assert asked.shape == ((0 if n == 0 else 3 if n < count else 5), 2)
            for (key, gen), value in zip(
                asked.tolist(), batch.answers[n][row].tolist(), strict=True
            ):
                assert gen == plan.layout.gen and known[key] == value
            if n < count:
                key, sep, value, eos = batch.pairs[row, n].tolist()
                assert (sep, eos) == (plan.layout.sep, plan.layout.eos)
                again += key in known
                known[key] = value
    assert again > 20
    never = make_batch(Plan(batch=20, rewrite=0.0), 12, np.random.default_rng(0))
    for row in never.pairs[:, :, :2].tolist():
        assert len({tuple(key) for key in row}) == len(row)


def test_the_loss_falls(trained: tuple[Trainer, list[Any]]) -> None:
    _, reports = trained
    first = np.mean([r.loss for r in reports[:5]])
    last = np.mean([r.loss for r in reports[-5:]])
    assert len(reports) == SMALL.steps and last < 0.6 * first, (first, last)
    assert np.mean([r.accuracy for r in reports[-5:]]) > 2 / 16  # a guess has odds of 1 in 16


def test_the_gradient_reaches_every_weight() -> None:
    trainer = Trainer(SMALL)
    batch = make_batch(SMALL, 2, np.random.default_rng(0))
    loss, _ = losses(trainer.model, batch)
    loss.backward()
    without = {n for n, p in trainer.model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set()


def test_stages_end_by_success_or_by_time() -> None:
    plan = Plan(steps=30, pairs=(1, 2, 3), enough=0.5)
    quick, slow = Standing(), Standing()
    seen: dict[str, list[int]] = {"quick": [], "slow": []}
    for _ in range(30):
        seen["quick"].append(quick.stage)
        seen["slow"].append(slow.stage)
        quick.advance(plan, 1.0)
        slow.advance(plan, 0.0)
    assert seen["slow"] == [0] * 10 + [1] * 10 + [2] * 10
    assert seen["quick"][:16] == [0] * 7 + [1] * 7 + [2] * 2
    assert plan.rate(0) < plan.rate(49) == plan.lr > plan.rate(60)


def test_resuming_is_going_on(tmp_path: Path) -> None:
    whole, half = Trainer(SMALL), Trainer(SMALL)
    for _ in range(12):
        whole.step()
    for _ in range(5):
        half.step()
    write_progress(tmp_path, half.progress())
    later = Trainer.resumed(read_progress(tmp_path), steps=SMALL.steps)
    for _ in range(7):
        later.step()
    assert later.standing == whole.standing
    for name, values in whole.model.state_dict().items():
        assert torch.equal(values, later.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": ()}, "pairs"),
        ({"pairs": (2, 2)}, "rising"),
        ({"pairs": (1, 17), "key_symbols": 1}, "from 1 to 16"),
        ({"batch": 0}, "batch: found 0"),
        ({"rewrite": 1.5}, "rewrite"),
        ({"width": 30, "heads": 4}, "divisor of the width 30"),
    ],
)
def test_plans_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(armt.InvalidArgument, match=message):
        Trainer(Plan(**change))
    with pytest.raises(armt.InvalidArgument, match="whole numbers"):
        stages("1,two")


# ------------------------------------------------------------------ the command

SETTINGS = {"batch": 8, "pairs": "1,2", "key-symbols": 1, "width": 32, "layers": 2, "d-mem": 8}
QUICK = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
TRAIN = ["train", "retrieval"]


def train(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run([*TRAIN, *map(str, arguments)])
    out, err = capfd.readouterr()
    return code, out, err


def test_the_command_trains_and_goes_on(tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "model"
    code, out, _ = train(capfd, folder, *QUICK, "--steps", 8, "--save-every", 3, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["step"] == facts["steps"] == 8 and not facts["interrupted"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "training.pt",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["training"]["steps"] == 8 and config["retrieval"]["key_symbols"] == 1
    code, out, err = train(capfd, folder, *QUICK, "--steps", 10)
    assert (code, out) == (1, "") and "--resume" in err and err.count("\n") == 1
    code, out, _ = train(capfd, folder, "--steps", 10, "--resume")
    assert code == 0 and out == f"{folder}\n"
    engine = armt.Engine.from_pretrained(folder, device="cpu")
    score = task.evaluate(engine, kind="remember", pairs=2, samples=8)
    assert score.samples == 8


def test_bad_input_is_one_line(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "training.pt").write_bytes(b"nothing")
    for arguments, message in (
        ([tmp_path / "no", "--resume"], "no such file"),
        ([tmp_path, "--resume"], "cannot be read"),
        ([tmp_path / "new", "--pairs", "ten"], "whole numbers"),
        ([tmp_path / "new", "--device", "abacus"], "--device"),
        ([tmp_path / "new", "--width", "30"], "divisor"),
    ):
        code, out, err = train(capfd, *arguments)
        assert (code, out) == (1, "") and message in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()
    torch.save({"plan": {}}, tmp_path / "training.pt")
    code, _, err = train(capfd, tmp_path, "--resume")
    assert code == 1 and err.count("\n") == 1
    with pytest.raises(armt.InvalidArgument, match="exists already"):
        new_folder(tmp_path)


def test_ctrl_c_leaves_a_model_that_can_go_on(tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "model"
    more = ["--steps", "100000", "--save-every", "5", "--json", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "armt.cli", *TRAIN, str(folder), *QUICK, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not (folder / "training.pt").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    facts = json.loads(out)
    assert facts["interrupted"] and 5 <= facts["step"] < 100000
    assert len(list(folder.iterdir())) == 3
    code, out, _ = train(
        capfd, folder, "--steps", facts["step"] + 2, "--resume", "--json", "--threads", "1"
    )
    assert code == 0 and json.loads(out)["step"] == facts["step"] + 2
