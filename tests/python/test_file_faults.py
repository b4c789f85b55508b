"""Every file operation of the Python part fails once: a typed error, old files whole, no leak."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import armt
from armt.checkpoint import export_folder, load_checkpoint
from armt.errors import CheckpointError
from armt.files import whole_file
from armt.scale import FolderStore
from armt.scale.worker import Held, Worker
from armt.session import Session
from checkpoint_files import save_hub
from file_faults import ERRORS, closed, descriptors, failing, points
from reference.random_models import random_model
from variants import VARIANTS, Zoo

VARIANT = next(v for v in VARIANTS if v.name == "modern-llama")
EVER = 1_000_000


def each_fault(count: int) -> Iterator[tuple[str, int, int]]:
    """Each of ``count`` operations alone with each kind of error, and with all that follow."""
    for first in range(1, count + 1):
        for kind in ERRORS:
            yield kind, first, first
        yield "input/output", first, EVER


def logits_of(engine: armt.Engine) -> bytes:
    ids = np.arange(3 * engine.segment_size) % engine.vocab_size
    return engine.forward(ids[None], logits="last").logits.tobytes()


def save_native(folder: Path) -> Path:
    spec = random_model(base="llama", dialect="modern")
    source = spec.save(folder.parent / "source")
    (source / "tokenizer.json").write_text("{}")
    return export_folder(load_checkpoint(source), folder)


SAVERS: dict[str, Callable[[Path], Path]] = {
    "raw": lambda folder: random_model(base="gpt2", dialect="paper").save(folder),
    "hub, sharded": lambda folder: save_hub(
        folder, random_model(base="llama", dialect="modern"), shards=3
    ),
    "exported": save_native,
}


@pytest.mark.parametrize("kind", SAVERS)
def test_loading(tmp_path: Path, kind: str) -> None:
    folder = SAVERS[kind](tmp_path / "model")

    def load() -> armt.Engine:
        return armt.Engine.from_pretrained(folder, device="cpu", threads=1)

    want = logits_of(load())
    count = len(points(load))
    assert count >= 3
    opened = descriptors()
    for error, first, last in each_fault(count):
        with failing(ERRORS[error], first, last), pytest.raises((CheckpointError, MemoryError)):
            load()
        assert closed(opened), (error, first, last)
    assert logits_of(load()) == want


def test_exporting(tmp_path: Path) -> None:
    source = SAVERS["exported"](tmp_path / "first")
    checkpoint = load_checkpoint(source)
    want = logits_of(armt.Engine.from_pretrained(source, device="cpu", threads=1))
    names = points(lambda: export_folder(checkpoint, tmp_path / "whole"))
    assert {"open", "os.mkdir", "os.rename", "os.fsync", "file.write"} <= set(names)
    opened = descriptors()
    for number, (error, first, last) in enumerate(each_fault(len(names))):
        out = tmp_path / f"out-{number}"
        failed = True
        with failing(ERRORS[error], first, last):
            try:
                export_folder(checkpoint, out)
                failed = False
            except (CheckpointError, MemoryError):
                pass
        # A parent that is there need not be made; a copy can be made by reading and writing.
        recovers = first == last and names[first - 1] in ("os.mkdir", "os.fstat", "os.sendfile")
        assert failed or recovers, (error, first, last)
        assert closed(opened), (error, first, last)
        left = [*tmp_path.glob(".out-*")]
        if first == last:
            assert not left, "what was begun is taken away again"
        if out.exists():  # only the very last operations come after it is complete
            assert recovers or first > names.index("os.rename") + 1
            engine = armt.Engine.from_pretrained(out, device="cpu", threads=1)
            assert logits_of(engine) == want and (out / "tokenizer.json").is_file()
        for folder in left:
            shutil.rmtree(folder)
    assert export_folder(checkpoint, tmp_path / "another").is_dir()


def test_writing_into_the_shared_store(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    names = points(lambda: store.put("warm", b"x", expected=0))
    assert {"open", "os.open", "os.fsync", "os.replace", "file.write"} <= set(names)
    count = len(points(lambda: store.put("warm", b"y", expected=1)))
    assert count >= len(names)
    old, new = b"old" * 1000, b"new" * 1000
    opened = descriptors()
    for number, (error, first, last) in enumerate(each_fault(count)):
        name = f"s{number}"
        store.put(name, old, expected=0)
        with failing(ERRORS[error], first, last), pytest.raises((OSError, MemoryError)):
            store.put(name, new, expected=1)
        held = store.get(name)
        assert (held.version, held.data) in ((1, old), (2, new)), (error, first, last)
        assert closed(opened), (error, first, last)
        left = [*tmp_path.glob(".write-*")]
        assert not left or first != last, (error, first)
        for file in left:
            file.unlink()
        assert store.put(name, new, expected=held.version) == held.version + 1


def test_a_first_write_into_the_shared_store(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    count = len(points(lambda: store.put("warm", b"x", expected=0)))
    for number, (error, first, last) in enumerate(each_fault(count)):
        name = f"s{number}"
        with failing(ERRORS[error], first, last), pytest.raises((OSError, MemoryError)):
            store.put(name, b"new", expected=0)
        assert store.version(name) == 0 or store.get(name).data == b"new"
        assert name not in store.ids() or store.version(name) == 1


@pytest.mark.parametrize("call", ["get", "version", "delete"])
def test_the_other_calls_of_the_shared_store(tmp_path: Path, call: str) -> None:
    store = FolderStore(tmp_path)
    store.put("a", b"data", expected=0)
    store.put("other", b"data", expected=0)
    count = len(points(lambda: getattr(store, call)("other")))
    assert count >= 2
    opened = descriptors()
    for error, first, last in each_fault(count):
        expected = (OSError, MemoryError)
        with failing(ERRORS[error], first, last), pytest.raises(expected):
            getattr(store, call)("a")
        assert store.get("a").data == b"data" and store.ids()[0] == "a"
        assert closed(opened), (error, first, last)
    with failing(ERRORS["input/output"], 1, EVER), pytest.raises(armt.InvalidArgument):
        FolderStore(tmp_path / "another")


def test_a_worker_does_each_request_once(tmp_path: Path, zoo: Zoo) -> None:
    engine = zoo.engine(VARIANT, threads=1)
    worker, held = Worker(engine, FolderStore(tmp_path)), Held("a")
    ids = list(range(engine.segment_size + 1))
    worker.create("a")

    def feed(session: Session) -> dict[str, object]:
        session.feed(ids)
        return {}

    worker.change(held, "first", feed)
    count = len(points(lambda: worker.change(held, "second", feed)))
    assert count >= 5
    done = 2
    for error, first, last in each_fault(count):
        request = f"{error} {first} {last}"
        with failing(ERRORS[error], first, last), pytest.raises((OSError, MemoryError)):
            worker.change(held, request, feed)
        answer = worker.change(held, request, feed)
        done += 1
        assert answer["tokens"] == done * len(ids), (error, first, last)
    want = engine.session()
    want.feed(ids * done)
    found = worker.look(held)
    assert (found["tokens"], found["segments"]) == (want.tokens, want.segments)
    assert held.session is not None
    assert held.session.logits.tobytes() == want.logits.tobytes()


def test_an_output_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    target.write_text("old")

    def write() -> None:
        with whole_file(target) as path:
            path.write_text("new")

    names = points(write)
    assert "os.replace" in names
    for error, first, last in each_fault(len(names)):
        target.write_text("old")
        with failing(ERRORS[error], first, last), pytest.raises((OSError, MemoryError)):
            write()
        assert target.read_text() == ("new" if first > names.index("os.replace") + 1 else "old")
        if first == last < len(names):
            assert [*tmp_path.iterdir()] == [target], (error, first)
        for left in set(tmp_path.iterdir()) - {target}:
            left.unlink()
