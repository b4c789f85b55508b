"""Writes the seed corpora of the fuzz targets: small inputs from which every branch can be reached.

python tests/fuzz/make_corpus.py tests/fuzz/corpus
The seeds of the state target are the state files in tests/data/states.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

# Two bits a level: 0 object, 1 array, 2 string, 3 number (fuzz_json.cpp).
JSON = {
    "object-of-strings": (0b1000, '{"a": "b", "c": "\\u00e9\\ud83d\\ude00\\n"}'),
    "nested": (0b100000, '{"t": {"dtype": "F32"}, "u": {}}'),
    "shapes": (0b11010000, '{"t": {"shape": [0, 1, 9223372036854775807]}}'),
    "array-of-numbers": (0b1101, "[ 1 ,2,\t3\n]"),
    "string": (0b10, '"\u00e4 \u20ac \U0001f600 \\"\\\\\\/\\b\\f\\r\\t"'),
    "number": (0b11, "9223372036854775808"),
    "lone-surrogate": (0b10, '"\\ud800"'),
}


def header(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "two": (24, header(a=entry("F32", [2, 2], 0, 16), b=entry("F16", [4], 16, 24))),
    "metadata": (0, b'{"__metadata__": {"format": "pt"}}'),
    "scalar-and-empty": (8, header(a=entry("I64", [], 0, 8), b=entry("F32", [0, 5], 8, 8))),
    "overlap": (8, header(a=entry("U8", [8], 0, 8), b=entry("U8", [4], 4, 8))),
    "hole": (9, header(a=entry("BOOL", [4], 0, 4), b=entry("I8", [4], 5, 9))),
    "overflow": (0, header(a=entry("F64", [2**40, 2**40], 0, 0))),
    "twice": (2, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
              b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'),
}  # fmt: skip


def safetensors() -> dict[str, bytes]:
    seeds = {}
    for name, (data, text) in HEADERS.items():
        seeds[name] = b"\x01" + struct.pack("<H", data) + text
        seeds[f"whole-{name}"] = b"\x00" + struct.pack("<Q", len(text)) + text + bytes(data)
    seeds["long-header"] = b"\x00" + struct.pack("<Q", 2**63) + b"{}"
    return seeds


def config() -> dict[str, bytes]:
    seeds = {f"model-{i}": bytes([i]) for i in range(6)}
    seeds["wide-heads"] = bytes([1, 3, 233, 4, 233, 5, 233])
    for i in range(6):
        # every integer once, then every flag
        integers = b"".join(bytes([k, 1 + (3 * k + i) % 9]) for k in range(14))
        seeds[f"integers-{i}"] = bytes([i]) + integers
        seeds[f"flags-{i}"] = bytes([i, *range(180 + i, 191 + i)])
        seeds[f"odd-{i}"] = bytes([i]) + b"".join(bytes([k, 230 + k + i]) for k in range(14))
        seeds[f"reals-{i}"] = bytes([i]) + b"".join(bytes([126 + k, 130 + k + i]) for k in range(7))
    return seeds


def load() -> dict[str, bytes]:
    seeds = {}
    for model in range(6):
        for half in (0, 1):
            seeds[f"right-{model}-{half}"] = bytes([model, half]) + b"G\x00"
        seeds[f"cut-{model}"] = bytes([model, 0]) + b"G\x01" + struct.pack("<H", 3000)
        seeds[f"changed-{model}"] = bytes([model, 0]) + b"G\x00" + struct.pack("<HB", 40, 0x39)
    text = header(**{"m9.0": entry("F32", [2, 2], 0, 16)})
    seeds["raw"] = bytes([0, 0, 0]) + struct.pack("<Q", len(text)) + text + bytes(16)
    return seeds


def session() -> dict[str, bytes]:
    seeds = {}
    for model in range(6):
        for way in range(4):
            head = bytes([model, way & 1, way >> 1])
            operations = b""
            for i in range(18):
                operations += bytes([(5 * i + model + way) % 16, i % 3, 3 + i, *range(i, i + 5)])
            seeds[f"mixed-{model}-{way}"] = head + operations
        fork = bytes(
            [0, 0, 8, *range(9), 10, 0, 11, 0, 5, 3, 1, 2, 3, 4, 5, 2, 1, 2, 3, 12, 0, 0, 13, 1]
        )
        seeds[f"fork-{model}"] = bytes([model, 0, 1]) + fork
    return seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    sets = {
        "json": {n: struct.pack("<H", s) + t.encode() for n, (s, t) in JSON.items()},
        "safetensors": safetensors(),
        "config": config(),
        "load": load(),
        "session": session(),
    }
    for target, seeds in sets.items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for name, data in seeds.items():
            (folder / target / name).write_bytes(data)


if __name__ == "__main__":
    main()
