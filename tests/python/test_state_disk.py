"""State files on the disk: which are taken, how they are replaced; and who may use a session."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import armt
from variants import VARIANTS, Zoo

KILLER = Path(__file__).resolve().parents[1] / "kill_saves.py"


@pytest.fixture
def engine(zoo: Zoo) -> armt.Engine:
    return zoo.engine(VARIANTS[0])


@pytest.fixture
def session(engine: armt.Engine) -> Iterator[armt.Session]:
    """Whatever happens to files, the session stays as it is."""
    session = engine.session()
    session.feed([1, 2, 3] * 5)
    before = session.state.to_bytes()
    yield session
    assert session.state.to_bytes() == before


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_link(path: Path) -> None:
    (path.parent / "aim").write_bytes(b"precious")
    path.symlink_to("aim")


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name may not be long
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "folder": (Path.mkdir, "a folder"),
    "fifo": (make_fifo, "a named pipe"),
    "link": (make_link, "a symbolic link"),
    "dangling-link": (make_dangling_link, "a symbolic link"),
    "socket": (make_socket, "a socket"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_are_neither_read_nor_replaced(
    session: armt.Session, tmp_path: Path, kind: str
) -> None:
    make, name = ODD[kind]
    path = tmp_path / "state"
    make(path)
    before = sorted((p.name, p.lstat().st_ino, p.lstat().st_mode) for p in tmp_path.iterdir())
    with pytest.raises(armt.StateError, match=f"{path}: found {name}, expected a state file"):
        armt.State.load(path)
    with pytest.raises(armt.StateError, match=f"{path}: found {name} there.*nothing was written"):
        session.state.save(path)
    after = sorted((p.name, p.lstat().st_ino, p.lstat().st_mode) for p in tmp_path.iterdir())
    assert after == before
    if kind == "link":
        assert (tmp_path / "aim").read_bytes() == b"precious"


def test_a_link_to_a_state_is_not_followed(session: armt.Session, tmp_path: Path) -> None:
    session.state.save(tmp_path / "aim")
    (tmp_path / "link").symlink_to("aim")
    with pytest.raises(armt.StateError, match="symbolic link"):
        armt.State.load(tmp_path / "link")


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/", ".", ".."])
def test_devices_and_folders(session: armt.Session, path: str) -> None:
    with pytest.raises(armt.StateError, match=r"found a (device|folder)"):
        armt.State.load(path)
    with pytest.raises(armt.StateError, match=r"found a (device|folder)"):
        session.state.save(path)


def test_files_that_hold_no_state(session: armt.Session, tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(armt.StateError, match="No such file"):
        armt.State.load(path)
    path.touch()
    with pytest.raises(armt.StateError, match="it is empty"):
        armt.State.load(path)
    path.write_text("Once upon a time there was a segment that would not close.")
    with pytest.raises(armt.StateError, match="file of another kind"):
        armt.State.load(path)
    with pytest.raises(armt.StateError, match=r"its folder.*No such file"):
        session.state.save(tmp_path / "absent" / "state")
    with pytest.raises(armt.StateError, match=r"its folder.*Not a directory"):
        session.state.save(path / "state")
    for empty in ("", b""):
        with pytest.raises(armt.StateError, match="empty"):
            armt.State.load(empty)
        with pytest.raises(armt.StateError, match="empty"):
            session.state.save(empty)
    for bad in ("zero\0byte", b"zero\0byte"):
        with pytest.raises(armt.InvalidArgument, match="zero byte"):
            armt.State.load(bad)
    for wrong in (None, 7, [path]):
        with pytest.raises(TypeError):
            armt.State.load(wrong)
    with pytest.raises(armt.StateError, match="too long"):
        session.state.save(tmp_path / ("x" * 300))
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
def test_unreadable_files(session: armt.Session, tmp_path: Path) -> None:
    path = tmp_path / "state"
    session.state.save(path)
    path.chmod(0)
    with pytest.raises(armt.StateError, match="Permission denied"):
        armt.State.load(path)
    tmp_path.chmod(0o500)
    with pytest.raises(armt.StateError, match="Permission denied"):
        session.state.save(tmp_path / "new")
    tmp_path.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_unreadable_to_somebody_else(session: armt.Session, tmp_path: Path) -> None:
    """As the test above, when the tests run as root: in a child that gives up its rights."""
    path = tmp_path / "state"
    session.state.save(path)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder.name.startswith(("pytest", tmp_path.name)):
            folder.chmod(folder.stat().st_mode | 0o055)
    state = session.state
    state.to_bytes()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            refused = 0
            for use in (lambda: armt.State.load(path), lambda: state.save(tmp_path / "new")):
                try:
                    use()
                except armt.StateError as error:
                    refused += "Permission denied" in str(error)
            code = 0 if refused == 2 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
def test_mode_and_names(session: armt.Session, tmp_path: Path, mask: int) -> None:
    """0600 whatever the umask and the old file's mode; any name that the system allows."""
    old = os.umask(mask)
    try:
        for name in ("state", "Zustand é 😀", os.fsdecode(b"not-utf8-\xff")):
            path = tmp_path / name
            for _ in range(2):
                session.state.save(path)
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                path.chmod(0o644)
            assert armt.State.load(path).tokens == session.tokens
            assert armt.State.load(os.fsencode(path)).tokens == session.tokens
    finally:
        os.umask(old)
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        session.state.save("beside")
        assert armt.State.load("./beside").tokens == session.tokens
    finally:
        os.chdir(here)


def test_a_file_is_replaced_not_rewritten(session: armt.Session, tmp_path: Path) -> None:
    """Whoever has the old file open, or another name for it, keeps the old content."""
    path, other = tmp_path / "state", tmp_path / "other"
    path.write_bytes(b"old content")
    os.link(path, other)
    with path.open("rb") as reader:
        session.state.save(path)
        assert reader.read() == b"old content"
    assert other.read_bytes() == b"old content"
    assert path.read_bytes() == session.state.to_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "state"]


def test_a_full_disk_leaves_the_old_file(session: armt.Session, tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old content")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    state = session.state
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(armt.StateError, match="cannot be written: File too large"):
            state.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == b"old content"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_savers_and_readers_at_once(engine: armt.Engine, tmp_path: Path) -> None:
    """Threads save different states over one file while others load it: always a whole one."""
    path = tmp_path / "state"
    contents = []
    for count in (5, 50):
        session = engine.session()
        session.feed([1] * count)
        contents.append(session.state.to_bytes())
    states = [armt.State.from_bytes(content) for content in contents]
    states[0].save(path)
    wrong: list[str] = []

    def save(state: armt.State) -> None:
        for _ in range(50):
            state.save(path)

    def read() -> None:
        for _ in range(200):
            if armt.State.load(path).to_bytes() not in contents:
                wrong.append("torn")

    threads = [threading.Thread(target=save, args=(s,)) for s in states]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_kill_during_save(tmp_path: Path, long_run: bool) -> None:
    """Old file or new file, never torn; --long-run kills 1,000 times."""
    kills = 1000 if long_run else 40
    found = subprocess.run(
        [sys.executable, str(KILLER), "--kills", str(kills)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    report = json.loads(found.stdout)
    assert report["kills"] == kills
    assert report["torn"] == 0
    assert report["first"] > 0 and report["second"] > 0
    assert report["inside"] > kills // 10, "too few kills fell into a save to say anything"


# ------------------------------------------------------------------------------ whose state


def test_rollback_to_what_is_no_checkpoint_of_this_session(
    session: armt.Session, engine: armt.Engine, tmp_path: Path
) -> None:
    session.state.save(tmp_path / "state")
    loaded = armt.State.load(tmp_path / "state")
    fork = session.fork()
    for state in (
        loaded,
        armt.State.from_bytes(session.state.to_bytes()),
        fork.checkpoint(),
        engine.session(state=loaded).checkpoint(),
    ):
        with pytest.raises(armt.StateError, match=r"rollback: the (checkpoint|state)"):
            session.rollback(state)
    for other in (b"bytes", None, fork):
        with pytest.raises(armt.StateError, match="expected what checkpoint"):
            session.rollback(other)  # type: ignore[arg-type]
    for wrong in (b"bytes", tmp_path / "state", fork):
        with pytest.raises(armt.StateError, match=r"expected an armt\.State"):
            engine.session(state=wrong)  # type: ignore[arg-type]


def test_a_state_outlives_its_session_and_engine(zoo: Zoo, tmp_path: Path) -> None:
    engine = armt.Engine.from_pretrained(zoo.path(VARIANTS[0]), device="cpu")
    session = engine.session()
    session.feed([1, 2, 3] * 9)
    state, data = session.state, session.state.to_bytes()
    session.close()
    with pytest.raises(armt.StateError, match="closed"):
        session.rollback(state)
    with pytest.raises(armt.StateError, match="closed"):
        session.checkpoint()
    del session, engine
    assert state.to_bytes() == data
    state.save(tmp_path / "state")
    assert armt.State.load(tmp_path / "state").to_bytes() == data


def test_states_while_the_session_reads(engine: armt.Engine, tmp_path: Path) -> None:
    """From another thread: the session itself refuses, its states and other sessions work."""
    session = engine.session()
    session.feed([1, 2, 3])
    state = session.state
    data = state.to_bytes()
    ids = np.ones(400_000, np.int32)
    busy, seen = threading.Event(), threading.Event()

    def hold(done: int) -> None:
        busy.set()
        seen.wait(30)

    reader = threading.Thread(target=lambda: session.feed(ids, progress=hold))
    reader.start()
    assert busy.wait(30)
    refused: list[Any] = []
    try:
        for use in (
            lambda: session.state,
            session.checkpoint,
            session.fork,
            session.reset,
            session.close,
            lambda: session.rollback(state),
            lambda: session.feed([1]),
        ):
            with pytest.raises(armt.StateError, match="in use by another thread") as error:
                use()
            refused.append(error)
        state.save(tmp_path / "state")
        other = engine.session(state=armt.State.load(tmp_path / "state"))
        assert other.state.to_bytes() == data
        other.feed([4])
    finally:
        seen.set()
        reader.join()
    assert len(refused) == 7
    assert session.tokens == len(ids) + 3
    session.rollback(state)
    assert session.tokens == 3


def test_many_threads_use_one_state(engine: armt.Engine) -> None:
    """A state never changes, so threads may save it, look at it and start sessions from it."""
    session = engine.session()
    session.feed([1, 2, 3] * 6)
    state, data = session.state, session.state.to_bytes()
    expected = session.fork().feed([5, 6], logits="all").logits
    assert expected is not None
    wrong: list[str] = []

    def use(loaded: armt.State) -> None:
        for _ in range(50):
            found = engine.session(state=loaded).feed([5, 6], logits="all").logits
            if found is None or found.tobytes() != expected.tobytes():
                wrong.append("logits")
            if loaded.to_bytes() != data:
                wrong.append("bytes")

    states = [state, state, armt.State.from_bytes(data), state]
    threads = [threading.Thread(target=use, args=(s,)) for s in [*states, states[2]]]
    for thread in threads:
        thread.start()
    session.feed([7] * 50)
    for thread in threads:
        thread.join()
    assert not wrong


def test_loading_runs_no_code(tmp_path: Path) -> None:
    """Nothing but the extension reads a state: no pickle, no import."""
    program = """
        import sys, armt
        before = set(sys.modules)
        for data in (b"", b"\\x80\\x04cos\\nsystem\\n(S'false'\\ntR."):
            try:
                armt.State.from_bytes(data)
            except armt.StateError:
                pass
        print(set(sys.modules) - before)
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert found.stdout.strip() == "set()", found.stderr
