"""Saved states go on where they were, with the same bits, in another process."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import armt
import state_format as sf
from state_child import Case, continue_session, write_manifest
from variants import VARIANTS, Variant, Zoo

VARIANT = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
CHILD = Path(__file__).resolve().parents[1] / "state_child.py"
DRAWS = 6


def resume_elsewhere(folder: Path, cases: list[Case]) -> None:
    """Every case in one other process; AssertionError that names those that differ."""
    manifest = folder / "manifest.json"
    write_manifest(manifest, cases)
    found = subprocess.run(
        [sys.executable, str(CHILD), str(manifest)], capture_output=True, text=True, cwd=folder
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == f"{len(cases)} cases"


def make_case(
    session: armt.Session, model: Path, folder: Path, name: str, follow: list[int]
) -> Case:
    """Saves the session, then goes on with it and keeps what came out."""
    state, logits, after = (folder / f"{name}.{end}" for end in ("state", "npy", "after"))
    before = session.state.to_bytes()
    session.feed(follow, write=False)
    session.score(follow, write=False)
    list(session.generate(3, temperature=1.0, write=False)) if session.tokens else None
    assert session.state.to_bytes() == before, f"{name}: a read-only question left a trace"
    session.state.save(state)
    assert state.read_bytes() == before
    rows, drawn, end = continue_session(session, follow, DRAWS)
    np.save(logits, np.frombuffer(rows, np.float32))
    after.write_bytes(end)
    return Case(name, str(model), str(state), follow, DRAWS, str(logits), drawn, str(after))


@pytest.mark.parametrize("weights", ["F32", "BF16"])
def test_every_point_of_a_segment_in_a_new_process(zoo: Zoo, tmp_path: Path, weights: str) -> None:
    """Empty, all open-token counts of the first and the second segment, and closed by hand."""
    cases = []
    for variant in VARIANTS if weights == "F32" else VARIANTS[:16:5]:
        engine = zoo.engine(variant, weights=weights, threads=2)
        model = zoo.path(variant, weights)
        size = engine.segment_size
        rng = np.random.default_rng(21)
        ids = rng.integers(0, engine.vocab_size, size=2 * size + 1)
        follow = rng.integers(0, engine.vocab_size, size=size + 3).tolist()
        for count in range(len(ids) + 1):
            session = engine.session(seed=count)
            if count:
                session.feed(ids[:count])
            name = f"{variant.name}-{count}"
            cases.append(make_case(session, model, tmp_path, name, follow))
        for count in (3, size, size + 3):  # a short segment in the window behind an empty one
            session = engine.session()
            session.feed(ids[:count])
            session.close_segment()
            name = f"{variant.name}-closed-{count}"
            cases.append(make_case(session, model, tmp_path, name, follow))
    resume_elsewhere(tmp_path, cases)


@VARIANT
def test_after_generating(zoo: Zoo, tmp_path: Path, variant: Variant) -> None:
    """The sampler's seed and position, and a segment grown past its size, are part of the state."""
    engine = zoo.engine(variant)
    session = engine.session(seed=2**64 - 1)
    session.feed(zoo.model(variant).tokens((1, 10), seed=1)[0])
    list(session.generate(5, temperature=1.2))
    grown = session.fork()
    loaded = engine.session(state=armt.State.from_bytes(session.state.to_bytes()))
    assert list(loaded.generate(9, temperature=1.2)) == list(session.generate(9, temperature=1.2))
    assert loaded.state.to_bytes() == session.state.to_bytes()

    list(grown.generate(7, rollover=False))
    assert grown.open_tokens > engine.segment_size
    grown.state.save(tmp_path / "grown")
    back = engine.session(state=armt.State.load(tmp_path / "grown"))
    follow = [1, 2, 3]
    a, b = grown.feed(follow, logits="all"), back.feed(follow, logits="all")
    assert a.logits is not None and b.logits is not None
    assert a.logits.tobytes() == b.logits.tobytes()
    assert grown.state.to_bytes() == back.state.to_bytes()


@VARIANT
def test_the_content_is_as_documented(zoo: Zoo, variant: Variant) -> None:
    """Read back by a reader of its own: blocks, shapes and values."""
    engine = zoo.engine(variant)
    size = engine.segment_size
    ids = zoo.model(variant).tokens((1, size + 4), seed=2)[0]
    session = engine.session(seed=77)
    session.feed(ids)
    state = session.state
    data = state.to_bytes()
    blocks = sf.parse(data)
    assert sf.seal(blocks) == data
    facts = sf.read_facts(sf.payload_of(blocks, sf.FACTS))
    assert facts == state.facts
    assert facts["weights.dtype"] == "float32"
    counters = struct.unpack("<4q3Q", sf.payload_of(blocks, sf.COUNTERS))
    window = size if facts["memory.sliding_window"] else 0
    assert counters[:2] == (size + 4, 1) and counters[3:] == (window, state.version, 77, 0)
    assert np.frombuffer(sf.payload_of(blocks, sf.OPEN_TOKENS), "<i4").tolist() == list(ids[size:])
    previous = np.frombuffer(sf.payload_of(blocks, sf.PREVIOUS_TOKENS), "<i4")
    assert previous.tolist() == list(ids[:size])
    kinds = {(b.type, b.layer) for b in blocks if b.layer != sf.NO_LAYER}
    per_layer = {sf.CURRENT}
    if state.memory_tokens is None:
        per_layer.add(sf.MEMORY)
        for layer in range(state.layers):
            a, z = state.memory(layer)
            raw = a.tobytes() + (b"" if z is None else z.tobytes())
            assert sf.payload_of(blocks, sf.MEMORY, layer)[:-16] == raw
    else:
        assert sf.payload_of(blocks, sf.CARRIED) == state.memory_tokens.tobytes()
    if window:
        per_layer.add(sf.PREVIOUS)
    assert kinds == {(kind, layer) for kind in per_layer for layer in range(state.layers)}


@VARIANT
def test_loaded_states_answer_like_live_ones(zoo: Zoo, tmp_path: Path, variant: Variant) -> None:
    engine = zoo.engine(variant)
    session = engine.session()
    session.feed(zoo.model(variant).tokens((1, 17), seed=3)[0])
    live = session.state
    live.save(tmp_path / "state")
    loaded = armt.State.load(tmp_path / "state")
    again = armt.State.from_bytes(loaded.to_bytes())
    for state in (loaded, again):
        assert (state.tokens, state.segments, state.version) == (17, live.segments, live.version)
        assert state.facts == live.facts
        assert state.open_tokens.tolist() == live.open_tokens.tolist()
        for layer in range(live.layers):
            assert state.written(layer) == live.written(layer)
            assert state.write_statistics(layer) == live.write_statistics(layer)
            for mine, other in zip(state.memory(layer), live.memory(layer), strict=True):
                assert (mine is None) == (other is None)
                if mine is not None and other is not None:
                    assert mine.tobytes() == other.tobytes()
        assert state.to_bytes() == live.to_bytes()


def test_from_bytes_takes_any_buffer(zoo: Zoo) -> None:
    session = zoo.engine(VARIANTS[0]).session()
    session.feed([1, 2, 3])
    data = session.state.to_bytes()
    for buffer in (data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
        assert armt.State.from_bytes(buffer).to_bytes() == data
    for other in ("text", None, 7, [1, 2]):
        with pytest.raises(armt.StateError, match="expected bytes"):
            armt.State.from_bytes(other)
