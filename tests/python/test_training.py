"""Training: it learns, it goes on where it stood, and says what is wrong in one line."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import armt
from armt.cli.app import run
from armt.tasks import retrieval as task
from armt.tasks.reading import EngineReader

torch = pytest.importorskip("torch", reason='needs the extra "torch"')

from armt.training import folder as training_folder  # noqa: E402
from armt.training.folder import Metrics, new_folder, read_progress, write_progress  # noqa: E402
from armt.training.recipe import parse_recipe  # noqa: E402
from armt.training.trainer import Report, Trainer  # noqa: E402

STAGE = """
[[stage]]
steps = {steps}
rows = 32
segments = 4
length = 4
asks = 3
lr = [4e-3, 4e-3]
warm_up = 10
pairs = 3
pool = 3
"""
RECIPE = (
    """
task = "retrieval"
segment_size = 4
[material]
key_symbols = 1
[start]
places = [0, 2]
[model]
width = 32
layers = 2
heads = 2
memory_tokens = 2
d_mem = 8
[optimizer]
average = 0.9
"""
    + STAGE
)
STORIES = """
task = "babilong"
segment_size = 32
[model]
{model}
[[stage]]
steps = 2
rows = 4
segments = 2
length = 32
asks = 4
lr = [1e-3, 1e-3]
fresh = [0.5]
[[stage]]
steps = 2
rows = 2
segments = 3
length = 32
asks = 2
lr = [1e-3, 1e-3]
keep_quiet = 0.1
"""


def recipe_of(steps: int, text: str = RECIPE) -> tuple[Any, str]:
    text = text.format(steps=steps)
    return parse_recipe(text), text


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def all_steps(trainer: Trainer) -> Report:
    while not trainer.done:
        trainer.advance()
    report = trainer.report()
    return report


def test_it_learns_to_remember_pairs(tmp_path: Path) -> None:
    """Far above guessing (1 in 16) in seconds, and the engine finds it in what was saved."""
    trainer = Trainer(*recipe_of(160))
    first = None
    while not trainer.done:
        trainer.advance()
        if trainer.step in (10, 140):
            first = first or trainer.report()
    last = trainer.report()
    assert first is not None and last.loss < 0.5 * first.loss, (first, last)
    assert last.right["remember"] > 0.5 and last.right["rewrite"] > 0.5, last
    training_folder.write_model(tmp_path, trainer.state_dict(), trainer.config())
    engine = armt.Engine.from_pretrained(tmp_path, device="cpu", threads=1)
    layout = task.Layout.of(tmp_path)
    for trial in (task.Trial("remember", 1), task.Trial("rewrite", 2, keys=2)):
        score = task.evaluate(EngineReader(engine), layout, trial, samples=64)
        assert score.right > 40, (trial, score)  # guessing: 4
    score = task.evaluate(EngineReader(engine), layout, task.Trial("remember", 2), samples=64)
    assert score.right > 24, score


def test_gates_are_saved_steeper() -> None:
    """Their log odds x become about + sharpen (x - about); what is trained stays as it is."""
    gates = "[gates]\nsharpen = 1.5\nabout = [-1.0, 0.25]\n"
    plain, steep = (Trainer(*recipe_of(2, RECIPE + text)) for text in ("", gates))
    x = torch.randn(5, 32)
    for trainer in (plain, steep):
        all_steps(trainer)
    for layer, about in enumerate((-1.0, 0.25)):
        name = f"memory_cell.model.transformer.h.{layer}.W_mb"
        before, after = (
            torch.nn.functional.linear(x, found[f"{name}.weight"], found[f"{name}.bias"])
            for found in (plain.state_dict(), steep.state_dict())
        )
        torch.testing.assert_close(after, about + 1.5 * (before - about))
    for mine, other in zip(plain.model.parameters(), steep.model.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ("sharpen = 0.5\nabout = [0.0, 0.0]", "gates: sharpen: found 0.5, expected 1 or more"),
        ("sharpen = 2.0", "gates: about: found 0 values, expected 2, one a layer"),
        ("sharpen = 2.0\nabout = ['x', 'y']", "gates: about: found 'x', expected a number"),
    ],
)
def test_gates_that_a_recipe_cannot_have(gates: str, message: str) -> None:
    with pytest.raises(armt.InvalidArgument, match=re.escape(message)):
        recipe_of(2, f"{RECIPE}[gates]\n{gates}\n")


def test_only_armt_has_gates() -> None:
    text = STORIES.format(model='system = "rmt"\nwidth = 32\nlayers = 2\nheads = 2')
    with pytest.raises(armt.InvalidArgument, match="gates: rmt has none"):
        parse_recipe(text + "[gates]\nsharpen = 2.0\n")


@pytest.mark.parametrize(
    "model",
    [
        "width = 32\nlayers = 2\nheads = 2\nd_mem = 8",
        'width = 32\nlayers = 2\nheads = 2\nd_mem = 8\ndialect = "paper"',
        'system = "rmt"\nwidth = 32\nlayers = 2\nheads = 2',
        'system = "mamba"\nwidth = 32\nlayers = 2\nstate_size = 8',
    ],
    ids=["modern", "paper", "rmt", "mamba"],
)
def test_resuming_is_going_on(tmp_path: Path, model: str) -> None:
    """Every system; the break falls into the second stage, whose rows carry memories."""
    text = STORIES.format(model=model).replace("steps = 2\nrows = 2", "steps = 4\nrows = 2")
    given = parse_recipe(text), text
    whole, half = Trainer(*given), Trainer(*given)
    all_steps(whole)
    for _ in range(3):
        half.advance()
    write_progress(tmp_path, half.progress())
    later = Trainer.resumed(read_progress(tmp_path), None)
    all_steps(later)
    assert later.step == whole.step == 6
    for name, values in whole.state_dict().items():
        assert torch.equal(values, later.state_dict()[name]), name
    for one, other in zip(whole._now.carry, later._now.carry, strict=True):  # type: ignore[union-attr]
        assert torch.equal(one, other)


def test_a_row_whose_memory_broke_begins_anew() -> None:
    text = RECIPE.replace("[[stage]]", "[[stage]]\nfresh = [0.0]")
    trainer = Trainer(*recipe_of(10, text))
    for _ in range(3):
        trainer.advance()
    assert trainer._now is not None
    trainer._now.carry[0][3] = float("nan")
    trainer.advance()
    assert all(part.isfinite().all() for part in trainer._now.carry)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_going_on_with_the_weights_of_another(tmp_path: Path) -> None:
    first = Trainer(*recipe_of(2))
    all_steps(first)
    training_folder.write_model(tmp_path, first.state_dict(), first.config())
    text = RECIPE.replace("[start]", f"[start]\nfolder = '{tmp_path}'")
    second = Trainer(*recipe_of(2, text))
    for name, values in first.state_dict().items():
        assert torch.equal(values, second.model.state_dict()[name]), name


def test_metrics_behind_the_step_one_goes_on_from_are_cut_off(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0) as metrics:
        for step in (1, 2, 3):
            metrics.add(Report(step, 0, 1.0, 0.0, {"qa1": 0.5}), tokens=10)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sta')
    with Metrics(tmp_path, 2) as metrics:
        metrics.add(Report(3, 1, 0.5, 0.0, {}), tokens=20)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert json.loads(lines[-1])["tokens"] == 20


# ------------------------------------------------------------------ the command


def write_recipe(folder: Path, steps: int, name: str = "recipe.toml") -> Path:
    path = folder / name
    path.write_text(RECIPE.format(steps=steps))
    return path


def train(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(["train", *map(str, arguments)])
    out, err = capfd.readouterr()
    return code, out, err


FILES = ["config.json", "metrics.jsonl", "model.safetensors", "training.pt"]


def test_the_command_trains_and_goes_on(tmp_path: Path, capfd: Any) -> None:
    folder, recipe = tmp_path / "model", write_recipe(tmp_path, 8)
    code, out, _ = train(capfd, recipe, folder, "--save-every", 3, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["step"] == facts["steps"] == 8 and not facts["interrupted"]
    assert sorted(p.name for p in folder.iterdir()) == FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["training"]["steps"] == 8 and config["retrieval"]["key_symbols"] == 1
    assert config["training"]["recipe"] == recipe.read_text()
    code, out, err = train(capfd, recipe, folder)
    assert (code, out) == (1, "") and "--resume" in err and err.count("\n") == 1
    code, out, _ = train(capfd, write_recipe(tmp_path, 10), "--resume", folder)
    assert code == 0 and out == f"{folder}\n"
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert steps == [3, 6, 8, 10]
    armt.Engine.from_pretrained(folder, device="cpu")


def test_a_text_model_brings_its_tokenizer(tmp_path: Path, capfd: Any) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(STORIES.format(model="width = 32\nlayers = 2\nheads = 2\nd_mem = 8"))
    code, _, err = train(capfd, recipe, tmp_path / "model", "--workers", 2)
    assert code == 0, err
    engine = armt.Engine.from_pretrained(tmp_path / "model", device="cpu")
    assert engine.checkpoint.tokenizer is not None and engine.checkpoint.eos_token_ids


def test_time_over_is_saved(tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "model"
    recipe = write_recipe(tmp_path, 100_000)
    code, out, _ = train(capfd, recipe, folder, "--minutes", 0.02, "--json")
    assert code == 0
    facts = json.loads(out)
    assert 0 < facts["step"] < 100_000 and not facts["interrupted"]
    assert read_progress(folder)["step"] == facts["step"]


def test_bad_input_is_one_line(tmp_path: Path, capfd: Any) -> None:
    good = write_recipe(tmp_path, 4)
    (tmp_path / "training.pt").write_bytes(b"nothing")
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(good.read_text() + "pears = 3\n")
    missing = tmp_path / "missing.toml"
    missing.write_text(
        STORIES.format(model="width = 32\nlayers = 2\nheads = 2\n[material]\nbook = 'no book'")
    )
    new = tmp_path / "new"
    for arguments, message in (
        (["--resume", tmp_path / "no"], "no such file"),
        (["--resume", tmp_path], "cannot be read"),
        ([], "RECIPE and OUT"),
        ([tmp_path / "nothing.toml", new], "cannot be read"),
        ([wrong, new], "stage 1: found pears"),
        ([missing, new], "no book"),
        ([good, new, "--device", "abacus"], "--device"),
        ([good, new, "--resume", tmp_path], "--resume"),
    ):
        code, out, err = train(capfd, *arguments)
        assert (code, out) == (1, ""), arguments
        assert message in err and err.count("\n") == 1, err
    assert not new.exists()
    torch.save({"version": 1, "recipe": "no"}, tmp_path / "training.pt")
    code, _, err = train(capfd, "--resume", tmp_path)
    assert code == 1 and err.count("\n") == 1
    with pytest.raises(armt.InvalidArgument, match="exists already"):
        new_folder(tmp_path)


def test_a_full_disk_costs_nothing_that_was_saved(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    code, _, _ = train(capfd, write_recipe(tmp_path, 4), folder)
    assert code == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("armt.files.os.fsync", full)
    code, _, err = train(capfd, write_recipe(tmp_path, 8), "--resume", folder)
    assert code == 1 and "No space left" in err.splitlines()[-1] and "Traceback" not in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.undo()
    code, _, err = train(capfd, write_recipe(tmp_path, 8), "--resume", folder)
    assert code == 0, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_training_that_is_stopped_goes_on(tmp_path: Path, capfd: Any, number: int) -> None:
    """Ctrl-C finishes the step and saves; kill -9 loses the step it is in, and nothing that was
    saved before."""
    folder, recipe = tmp_path / "model", write_recipe(tmp_path, 100_000)
    more = ["--save-every", "1", "--json", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "armt.cli", "train", str(recipe), str(folder), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not (folder / "training.pt").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130, err
        facts = json.loads(out)
        assert facts["interrupted"] and facts["step"] == read_progress(folder)["step"]
        assert sorted(path.name for path in folder.iterdir()) == FILES
    step = read_progress(folder)["step"]
    assert 1 <= step < 100_000
    known = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert step in known and max(known) - step <= 1
    code, out, err = train(
        capfd, write_recipe(tmp_path, step + 2), "--resume", folder, "--json", "--threads", 1
    )
    assert code == 0 and json.loads(out)["step"] == step + 2, err
