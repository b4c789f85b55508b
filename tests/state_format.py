"""State files, read and written a second time from docs/formats.md, to build hostile ones."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

MAGIC = b"\x89ARMTS\r\n"
ORDER_MARK = 0x01020304
FORMAT = 1
NO_LAYER = 0xFFFFFFFF
FACTS, COUNTERS, OPEN_TOKENS, PREVIOUS_TOKENS, CARRIED, LAST_HIDDEN = range(1, 7)
MEMORY, CURRENT, PREVIOUS = 16, 17, 18
COUNTER_NAMES = (
    "tokens",
    "closed_segments",
    "position_base",
    "window_tokens",
    "version",
    "seed",
    "drawn",
)


@dataclass(frozen=True)
class Block:
    type: int
    layer: int
    payload: bytes


@cache
def _table(polynomial: int) -> tuple[int, ...]:
    entries = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (polynomial if value & 1 else 0)
        entries.append(value)
    return tuple(entries)


def _crc(data: bytes, polynomial: int, bits: int) -> int:
    table, ones = _table(polynomial), (1 << bits) - 1
    value = ones
    for byte in data:
        value = table[(value ^ byte) & 255] ^ (value >> 8)
    return value ^ ones


def crc32c(data: bytes) -> int:
    """Castagnoli, reflected."""
    return _crc(data, 0x82F63B78, 32)


def crc64(data: bytes) -> int:
    """ECMA-182, reflected."""
    return _crc(data, 0xC96C5795D7870F42, 64)


def _summed(data: bytes) -> bytes:
    return data + struct.pack("<I", crc32c(data))


def seal(
    blocks: list[Block],
    *,
    mark: int = ORDER_MARK,
    version: int = FORMAT,
    count: int | None = None,
    size_error: int = 0,
    tail: bytes = b"",
) -> bytes:
    """A file of these blocks with right sums; the options put one thing wrong."""
    body = b""
    for block in blocks:
        head = struct.pack("<IIQ", block.type, block.layer, len(block.payload))
        body += _summed(head) + _summed(block.payload)
    body += tail
    size = 32 + len(body) + 8 + size_error
    announced = len(blocks) if count is None else count
    prefix = MAGIC + struct.pack("<IIQI", mark, version, size, announced)
    data = _summed(prefix) + body
    return data + struct.pack("<Q", crc64(data))


def parse(data: bytes) -> list[Block]:
    """The blocks of a whole and right file; AssertionError otherwise."""
    mark, version, size, count = struct.unpack_from("<IIQI", data, 8)
    assert data[:8] == MAGIC
    assert (mark, version, size) == (ORDER_MARK, FORMAT, len(data))
    assert struct.unpack_from("<I", data, 28)[0] == crc32c(data[:28])
    assert struct.unpack_from("<Q", data, size - 8)[0] == crc64(data[:-8])
    blocks, at = [], 32
    for _ in range(count):
        kind, layer, length, head_sum = struct.unpack_from("<IIQI", data, at)
        assert head_sum == crc32c(data[at : at + 16])
        payload = data[at + 20 : at + 20 + length]
        assert struct.unpack_from("<I", data, at + 20 + length)[0] == crc32c(payload)
        blocks.append(Block(kind, layer, payload))
        at += 24 + length
    assert at == size - 8
    return blocks


def read_facts(payload: bytes) -> dict[str, Any]:
    """The facts block by name."""
    (count,) = struct.unpack_from("<I", payload)
    facts: dict[str, Any] = {}
    at = 4
    for _ in range(count):
        length = payload[at]
        name = payload[at + 1 : at + 1 + length].decode()
        kind = payload[at + 1 + length]
        at += 2 + length
        if kind == 0:
            facts[name] = bool(payload[at])
            at += 1
        elif kind == 3:
            facts[name] = payload[at + 1 : at + 1 + payload[at]].decode()
            at += 1 + payload[at]
        else:
            (facts[name],) = struct.unpack_from("<q" if kind == 1 else "<d", payload, at)
            at += 8
    assert at == len(payload)
    return facts


def write_facts(facts: dict[str, Any]) -> bytes:
    """The reverse of :func:`read_facts`."""
    out = struct.pack("<I", len(facts))
    for name, value in facts.items():
        out += bytes([len(name)]) + name.encode()
        if isinstance(value, bool):
            out += bytes([0, value])
        elif isinstance(value, int):
            out += b"\x01" + struct.pack("<q", value)
        elif isinstance(value, float):
            out += b"\x02" + struct.pack("<d", value)
        else:
            out += bytes([3, len(value)]) + value.encode()
    return out


def with_payload(
    blocks: list[Block], kind: int, payload: bytes, layer: int = NO_LAYER
) -> list[Block]:
    """A copy with one block's payload replaced."""
    assert any((b.type, b.layer) == (kind, layer) for b in blocks)
    return [
        replace(b, payload=payload) if (b.type, b.layer) == (kind, layer) else b for b in blocks
    ]


def payload_of(blocks: list[Block], kind: int, layer: int = NO_LAYER) -> bytes:
    """The payload of one block."""
    (found,) = [b.payload for b in blocks if (b.type, b.layer) == (kind, layer)]
    return found


def with_facts(blocks: list[Block], **changes: Any) -> list[Block]:
    """A copy with facts changed; ``memory__d_mem=3`` sets ``memory.d_mem``, None removes one."""
    facts = read_facts(payload_of(blocks, FACTS))
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del facts[name]
        else:
            facts[name] = value
    return with_payload(blocks, FACTS, write_facts(facts))


def with_counters(blocks: list[Block], **changes: int) -> list[Block]:
    """A copy with counters changed."""
    values = dict(
        zip(COUNTER_NAMES, struct.unpack("<4q3Q", payload_of(blocks, COUNTERS)), strict=True)
    )
    values |= changes
    return with_payload(blocks, COUNTERS, struct.pack("<4q3Q", *values.values()))
