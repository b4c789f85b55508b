"""The command line: results, errors in one line, exit codes, and nothing left half done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typer.models import OptionInfo

import armt
from armt.cli import loading
from armt.cli.app import app, run
from armt.cli.output import one_line, size
from armt.demo.story import material
from armt.files import whole_file
from armt.models import resolve

COMMANDS = ("demo", "run", "info", "convert", "bench", "serve", "eval", "train")
EVALUATIONS = ("retrieval", "babilong", "perplexity")
ARMT = [sys.executable, "-m", "armt.cli"]
Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def invoke(capfd: pytest.CaptureFixture[str]) -> Invoke:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 3,000 words with two facts in it, with hard line ends as in real files."""
    phrases = material()["phrases"]
    lines = [text.strip() + "." for name in ("Reflection", "Weather") for text, _ in phrases[name]]
    lines = lines * 10
    lines.insert(20, "Mary moved to the office.")
    lines.insert(400, "John travelled to the garden.")
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def needs_tokenizers() -> None:
    pytest.importorskip("tokenizers", reason='needs the extra "text"')


# ------------------------------------------------------------------ the face


def test_help_has_an_example_for_every_command(invoke: Invoke) -> None:
    code, out, _ = invoke("--help")
    assert code == 0 and all(name in out for name in COMMANDS)
    for name in COMMANDS:
        code, out, _ = invoke(name, "--help")
        assert code == 0 and f"armt {name}" in out.split("Example:")[1]
    for name in EVALUATIONS:
        code, out, _ = invoke("eval", name, "--help")
        assert code == 0 and f"armt eval {name}" in out.split("Example:")[1]


def options_of(group: Any) -> Iterator[tuple[str, Any]]:
    """The parameters of all commands, with what is said of each."""
    for command in group.registered_commands:
        hints = get_type_hints(command.callback, include_extras=True)
        for name, hint in hints.items():
            for said in getattr(hint, "__metadata__", ()):
                yield name, said
    for part in group.registered_groups:
        yield from options_of(part.typer_instance)


def test_options_keep_their_names() -> None:
    """typer 0.27 takes a metavar that is the name in capitals for the option's name."""
    options = dict(options_of(app))
    assert {"kind", "lengths", "dtype"} <= options.keys()
    for name, said in options_of(app):
        if isinstance(said, OptionInfo) and said.metavar == name.upper():
            assert f"--{name}" in (said.default, *said.param_decls), name


def test_version(invoke: Invoke) -> None:
    assert invoke("--version") == (0, f"armt {armt.__version__}\n", "")


def test_starting_imports_nothing_heavy() -> None:
    heavy = "tokenizers torch rich.progress rich.table asyncio armt.text armt.demo.story"
    code = f"import sys, armt.cli.app; print([m for m in {heavy.split()} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fly"], 2, "fly"),
        (["demo", "--tokens", "many"], 2, "--tokens"),
        (["demo", "--tokens", "5"], 2, "1000"),
        (["demo", "--device", "abacus"], 1, "abacus"),
        (["demo", "--dtype", "int3"], 1, "int3"),
        (["info", "nowhere"], 1, "nowhere: no such file or folder"),
        (["run", "demo"], 1, "nothing to read"),
        (["run", "demo", "none.txt"], 1, "nothing to do"),
        (["run", "demo", "none.txt", "--ask", "Who?"], 1, "none.txt: no such file"),
        (["run", "demo", "--state-in", "none", "--ask", "Who?"], 1, "none: no such file"),
        (["run", "demo", "-", "--state-out", "no/folder/x"], 1, "does not exist"),
        (["run", "demo", "-", "--state-out", "."], 1, "found a folder"),
        (["run", "demo", ".", "--ask", "Who?"], 1, "found a folder"),
        (["run", "demo", "-", "--ask", " "], 1, "the question is empty"),
        (["run"], 2, "armt run --help"),
        (["eval", "retrieval", "demo", "--pairs", "ten"], 1, "--pairs"),
        (["eval", "babilong", "demo", "--lengths", "4 km"], 1, "4 km"),
        (["eval", "babilong", "demo", "--data", "nowhere"], 1, "nowhere"),
        (["eval", "perplexity", "demo", "--data", "nowhere"], 1, "nowhere: no such file"),
        (["bench", "nothing"], 1, "nothing: no such file or folder"),
        (["convert", "nowhere", "out"], 1, "nowhere"),
        (["convert", "demo", "out", "--dtype", "int3"], 1, "int3"),
    ],
)
def test_bad_input_is_one_line(
    invoke: Invoke,
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = invoke(*arguments)
    assert (found, out) == (code, "")
    assert err.startswith("armt: ") and message in err and err.count("\n") == 1
    found, out, err = invoke(*arguments, "--json")
    assert found == code and message in json.loads(out)["error"]["message"]
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_one_line(invoke: Invoke, tmp_path: Path) -> None:
    shutil.copytree(resolve("retrieval"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    (norm,) = (entry for name, entry in header.items() if name.endswith("ln_f.weight"))
    first, last = (8 + size + offset for offset in norm["data_offsets"])
    data[first:last] = b"\x00\x7c" * ((last - first) // 2)  # infinities in float16
    file.write_bytes(data)
    code, _, err = invoke("eval", "retrieval", str(tmp_path), "--pairs", "2", "--samples", "2")
    assert code == 1 and "not finite" in err and "Traceback" not in err, err


def test_a_folder_that_is_no_checkpoint(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    code, out, err = invoke("info", tmp_path, "--json")
    assert code == 1 and json.loads(out)["error"]["type"] == "CheckpointError"
    assert err.count("\n") == 1 and str(tmp_path) in err


def test_long_messages_are_cut() -> None:
    assert one_line("a\n  b\n\nc\n") == "a b c"
    assert len(one_line("word\n" * 1000)) < 700


def test_sizes() -> None:
    found = [size(n) for n in (0, 1023, 1024, 10240, 1536 * 1024, 5 * 2**40)]
    assert found == ["0 bytes", "1,023 bytes", "1.0 KiB", "10 KiB", "1.5 MiB", "5,120 GiB"]


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with pytest.raises(KeyboardInterrupt), whole_file(target) as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with whole_file(target) as path:
        path.write_text("whole")
    assert target.read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------ the commands


def test_demo(invoke: Invoke) -> None:
    code, out, err = invoke("demo", "--tokens", 8000, "--questions", 6, "--device", "cpu")
    assert code == 0 and out.count("Where is") == 6
    assert "6 of 6 right" in out or "5 of 6 right" in out
    assert "read back unchanged" in out and "What this shows" in out
    assert "tokens/s" in out and "CPU" in out and "float32" in out
    assert err.count("\n") == 1, "a progress bar in a pipe"
    code, out, err = invoke("demo", "--tokens", 8000, "--questions", 6, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["passed"] and found["asked"] == 6
    assert found["device"] == "cpu" and found["dtype"] == "float32"


def test_info(invoke: Invoke) -> None:
    code, out, _ = invoke("info", "demo")
    assert code == 0 and "modern" in out and "256 tokens" in out and "d_model 128" in out
    code, out, _ = invoke("info", "babilong", "--json")
    assert code == 0 and json.loads(out)["segment_size"] == 256


def test_large_weights_are_read_behind_a_bar(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "converting" not in invoke("convert", "demo", tmp_path / "a")[2]
    monkeypatch.setattr(loading, "LARGE", 0)
    assert "converting" not in invoke("convert", "demo", tmp_path / "b")[2], "a bar in a pipe"
    monkeypatch.setenv("FORCE_COLOR", "1")  # how rich is told that this is a terminal
    code, _, err = invoke("convert", "demo", tmp_path / "c")
    assert code == 0 and "converting" in err and "MiB" in err
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] == files[2]


def test_convert(invoke: Invoke, tmp_path: Path) -> None:
    code, out, err = invoke("convert", "demo", tmp_path / "new", "--dtype", "bfloat16")
    assert (code, out) == (0, f"{tmp_path / 'new'}\n") and "bfloat16" in err
    code, out, _ = invoke("info", tmp_path / "new", "--json")
    assert json.loads(out)["weights"]["dtype"] == "bfloat16"
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["text"]["prompt_format"] == " {question}<gen>"
    code, _, err = invoke("convert", "demo", tmp_path / "new")
    assert code == 1 and "exists already" in err


def test_run_answers_from_a_file(invoke: Invoke, book: Path) -> None:
    needs_tokenizers()
    ask = ["--ask", "Where is Mary?", "--ask", "Where is John?"]
    code, out, err = invoke("run", "demo", book, *ask)
    assert code == 0 and out == "> Where is Mary?\noffice\n> Where is John?\ngarden\n"
    assert "CPU" in err and "float32" in err and "tokens/s" in err
    code, out, err = invoke("run", "demo", book, *ask, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert [a["answer"] for a in found["answers"]] == ["office", "garden"]
    assert found["tokens"] > 4000


def test_run_saves_and_goes_on(invoke: Invoke, book: Path, tmp_path: Path) -> None:
    needs_tokenizers()
    state, more = tmp_path / "book.state", tmp_path / "more.txt"
    more.write_text("\nMary went back to the kitchen.\n")
    assert invoke("run", "demo", book, "--state-out", state)[0] == 0
    saved = state.read_bytes()
    ask = ["--ask", "Where is Mary?"]
    assert invoke("run", "demo", "--state-in", state, *ask)[1].endswith("\noffice\n")
    assert invoke("run", "demo", more, "--state-in", state, *ask)[1].endswith("\nkitchen\n")
    assert state.read_bytes() == saved
    state.write_bytes(saved[:100])
    code, out, err = invoke("run", "demo", "--state-in", state, *ask)
    assert (code, out) == (1, "") and err.count("\n") == 1


def test_run_with_another_prompt(invoke: Invoke, book: Path) -> None:
    needs_tokenizers()
    own = ["--prompt-format", " Where is {question}?<gen>", "--max-new-tokens", "1"]
    assert invoke("run", "demo", book, "--ask", "John", *own)[1] == "> John\ngarden\n"
    code, _, err = invoke("run", "demo", book, "--ask", "John", "--prompt-format", "no place")
    assert code == 1 and '"{question}"' in err


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty"), (b"a \xff b", "UTF-8"), (b" \n ", "empty")]
)
def test_run_on_what_is_no_text(
    invoke: Invoke, tmp_path: Path, content: bytes, message: str
) -> None:
    needs_tokenizers()
    (tmp_path / "x").write_bytes(content)
    code, out, err = invoke("run", "demo", tmp_path / "x", "--ask", "Where is Mary?")
    assert (code, out) == (1, "") and message in err.splitlines()[-1]


def test_run_reads_standard_input_as_it_reads_a_file(book: Path) -> None:
    needs_tokenizers()
    ask = ["--ask", "Where is Mary?", "--json"]
    pipe = subprocess.Popen([*ARMT, "run", "demo", "-", *ask], stdin=-1, stdout=-1, stderr=-1)
    out, err = pipe.communicate(book.read_bytes())
    file = subprocess.run([*ARMT, "run", "demo", str(book), *ask], capture_output=True, check=True)
    found, expected = json.loads(out), json.loads(file.stdout)
    assert pipe.returncode == 0 and err == b""
    assert found["answers"] == expected["answers"]
    assert found["tokens"] == expected["tokens"]


MEASURED = """
import sys
from armt.cli.app import run
from armt.demo.exam import peak_memory
code = run(sys.argv[1:])
print(peak_memory(), file=sys.stderr)
sys.exit(code)
"""


def test_a_pipe_of_any_length_is_read_in_constant_memory(book: Path) -> None:
    needs_tokenizers()
    # Else the C library makes more or fewer heaps, as threads happen to meet.
    one_heap = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    peaks = []
    for times in (10, 80):  # a quarter of a megabyte, two megabytes
        process = subprocess.Popen(
            [sys.executable, "-c", MEASURED, "run", "demo", "-", "--ask", "Where is Mary?"],
            stdin=-1,
            stdout=-1,
            stderr=-1,
            env=one_heap,
        )
        out, err = process.communicate(book.read_bytes() * times)
        assert process.returncode == 0 and out.endswith(b"office\n")
        peaks.append(int(err.split()[-1]))
    assert peaks[1] < peaks[0] * 1.02 + 1_000_000


# ------------------------------------------------------------------ signals and terminals


def wait_for(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_ctrl_c_ends_the_demo() -> None:
    process = subprocess.Popen([*ARMT, "demo", "--tokens", "2000000000"], stdout=-1, stderr=-1)
    assert process.stderr is not None
    assert b"model" in process.stderr.readline()  # it runs
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == b"" and err == b"armt: interrupted\n"


def test_ctrl_c_leaves_no_state_file(tmp_path: Path) -> None:
    needs_tokenizers()
    arguments = ["run", "demo", "-", "--state-out", str(tmp_path / "state")]
    process = subprocess.Popen([*ARMT, *arguments], stdin=-1, stdout=-1, stderr=-1)
    assert process.stdin is not None and process.stderr is not None
    assert b"model" in process.stderr.readline()
    process.stdin.write(b"It was late. " * 20_000)
    process.stdin.flush()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == b"armt: interrupted\n"
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run([*ARMT, "info", "demo"], stdout=write, stderr=-1, check=False)
    os.close(write)
    assert process.returncode == 1 and process.stderr == b""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
def test_a_terminal_shows_a_bar() -> None:
    import pty

    main, side = pty.openpty()
    environment: dict[str, Any] = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "110"}
    process = subprocess.Popen(
        [*ARMT, "demo", "--tokens", "60000"], stdout=side, stderr=side, env=environment
    )
    os.close(side)
    shown = b""
    try:
        while part := os.read(main, 65536):
            shown += part
    except OSError:  # how Linux says that the other side has closed
        pass
    os.close(main)
    assert process.wait(timeout=60) == 0
    assert b"reading" in shown and b"100%" in shown and b"60,000 tokens" in shown
    assert b"What it remembers" in shown
