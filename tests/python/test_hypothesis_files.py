"""Random files and sequences through the Python face: typed errors only, and sessions unharmed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import armt
import state_format as sf
from reference.random_models import random_model
from variants import VARIANTS, Zoo

QUIET = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
VARIANT = next(v for v in VARIANTS if v.name == "modern-llama-sliding-sink")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint that loads."""
    path: Path = tmp_path_factory.mktemp("hypothesis") / "model"
    random_model(base="llama", dialect="modern").save(path)
    armt.Engine.from_pretrained(path, device="cpu", threads=1)
    return path


def attempt(path: Path) -> None:
    """Loads and reads a token: anything but a typed error is a fault."""
    try:
        engine = armt.Engine.from_pretrained(path, device="cpu", threads=1)
        engine.step([0])
    except (armt.CheckpointError, armt.InvalidArgument, ArithmeticError) as error:
        assert len(str(error)) < 100_000


CHANGES = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=4)


@QUIET
@given(changes=CHANGES, cut=st.none() | st.integers(0, 2**20))
def test_changed_weights_files(
    folder: Path, tmp_path: Path, changes: list[tuple[int, int]], cut: int | None
) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for at, value in changes:
        data[at % header] = value  # the header: bytes of the data are numbers, whatever they are
    if cut is not None:
        del data[cut % len(data) :]
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    attempt(tmp_path)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["gpt2", "paper", "modern", "rmt", 0, -1, 2**31, 2**63, 1e309]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


def paths_of(tree: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The keys that lead to every value of a nested dict."""
    if not isinstance(tree, dict):
        return [at]
    found = [at] if at else []
    for key, value in tree.items():
        found += paths_of(value, (*at, key))
    return found


@settings(QUIET, max_examples=300)
@given(data=st.data(), value=JSON_VALUES)
def test_changed_configurations(
    folder: Path, tmp_path: Path, data: st.DataObject, value: Any
) -> None:
    config = json.loads((folder / "config.json").read_text())
    path = data.draw(st.sampled_from(paths_of(config)))
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    if not weights.exists():
        weights.symlink_to(folder / "model.safetensors")
    attempt(tmp_path)


@QUIET
@given(text=st.binary(max_size=200))
def test_configurations_of_bytes(folder: Path, tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    attempt(tmp_path)


COUNTERS = st.dictionaries(
    st.sampled_from(sf.COUNTER_NAMES[:4]), st.integers(-(2**63), 2**63 - 1), max_size=3
)


@QUIET
@given(counters=COUNTERS, drop=st.integers(-1, 12), payload=st.binary(max_size=64))
def test_changed_states(zoo: Zoo, counters: dict[str, int], drop: int, payload: bytes) -> None:
    engine = zoo.engine(VARIANT, threads=1)
    session = engine.session()
    session.feed(np.arange(engine.segment_size + 2) % engine.vocab_size)
    blocks = sf.parse(session.state.to_bytes())
    if 0 <= drop < len(blocks):
        if payload:
            blocks[drop] = sf.Block(blocks[drop].type, blocks[drop].layer, payload)
        else:
            del blocks[drop]
    if counters and any(b.type == sf.COUNTERS and len(b.payload) == 56 for b in blocks):
        blocks = sf.with_counters(blocks, **counters)
    with contextlib.suppress(armt.StateError, armt.InvalidArgument, ArithmeticError):
        engine.session(state=armt.State.from_bytes(sf.seal(blocks))).feed([1, 2])
    assert session.tokens == engine.segment_size + 2


TOKENS: Any = (
    st.lists(st.integers(-3, 70), max_size=12)
    | st.lists(st.floats(), max_size=3)
    | st.lists(st.integers(-(2**70), 2**70), max_size=3)
    | st.sampled_from([None, "text", b"bytes", 3, 2.5, [[1, 2]], [[]], {1, 2}, [None], [True]])
)


@QUIET
@given(tokens=TOKENS)
def test_inputs_of_any_kind(zoo: Zoo, tokens: Any) -> None:
    engine = zoo.engine(VARIANT, threads=1)
    for name in ("feed", "step", "score"):
        session = engine.session()
        session.feed([1, 2, 3])
        before = session.state.to_bytes()
        try:
            getattr(session, name)(tokens)
        except (ValueError, TypeError):
            assert session.state.to_bytes() == before


class Streams(RuleBasedStateMachine):
    """A session beside the list of tokens that it has read."""

    zoo: Zoo

    @initialize()
    def begin(self) -> None:
        self.engine = self.zoo.engine(VARIANT, threads=1)
        self.session = self.engine.session()
        self.read: list[int] = []
        self.saved: list[tuple[armt.State, list[int]]] = []

    @rule(ids=st.lists(st.integers(0, 22), min_size=1, max_size=9))
    def feed(self, ids: list[int]) -> None:
        self.session.feed(ids)
        self.read += ids

    @rule(ids=st.lists(st.integers(0, 22), min_size=1, max_size=9))
    def ask(self, ids: list[int]) -> None:
        self.session.feed(ids, write=False)

    @rule(bad=st.sampled_from([-1, 10**6, 2**40]))
    def wrong(self, bad: int) -> None:
        with pytest.raises(ValueError):
            self.session.feed([1, bad])

    @precondition(lambda self: self.read)
    @rule(count=st.integers(1, 4), temperature=st.sampled_from([0.0, 0.9]))
    def generate(self, count: int, temperature: float) -> None:
        self.read += list(self.session.generate(count, temperature=temperature))

    @rule()
    def checkpoint(self) -> None:
        self.saved.append((self.session.checkpoint(), list(self.read)))

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        state, read = data.draw(st.sampled_from(self.saved))
        self.session.rollback(state)
        self.read = list(read)

    @rule()
    def through_bytes(self) -> None:
        state = armt.State.from_bytes(self.session.state.to_bytes())
        self.session = self.engine.session(state=state)
        self.saved = []

    @rule()
    def fork(self) -> None:
        old = self.session
        self.session = old.fork()
        old.close()
        self.saved = []

    @invariant()
    def counts_what_it_read(self) -> None:
        assert self.session.tokens == len(self.read)

    def teardown(self) -> None:
        if not getattr(self, "read", None):
            return
        fresh = self.engine.session()
        fresh.feed(self.read)
        assert np.array_equal(fresh.logits, self.session.logits)


def test_random_sequences(zoo: Zoo) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    Streams.zoo = zoo
    run_state_machine_as_test(
        Streams, settings=settings(max_examples=40, stateful_step_count=20, deadline=None)
    )
