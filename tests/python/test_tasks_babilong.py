"""BABILong: samples, answers, files that survive an interruption, and plots."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import armt
from armt.models import resolve
from armt.tasks import babilong, background, comparing
from armt.tasks.babi import generate_many, make_sentences
from armt.tasks.babilong import Maker, Sample
from armt.tasks.background import Book, read_sentences
from armt.tasks.journal import Journal
from armt.tasks.lengths import length_name, parse_length
from armt.tasks.reading import EngineReader, answers_of, read_rows
from armt.tasks.stories import TASKS, Item
from armt.tasks.subject import in_torch, on_engine
from armt.text import TextSettings, Tokenizer
from variants import Variant, Zoo

Invoke = Callable[..., tuple[int, str, str]]
Ids = npt.NDArray[np.int32]
BABI = """1 Mary went to the office.
2 John moved to the garden.
3 Where is Mary? \toffice\t1
4 Mary went back to the kitchen.
5 Where is Mary? \tkitchen\t4
"""
CELL = {"task": "qa1", "length": 600}


@pytest.fixture(scope="module")
def engine() -> armt.Engine:
    return armt.Engine.from_pretrained(resolve("demo"), device="cpu")


@pytest.fixture(scope="module")
def tokenizer(engine: armt.Engine) -> Tokenizer:
    pytest.importorskip("tokenizers", reason='needs the extra "text"')
    return Tokenizer(engine.checkpoint.folder)


def make_maker(
    tokenizer: Tokenizer, items: Sequence[Item] | None = None, sentences: int = 4000, seed: int = 0
) -> Maker:
    if items is None:
        items = generate_many("qa1", 50, seed=2)
    book = Book(make_sentences(sentences), tokenizer)
    return Maker(items, book, tokenizer, TextSettings.of(resolve("demo")), 8, seed)


def test_lengths() -> None:
    assert [parse_length(t) for t in ("0", "512", "4k", "1M")] == [0, 512, 4096, 1048576]
    with pytest.raises(armt.InvalidArgument, match="length"):
        parse_length("4 kB")
    assert [length_name(n) for n in (0, 512, 4096, 6000, 50 << 20)] == [
        "0",
        "512",
        "4k",
        "6,000",
        "50M",
    ]


def test_sentences_of_a_book(tmp_path: Path) -> None:
    text = 'It was\nlate. "Is it?" he asked. Mr. Pell slept!\n\nTHE END'
    expected = ["It was late.", '"Is it?"', "he asked.", "Mr.", "Pell slept!", "THE END"]
    for name, opener in (("a.txt", open), ("a.gz", gzip.open), ("a.xz", lzma.open)):
        with opener(tmp_path / name, "wt", encoding="utf-8") as file:  # type: ignore[operator]
            file.write(text)
        assert read_sentences(tmp_path / name) == expected
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "raw.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "cut.xz").write_bytes((tmp_path / "a.xz").read_bytes()[:-9])
    for name in ("empty.txt", "raw.txt", "absent.txt", "cut.xz"):
        with pytest.raises(armt.InvalidArgument, match=name):
            read_sentences(tmp_path / name)


def test_a_book_has_no_end(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "SENTENCES_A_BLOCK", 7)
    sentences = make_sentences(30)
    book = Book(sentences, tokenizer)
    text, at = "", 25
    for _, (ids, starts) in zip(range(12), book.parts(25), strict=False):
        assert starts[0] == 0 and starts[-1] == len(ids)
        for a, b in itertools.pairwise(starts):
            text = tokenizer.decode(ids[a:b]).strip()
            assert text == sentences[at % 30]
            at += 1
    assert at > 60


@pytest.mark.parametrize("length", [0, 200, 1024, 3000])
def test_a_sample_has_its_length_and_all_facts_in_order(tokenizer: Tokenizer, length: int) -> None:
    maker = make_maker(tokenizer)
    for sample in maker.samples(length, 5):
        ids = np.concatenate([*sample.stream(maker.book), sample.prompt])
        assert len(ids) == sample.tokens
        assert length == 0 or len(ids) == length - 8
        for at, fact in zip(sample.positions, sample.facts, strict=True):
            assert ids[at : at + len(fact)].tolist() == fact.tolist()
        assert sample.positions == sorted(sample.positions)
        assert sample.fact_at == sample.positions[sample.item.supporting[0]]
        text = tokenizer.decode(ids)
        assert text.endswith(f" {sample.item.question}")
        for fact_text in sample.item.sentences:
            assert fact_text in text


def test_facts_stand_between_sentences(tokenizer: Tokenizer) -> None:
    maker = make_maker(tokenizer)
    (sample,) = maker.samples(2000, 1)
    ids = np.concatenate(list(sample.stream(maker.book)))
    for at in sample.positions:
        before = tokenizer.decode(ids[max(at - 12, 0) : at]).strip()
        assert before == "" or before[-1] in '.!?"'


def test_facts_stand_everywhere(tokenizer: Tokenizer) -> None:
    maker = make_maker(tokenizer, generate_many("qa1", 200))
    depths = []
    for sample in maker.samples(4000, 200):
        for _ in sample.stream(maker.book):
            pass
        depths += [at / 4000 for at in sample.positions]
    counts, _ = np.histogram(depths, bins=4, range=(0, 1))
    assert counts.min() > 0.2 * len(depths)


def test_samples_do_not_depend_on_how_many_there_are(tokenizer: Tokenizer) -> None:
    def told(maker: Maker, sample: Sample) -> list[int]:
        ids = [*sample.stream(maker.book), sample.prompt]
        found: list[int] = np.concatenate(ids).tolist()
        return found

    maker = make_maker(tokenizer)
    few, many = maker.samples(700, 3), maker.samples(700, 9)
    assert [told(maker, s) for s in few] == [told(maker, s) for s in many[:3]]
    other = make_maker(tokenizer, seed=1)
    assert told(maker, few[0]) != told(other, other.samples(700, 1)[0])


def test_a_long_sample_is_never_in_memory(tokenizer: Tokenizer) -> None:
    maker = make_maker(tokenizer)
    (sample,) = maker.samples(parse_length("50M"), 1)
    tracemalloc.start()
    tokens = sum(map(len, sample.stream(maker.book)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokens == parse_length("50M") - 8 - len(sample.prompt)
    assert peak < 4 << 20 and len(sample.positions) == len(sample.facts)


def test_too_short_a_book(tokenizer: Tokenizer, invoke: Invoke, tmp_path: Path) -> None:
    maker = make_maker(tokenizer, sentences=30)
    assert len(maker.samples(300, 2)) == 2
    with pytest.raises(armt.InvalidArgument, match="expected at least 3,"):
        maker.samples(4000, 2)
    (tmp_path / "book.txt").write_text("It was late. The rain had ceased.")
    code, out, err = invoke("eval", "babilong", "demo", "--book", tmp_path / "book.txt")
    assert code == 1 and out == "" and err.splitlines()[-1].startswith("armt: book: found ")


def test_problems_that_do_not_fit_are_passed_over(tokenizer: Tokenizer) -> None:
    long = [Item(("Mary went to the office.",) * 60, "Where is Mary?", "never", (59,))]
    short = generate_many("qa1", 3, seed=5)
    maker = make_maker(tokenizer, long + short)
    assert {s.item.answer for s in maker.samples(200, 7)} == {i.answer for i in short}
    with pytest.raises(armt.InvalidArgument, match="length: found 200"):
        make_maker(tokenizer, long).samples(200, 1)


def test_answers_leave_no_trace(engine: armt.Engine, tokenizer: Tokenizer) -> None:
    maker = make_maker(tokenizer)
    samples = maker.samples(1100, 4)
    reader = EngineReader(engine)
    read_rows(reader, [s.stream(maker.book) for s in samples])
    prompts = [s.prompt for s in samples]
    stop = tuple(engine.checkpoint.eos_token_ids)
    first = answers_of(reader, prompts, 8, stop)
    assert first == answers_of(reader, prompts, 8, stop)
    for sample, answer in zip(samples, first, strict=True):
        with engine.session() as alone:
            alone.feed(np.concatenate([*sample.stream(maker.book), sample.prompt]))
            tokens = [t for t in alone.generate(8, stop_ids=stop) if t not in stop]
        assert answer == tokens
    score = babilong.evaluate(reader, maker, cell=CELL, length=600, samples=24, stop_ids=stop)
    assert score.accuracy > 0.7 and score.tokens == 24 * 592


class Stubborn(EngineReader):
    """Prefers another token in the first row, by ``lead``."""

    def __init__(self, engine: armt.Engine, lead: float | None) -> None:
        super().__init__(engine)
        self._lead = lead

    def ask_logits(self, ids: Sequence[Ids]) -> npt.NDArray[np.float32]:
        logits = super().ask_logits(ids).copy()
        if self._lead is not None:
            logits[0, 5] = logits[0].max() + self._lead
        return logits


def test_answers_of_two_readers_are_compared(engine: armt.Engine, tokenizer: Tokenizer) -> None:
    maker = make_maker(tokenizer)
    stop = tuple(engine.checkpoint.eos_token_ids)
    for other, same in ((EngineReader(engine), True), (Stubborn(engine, 0.5), False)):
        journal = Journal()
        babilong.evaluate(
            EngineReader(engine),
            maker,
            cell=CELL,
            length=600,
            samples=3,
            stop_ids=stop,
            journal=journal,
            other=other,
        )
        lines = journal.of(CELL)
        assert [line["same"] for line in lines] == [same, True, True]
        assert same or (lines[0]["gap"] > 0.1 and not comparing.is_tie(lines[0]))
        assert all(comparing.is_tie(line) for line in lines[1:])
    assert lines[0]["other_gap"] == pytest.approx(0.5, abs=1e-4)


# ------------------------------------------------------------------ journals


def test_a_journal_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    journal = Journal(folder, {"seed": 1})
    journal.add(CELL, [{"right": True}, {"right": False}])
    with (folder / "answers.jsonl").open("a") as file:
        file.write('{"cell": {"task": "qa1", "le')
    again = Journal(folder, {"seed": 1})
    assert again.of(CELL) == journal.of(CELL) and again.cells == [CELL]
    again.add(CELL, [{"right": True}])
    assert len(Journal(folder, {"seed": 1}).of(CELL)) == 3
    with pytest.raises(armt.InvalidArgument, match="seed = 1"):
        Journal(folder, {"seed": 2})
    (folder / "answers.jsonl").write_text("[]\n")
    with pytest.raises(armt.InvalidArgument, match="line 1"):
        Journal(folder, {"seed": 1})
    (folder / "settings.json").write_text("{")
    with pytest.raises(armt.InvalidArgument, match="settings"):
        Journal(folder, {"seed": 1})
    with pytest.raises(armt.InvalidArgument, match="other files"):
        Journal(tmp_path / "a", {})
    with pytest.raises(armt.InvalidArgument, match="found a file"):
        Journal(folder / "settings.json", {})


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "a").mkdir()
    journal = Journal(tmp_path / "a", {})
    (tmp_path / "a" / "answers.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="space"):
        journal.add(CELL, [{"right": True}])
    assert journal.of(CELL) == []


# ------------------------------------------------------------------ the command


@pytest.fixture
def data(tmp_path: Path) -> list[Any]:
    (tmp_path / "qa1_x_test.txt").write_text(BABI)
    (tmp_path / "book.txt").write_text("\n".join(make_sentences(300)))
    return ["--data", tmp_path, "--book", tmp_path / "book.txt", "--device", "cpu"]


def test_the_command(invoke: Invoke, tokenizer: Tokenizer, data: list[Any], tmp_path: Path) -> None:
    sizes, out = ["--lengths", "0,600,2k", "--samples", 5, "--batch", 2], tmp_path / "out"
    code, text, err = invoke("eval", "babilong", "demo", *data, *sizes, "--out", out, "--json")
    found = json.loads(text)
    assert (code, err) == (0, "") and found["evaluation"] == "babilong" and found["device"] == "cpu"
    assert [row["length"] for row in found["results"]] == [0, 600, 2048]
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 15 and found == json.loads((out / "results.json").read_text())
    for row in found["results"]:
        mine = [a for a in answers if a["cell"]["length"] == row["length"]]
        assert row["right"] == sum(a["right"] for a in mine) >= 3
        assert sum(depth["samples"] for depth in row["depths"]) == 5
        assert all(a["right"] == (a["answer"] == a["expected"]) for a in mine)
    lines = (out / "results.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[0].split(",")[0] == "evaluation"
    code, text, err = invoke("eval", "babilong", "demo", *data, *sizes[:4], "--batch", 5)
    assert code == 0 and "2,048" in text and "accuracy" in text
    for row in found["results"]:
        assert f"{row['right']} of 5" in text


def test_the_command_goes_on(
    invoke: Invoke, tokenizer: Tokenizer, data: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    call = ["eval", "babilong", "demo", *data, "--lengths", "600", "--out", out, "--json"]
    whole = json.loads(invoke(*call, "--samples", 6)[1])["results"]
    kept = (out / "answers.jsonl").read_text().splitlines(keepends=True)
    (out / "answers.jsonl").write_text("".join(kept[:3]) + kept[3][:20])
    again = json.loads(invoke(*call, "--samples", 6)[1])["results"]
    now = (out / "answers.jsonl").read_text().splitlines(keepends=True)
    assert now[:3] == kept[:3] and len(now) == 6

    def answers(lines: list[str]) -> list[Any]:
        return [json.loads(line) | {"seconds": 0} for line in lines]

    assert answers(now) == answers(kept) and again[0]["right"] == whole[0]["right"]
    code, _text, err = invoke(*call, "--samples", 6, "--seed", 3)
    assert code == 1 and "choose another folder" in err


def test_ctrl_c_loses_nothing(tokenizer: Tokenizer, data: list[Any], tmp_path: Path) -> None:
    out, armt_command = tmp_path / "out", [sys.executable, "-m", "armt.cli"]
    call = [*armt_command, "eval", "babilong", "demo", *map(str, data), "--lengths", "2k"]
    call += ["--out", str(out), "--batch", "2", "--samples"]
    process = subprocess.Popen([*call, "2000"], stdout=-1, stderr=-1, text=True)
    for _ in range(600):
        if (out / "answers.jsonl").is_file() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from there" in err, err
    kept = len((out / "answers.jsonl").read_text().splitlines())
    assert kept >= 2
    again = subprocess.run([*call, str(kept + 1), "--json"], capture_output=True, check=True)
    assert json.loads(again.stdout)["results"][0]["samples"] == kept + 1


def test_all_tasks_are_made_on_the_spot(invoke: Invoke, tokenizer: Tokenizer) -> None:
    code, text, _ = invoke(
        "eval", "babilong", "demo", "--tasks", "all", "--lengths", "3000", "--samples", 2, "--json"
    )
    found = json.loads(text)
    assert code == 0 and [row["task"] for row in found["results"]] == list(TASKS)


def test_systems(zoo: Zoo, tmp_path: Path) -> None:
    rmt, paper = Variant("rmt-llama", "llama", "rmt"), Variant("paper-gpt2-plain")
    assert on_engine(zoo.engine(rmt)).system == "rmt"
    assert on_engine(zoo.engine(paper), "armt").system == "armt"
    with pytest.raises(armt.CheckpointError, match="found a checkpoint of rmt"):
        on_engine(zoo.engine(rmt), "armt")
    for text in ("{", '{"text": {"answer_tokens": 0}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(armt.CheckpointError, match=r"config\.json"):
            in_torch(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tasks", "qa9"], "qa9"),
        (["--lengths", "10"], "length: found 10"),
        (["--system", "rmt"], "found a checkpoint of armt"),
        (["--system", "lstm"], "lstm"),
        (["--out", __file__], "found a file"),
        (["--data", __file__, "--tasks", "qa1,qa2"], "one file for 2 tasks"),
        (["--torch", "--compare-torch"], "--compare-torch"),
    ],
)
def test_bad_input_is_one_line(
    invoke: Invoke, tokenizer: Tokenizer, options: list[str], says: str
) -> None:
    code, out, err = invoke("eval", "babilong", "demo", "--samples", 2, *options)
    last = err.splitlines()[-1]
    assert code == 1 and out == "" and last.startswith("armt: ") and says in last


class Fake(Stubborn):
    """Stands for PyTorch: the engine again, perhaps with another opinion."""

    lead: float | None = None

    def __init__(self, folder: Path, device: str) -> None:
        engine = armt.Engine.from_pretrained(resolve("demo"), device=device)
        super().__init__(engine, self.lead)


@pytest.fixture
def fake_torch(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    module = types.ModuleType("armt.training.reader")
    monkeypatch.setattr(module, "TorchReader", Fake, raising=False)
    monkeypatch.setitem(sys.modules, "armt.training.reader", module)
    return Fake


def test_the_command_compares(
    invoke: Invoke,
    tokenizer: Tokenizer,
    data: list[Any],
    fake_torch: type[Fake],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = ["eval", "babilong", "demo", *data, "--lengths", "600", "--samples", 4, "--batch", 2]
    code, out, _ = invoke(*call, "--compare-torch")
    assert code == 0 and "4 of 4 answers agree" in out
    monkeypatch.setattr(fake_torch, "lead", 0.25)
    code, out, _ = invoke(*call, "--compare-torch", "--json")
    found = json.loads(out)["compared"]
    assert code == 0 and (found["answers"], found["agree"], found["ties"]) == (4, 2, 0)
    assert all(line["other_gap"] == pytest.approx(0.25, abs=1e-4) for line in found["differing"])
    code, out, _ = invoke(*call, "--compare-torch")
    assert "2 of 4 answers agree" in out and "gap" in out and "0 of 2 differ by rounding" in out


def test_the_command_in_torch(
    invoke: Invoke, tokenizer: Tokenizer, data: list[Any], fake_torch: type[Fake], tmp_path: Path
) -> None:
    call = [*data, "--lengths", "600", "--samples", 3, "--json"]
    engine = json.loads(invoke("eval", "babilong", "demo", *call)[1])
    found = json.loads(invoke("eval", "babilong", "demo", "--torch", *call)[1])
    assert (engine["implementation"], found["implementation"]) == ("engine", "PyTorch")
    assert found["results"][0]["right"] == engine["results"][0]["right"]
    folder = tmp_path / "mamba"
    shutil.copytree(resolve("demo"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text"]["answer_tokens"] = 3
    (folder / "config.json").write_text(json.dumps(config | {"dialect": "mamba"}))
    found = json.loads(invoke("eval", "babilong", folder, *call, "--system", "mamba")[1])
    assert (found["system"], found["implementation"]) == ("mamba", "PyTorch")
    assert found["max_new_tokens"] == 3
    code, _, err = invoke("eval", "babilong", folder, *call, "--system", "armt")
    assert code == 1 and "found a checkpoint of mamba" in err


def test_plots(invoke: Invoke, tokenizer: Tokenizer, data: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='plots need the extra "plots"')
    call = ["eval", "babilong", "demo", *data, "--samples", 2]
    for name in ("one", "two"):
        code, _, err = invoke(*call, "--lengths", "600,1k", "--out", tmp_path / name)
        assert code == 0 and "positions.png" in err
        for file in ("accuracy.png", "positions.png", "lengths.png"):
            assert (tmp_path / name / file).read_bytes().startswith(b"\x89PNG")
    folders = [tmp_path / "one", tmp_path / "two"]
    code, out, _ = invoke("eval", "plot", *folders, "--out", tmp_path / "both")
    assert (
        code == 0 and Path(out.strip()).name == "babilong-qa1.png" and Path(out.strip()).is_file()
    )
    code, out, err = invoke("eval", "plot", tmp_path, "--out", tmp_path / "both")
    assert code == 1 and "results.json" in err
