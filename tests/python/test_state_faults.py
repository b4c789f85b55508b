"""Damaged and hostile states: a StateError that names the place, and nothing else is touched."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import armt
import state_format as sf
from state_format import Block
from variants import VARIANTS, Variant, Zoo

TINY = [
    Variant(
        "tiny-paper",
        base_options={"vocab_size": 11, "n_embd": 6, "n_layer": 1},
        armt_options={"d_mem": 1, "segment_size": 3, "sliding_window": True},
    ),
    Variant(
        "tiny-rmt",
        dialect="rmt",
        base_options={"vocab_size": 11, "n_embd": 6, "n_layer": 1},
        armt_options={"segment_size": 3},
    ),
]
# Every message says which part of the state is wrong.
PLACE = re.compile(
    r"state: (block '?[\w ]+'?|the sum of|it (does not begin|ends inside|is in big-endian)"
    r"|its byte order|written by format|found \d+ bytes|it is empty)"
)


@pytest.fixture(params=TINY, ids=lambda v: v.name)
def live(request: Any, zoo: Zoo) -> Iterator[armt.Session]:
    """A session with something in every block; it must be the same afterwards."""
    session = zoo.engine(request.param).session(seed=3)
    session.feed([1, 2, 3, 4, 5])
    before = session.state.to_bytes()
    clean = session.fork().feed([6, 7], logits="all").logits
    yield session
    assert session.state.to_bytes() == before
    after = session.feed([6, 7], logits="all").logits
    assert clean is not None and after is not None
    assert clean.tobytes() == after.tobytes()


def refuse(data: bytes) -> str:
    """The message of the error that these bytes must give."""
    with pytest.raises(armt.StateError) as found:
        armt.State.from_bytes(data)
    return str(found.value)


def test_every_truncation(live: armt.Session) -> None:
    data = live.state.to_bytes()
    assert len(data) < 4000
    for length in range(len(data)):
        assert PLACE.match(refuse(data[:length])), length


def test_every_bit_flip(live: armt.Session) -> None:
    data = live.state.to_bytes()
    flipped = bytearray(data)
    for bit in range(8 * len(data)):
        flipped[bit // 8] ^= 1 << bit % 8
        message = refuse(bytes(flipped))
        assert PLACE.match(message), f"bit {bit}: {message}"
        flipped[bit // 8] ^= 1 << bit % 8
    assert flipped == data


def test_flips_and_truncations_of_a_file(live: armt.Session, tmp_path: Path) -> None:
    """The same through load(), whose messages name the path; a sample, files are slow."""
    data = live.state.to_bytes()
    path = tmp_path / "state"
    for at in range(0, len(data), 7):
        broken = bytearray(data)
        broken[at] ^= 1 << at % 8
        for content in (bytes(broken), data[:at]):
            path.write_bytes(content)
            with pytest.raises(armt.StateError, match=re.escape(str(path))):
                armt.State.load(path)
    for more in (b"\0", data):
        path.write_bytes(data + more)
        with pytest.raises(armt.StateError, match="added behind its end"):
            armt.State.load(path)


def test_flips_of_facts_and_counters_under_right_sums(zoo: Zoo) -> None:
    """Refused on reading, or when the state meets the engine.

    Only counters may change unseen: they are values, not descriptions.
    """
    engine = zoo.engine(TINY[0])
    blocks = sf.parse(engine.session().state.to_bytes())
    assert [b.type for b in blocks] == [sf.FACTS, sf.COUNTERS]
    for index, block in enumerate(blocks):
        for bit in range(8 * len(block.payload)):
            payload = bytearray(block.payload)
            payload[bit // 8] ^= 1 << bit % 8
            changed = [*blocks]
            changed[index] = replace(block, payload=bytes(payload))
            try:
                session = engine.session(state=armt.State.from_bytes(sf.seal(changed)))
            except armt.StateError:
                continue
            assert block.type == sf.COUNTERS, f"bit {bit} of the facts"
            session.feed([1, 2, 3, 4])


def test_flips_of_block_heads_under_right_sums(live: armt.Session) -> None:
    blocks = sf.parse(live.state.to_bytes())
    head = struct.Struct("<IIQ")
    for index, block in enumerate(blocks):
        for bit in range(8 * head.size):
            raw = bytearray(head.pack(block.type, block.layer, len(block.payload)))
            raw[bit // 8] ^= 1 << bit % 8
            refuse(seal_with_head(blocks, index, head.unpack(raw)))


def seal_with_head(blocks: list[Block], index: int, head: tuple[int, int, int]) -> bytes:
    """A file in which one block's head says something else, all sums right."""
    before, after = sf.seal(blocks[:index])[32:-8], sf.seal(blocks[index + 1 :])[32:-8]
    raw = struct.pack("<IIQ", *head)
    payload = blocks[index].payload
    own = raw + struct.pack("<I", sf.crc32c(raw)) + payload
    own += struct.pack("<I", sf.crc32c(payload))
    return sf.seal([], count=len(blocks), tail=before + own + after)


def test_the_beginning(live: armt.Session) -> None:
    data = live.state.to_bytes()
    blocks = sf.parse(data)
    assert armt.State.from_bytes(sf.seal(blocks)).to_bytes() == data
    cases = {
        b"": "empty",
        b"\x80\x04\x95pickle": "does not begin like a state",
        b'{"format": "armt-1"}' * 9: "does not begin like a state",
        sf.seal(blocks, mark=0x04030201): "big-endian",
        sf.seal(blocks, mark=0x01020305): "byte order mark",
        sf.seal(blocks, version=2): "format 2; this build reads 1: update armt",
        sf.seal(blocks, version=0): "format 0",
        sf.seal(blocks, size_error=1): "cut short",
        sf.seal(blocks, size_error=-1): "added behind",
        sf.seal(blocks, count=len(blocks) - 1): "behind the last block",
        sf.seal(blocks, count=len(blocks) + 1): "cut short",
        sf.seal(blocks, count=0): "block 'facts' is missing",
        sf.seal(blocks, count=2**32 - 1): "cut short|ends inside",
        sf.seal(blocks, tail=b"more"): "behind the last block",
        sf.seal([]): "block 'facts' is missing",
        sf.seal(blocks[1:]): "block 'facts' is missing",
        sf.seal(blocks[:1]): "block 'counters' is missing",
        sf.seal([blocks[0], blocks[0], *blocks[1:]]): "twice or out of order",
        sf.seal([*blocks, blocks[-1]]): "twice or out of order",
        sf.seal([*blocks, Block(99, 0, b"new")]): "unknown to this build",
        sf.seal([*blocks, Block(sf.MEMORY, 7, b"1234")]): "expected layers 0 .. 0",
        sf.seal([*blocks, Block(sf.CURRENT, 1, b"1234")]): "expected layers 0 .. 0",
    }
    for content, message in cases.items():
        assert re.search(message, refuse(content)), message


def test_every_block_is_needed(live: armt.Session) -> None:
    blocks = sf.parse(live.state.to_bytes())
    for index in range(len(blocks)):
        message = refuse(sf.seal(blocks[:index] + blocks[index + 1 :]))
        assert re.search(
            "is missing|does not fit|expected 0 for the model and counters", message
        ), message


def test_lying_lengths_of_blocks(live: armt.Session) -> None:
    blocks = sf.parse(live.state.to_bytes())
    for index, block in enumerate(blocks):
        for payload in (block.payload[:-1], block.payload + b"\0", block.payload[:-8], b""):
            changed = [*blocks]
            changed[index] = replace(block, payload=payload)
            assert re.match("state: ", refuse(sf.seal(changed)))
        for size in (0, 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1):
            message = refuse(seal_with_head(blocks, index, (block.type, block.layer, size)))
            assert "block " in message


def test_impossible_counters_and_ids(live: armt.Session) -> None:
    blocks = sf.parse(live.state.to_bytes())
    for name, value in (
        ("tokens", 1),
        ("tokens", -1),
        ("tokens", 2**63 - 1),
        ("closed_segments", -1),
        ("closed_segments", 2**62),
        ("position_base", 1),
        ("position_base", -1),
        ("window_tokens", -1),
        ("window_tokens", 2),
        ("window_tokens", 2**62),
    ):
        assert name in refuse(sf.seal(sf.with_counters(blocks, **{name: value}))), (name, value)
    for kind in (sf.OPEN_TOKENS, sf.PREVIOUS_TOKENS):
        for token in (-1, 11, 2**31 - 1):
            payload = struct.pack("<i", token) + sf.payload_of(blocks, kind)[4:]
            message = refuse(sf.seal(sf.with_payload(blocks, kind, payload)))
            assert f"found token id {token}, expected 0 .. 10" in message


# ------------------------------------------------------------------------------ another model

OTHER_FACTS: dict[str, Any] = {
    "memory.dialect": "modern",
    "memory.segment_size": 4,
    "memory.memory_tokens": 2,
    "memory.d_mem": 2,
    "memory.rolls": 2,
    "memory.correction": False,
    "memory.sliding_window": False,
    "memory.normalise_keys": True,
    "decoder.vocab_size": 12,
    "decoder.d_model": 9,
    "decoder.n_layers": 2,
    "decoder.n_kv_heads": 1,
    "decoder.d_ff": 25,
    "decoder.norm": "rms",
    "decoder.norm_eps": 1e-6,
    "decoder.activation": "relu",
    "decoder.gated_mlp": True,
    "decoder.scale_by_inverse_layer": True,
    "decoder.learned_positions": 65,
    "decoder.rope_theta": 500.5,
    "weights.dtype": "bfloat16",
    "weights.fingerprint": "0123456789abcdef",
}


def test_each_fact_that_differs_is_named(zoo: Zoo) -> None:
    """An empty state of every other model; nothing but the named fact is complained about."""
    engine = zoo.engine(TINY[0])
    blocks = sf.parse(engine.session().state.to_bytes())
    facts = sf.read_facts(sf.payload_of(blocks, sf.FACTS))
    assert set(OTHER_FACTS) <= set(facts)
    for name, value in OTHER_FACTS.items():
        key = name.replace(".", "__")
        state = armt.State.from_bytes(sf.seal(sf.with_facts(blocks, **{key: value})))
        with pytest.raises(armt.StateError) as found:
            engine.session(state=state)
        lines = str(found.value).splitlines()
        assert len(lines) == 2, found.value
        assert lines[1].startswith(f"  - {name}: found "), found.value
        assert "expected " in lines[1]
    unknown = sf.with_facts(blocks, memory__flavour=True)
    assert "memory.flavour: this build knows no such setting" in refuse(sf.seal(unknown))
    wrong = sf.with_facts(blocks, memory__correction=1)
    assert "memory.correction: found 1" in refuse(sf.seal(wrong))
    word = sf.with_facts(blocks, memory__dialect="klingon")
    assert "memory.dialect: found klingon" in refuse(sf.seal(word))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_states_of_other_models(zoo: Zoo, variant: Variant) -> None:
    """Every variant's state on every other variant's engine."""
    session = zoo.engine(variant).session()
    session.feed([1, 2, 3] * 4)
    state = armt.State.from_bytes(session.state.to_bytes())
    for other in VARIANTS:
        if other.name == variant.name:
            continue
        with pytest.raises(armt.StateError, match=r"(?m)^  - (memory|decoder|weights)\."):
            zoo.engine(other).session(state=state)
        with pytest.raises(armt.StateError, match=r"(?m)^  - (memory|decoder|weights)\."):
            zoo.engine(other).session(state=session.state)


def test_other_weights_of_the_same_shape(zoo: Zoo, tmp_path: Path) -> None:
    variant = VARIANTS[0]
    path = variant.model(seed=9).save(tmp_path / "other")
    other = armt.Engine.from_pretrained(path, device="cpu")
    state = zoo.engine(variant).session().state
    with pytest.raises(armt.StateError) as found:
        other.session(state=state)
    (line,) = str(found.value).splitlines()[1:]
    assert line.startswith("  - weights.fingerprint: found ")
    half = armt.Engine.from_pretrained(zoo.path(variant), device="cpu", dtype="bfloat16")
    with pytest.raises(armt.StateError, match=r"weights.dtype: found float32, expected bfloat16"):
        half.session(state=state)
    longer = armt.Engine.from_pretrained(zoo.path(variant), device="cpu", segment_size=8)
    with pytest.raises(armt.StateError, match=r"memory.segment_size: found 7, expected 8"):
        longer.session(state=state)


# --------------------------------------------------------------------------------- huge claims


def huge_states(blocks: list[Block]) -> list[bytes]:
    """Small files that claim enormous sizes, all sums right."""
    claims: list[dict[str, Any]] = [
        {"decoder__d_model": 2**31 - 2, "decoder__head_dim": 2**30},
        {"decoder__n_layers": 4096, "decoder__d_model": 2**30, "memory__d_mem": 2**20},
        {"decoder__n_layers": 2**31 - 1},
        {"decoder__n_layers": 2**62},
        {"decoder__n_layers": -1},
        {"decoder__head_dim": 2**31 - 2, "decoder__n_kv_heads": 3},
        {"memory__d_mem": 2**31 - 1, "decoder__d_model": 2**31 - 2},
    ]
    files = [sf.seal(sf.with_facts(blocks, **claim)) for claim in claims]
    facts = sf.payload_of(blocks, sf.FACTS)
    files.append(
        sf.seal(sf.with_payload(blocks, sf.FACTS, struct.pack("<I", 2**32 - 1) + facts[4:]))
    )
    for index, block in enumerate(blocks):
        for size in (2**34, 2**50, 2**63):
            files.append(seal_with_head(blocks, index, (block.type, block.layer, size)))
    files += [sf.seal(blocks, size_error=error) for error in (2**30, 2**40, 2**62)]
    files += [sf.seal(sf.with_counters(blocks, window_tokens=2**61, tokens=2**61 + 9))]
    return files


def test_huge_claims_are_refused_before_allocating(live: armt.Session, tmp_path: Path) -> None:
    """In a process that may not grow by more than 64 MiB, so that an allocation would show."""
    files = huge_states(sf.parse(live.state.to_bytes()))
    for i, data in enumerate(files):
        (tmp_path / f"{i}.state").write_bytes(data)
    whole = tmp_path / "whole"
    live.state.save(whole)
    program = f"""
        import resource, sys
        from pathlib import Path
        import armt
        armt.State.load({str(whole)!r})
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 64 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        refused = 0
        for i in range({len(files)}):
            path = Path({str(tmp_path)!r}) / f"{{i}}.state"
            for read in (armt.State.load, lambda p: armt.State.from_bytes(p.read_bytes())):
                try:
                    read(path)
                except armt.StateError:
                    refused += 1
                except BaseException as error:
                    print(i, type(error), error)
                else:
                    print(i, "was taken")
        print(refused)
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert found.stdout.split() == [str(2 * len(files))], found.stdout + found.stderr


@pytest.mark.skipif(not hasattr(os, "truncate"), reason="needs sparse files")
def test_huge_sparse_files(live: armt.Session, tmp_path: Path) -> None:
    path = tmp_path / "state"
    live.state.save(path)
    os.truncate(path, 2**40)
    with pytest.raises(armt.StateError, match="something was added behind its end"):
        armt.State.load(path)
    path.write_bytes(b"")
    os.truncate(path, 2**40)
    with pytest.raises(armt.StateError, match="does not begin like a state"):
        armt.State.load(path)


def test_a_sparse_file_that_keeps_its_promise(zoo: Zoo, tmp_path: Path) -> None:
    """Right in every size, and larger than any machine's memory: refused before reading it."""
    blocks = sf.parse(zoo.engine(TINY[0]).session().state.to_bytes())
    size = 2**42
    tokens = (size - len(sf.seal(blocks)) - 24) // 4
    tail = struct.pack("<IIQ", sf.OPEN_TOKENS, sf.NO_LAYER, 4 * tokens)
    tail += struct.pack("<I", sf.crc32c(tail))
    data = sf.seal(blocks, count=len(blocks) + 1, tail=tail, size_error=4 * tokens + 4)
    path = tmp_path / "state"
    path.write_bytes(data[:-8])
    os.truncate(path, len(data) + 4 * tokens + 4)
    with pytest.raises(armt.OutOfMemory, match="does not fit in memory"):
        armt.State.load(path)
