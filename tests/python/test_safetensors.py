"""The compiled safetensors reader: honest files, and headers that lie."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from armt._core import SafetensorsFile
from armt.errors import CheckpointError
from reference.safetensors import write_safetensors


def write_raw(path: Path, header: bytes | dict[str, Any], data: bytes = b"") -> Path:
    """A file with exactly this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape: Sequence[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    text = str(caught.value)
    assert str(path) in text
    return text


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_values_views_and_names(tmp_path: Path, dtype: str) -> None:
    values = {"b": np.arange(6.0).reshape(2, 3), "a": np.full(5, -1.5), "empty": np.ones((0, 4))}
    write_safetensors(tmp_path / "x", values, dtype=dtype)
    file = SafetensorsFile(tmp_path / "x")
    assert sorted(file.names()) == ["a", "b", "empty"]
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    assert file.info("b") == (names[dtype], (2, 3))
    found = file.tensor("b")
    if dtype == "BF16":
        found = (found.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(found, values["b"])
    assert file.tensor("empty").shape == (0, 4)


def test_a_tensor_is_a_read_only_view_that_keeps_the_file(tmp_path: Path) -> None:
    write_raw(
        tmp_path / "x", b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  ', b"\0" * 8
    )
    first = SafetensorsFile(tmp_path / "x").tensor("a")
    assert not first.flags.owndata
    assert not first.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1.0
    with pytest.raises(ValueError, match="WRITEABLE"):
        first.flags.writeable = True
    assert first.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("padding", range(8))
def test_any_header_length(tmp_path: Path, padding: int) -> None:
    """The format lets data begin anywhere; elements that are not aligned are copied."""
    header = json.dumps({"a": entry([3], 0, 12)}).encode() + b" " * padding
    path = write_raw(tmp_path / "x", header, np.array([1.5, -2.0, 3.0], "<f4").tobytes())
    array = SafetensorsFile(path).tensor("a")
    assert array.flags.aligned
    assert array.tolist() == [1.5, -2.0, 3.0]


def test_metadata_and_other_types(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt", "ключ": "\u00e9\U0001f600"},
        "flags": entry([2], 0, 2, "BOOL"),
        "ids": entry([], 2, 10, "I64"),
    }
    file = SafetensorsFile(write_raw(tmp_path / "x", header, b"\1\0" + struct.pack("<q", -7)))
    assert file.metadata == header["__metadata__"]
    assert file.tensor("flags").tolist() == [True, False]
    assert file.tensor("ids").tolist() == -7
    with pytest.raises(CheckpointError, match="no tensor named nothing"):
        file.info("nothing")


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "whole", {"a": np.ones(3), "b": np.ones((2, 2))}, dtype="F16")
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        refusal(tmp_path / "cut")
    (tmp_path / "long").write_bytes(whole + b"\0")
    assert "1 bytes belong to no tensor" in refusal(tmp_path / "long")


def test_every_changed_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": np.ones(3), "b": np.ones((2, 2))}, dtype="F16")
    whole = bytearray((tmp_path / "x").read_bytes())
    for at in range(len(whole) - 14):
        for value in (0, 0x22, 0x39, 0x7D, 0xFF, whole[at] ^ 1):
            changed = bytearray(whole)
            changed[at] = value
            (tmp_path / "y").write_bytes(changed)
            try:
                file = SafetensorsFile(tmp_path / "y")
                for name in file.names():
                    file.tensor(name).tobytes()
            except CheckpointError:
                pass


BIG = 2**62
LIES: dict[str, tuple[bytes | dict[str, Any], bytes, str]] = {
    "dtype unknown": ({"a": entry([2], 0, 8, "F8_E4M3")}, b"\0" * 8, "F8_E4M3"),
    "too few bytes": ({"a": entry([3], 0, 8)}, b"\0" * 8, "expected 12"),
    "too many bytes": ({"a": entry([1], 0, 8)}, b"\0" * 8, "expected 4"),
    "past the end": ({"a": entry([4], 0, 16)}, b"\0" * 8, "past the end"),
    "backwards": ({"a": entry([0], 8, 0)}, b"\0" * 8, "before the beginning"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12, "overlaps"),
    "same place": ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, b"\0" * 8, "overlaps"),
    "hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12, "belong to no tensor"),
    "hole in front": ({"a": entry([1], 4, 8)}, b"\0" * 8, "belong to no tensor"),
    "huge sizes": ({"a": entry([BIG, BIG], 0, 8)}, b"\0" * 8, "overflows"),
    "huge and empty": ({"a": entry([BIG, BIG, 0], 0, 0)}, b"", "overflows"),
    "huge number": (b'{"a":{"dtype":"F32","shape":[99999999999999999999]}}', b"", "2^63"),
    "negative": (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"\0" * 4, "negative"),
    "fraction": (b'{"a":{"dtype":"F32","shape":[1.0]}}', b"", "fraction"),
    "exponent": (b'{"a":{"dtype":"F32","shape":[1e0]}}', b"", "fraction"),
    "leading zero": (b'{"a":{"dtype":"F32","shape":[01]}}', b"", "needless 0"),
    "text for a size": (b'{"a":{"dtype":"F32","shape":["1"]}}', b"", "whole number"),
    "three offsets": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}',
        b"\0" * 4,
        "two numbers",
    ),
    "no shape": (b'{"a":{"dtype":"F32","data_offsets":[0,4]}}', b"\0" * 4, "once each"),
    "shape twice": (
        b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}',
        b"\0" * 4,
        "once each",
    ),
    "unknown key": (b'{"a":{"dtype":"F32","layout":"x"}}', b"", "layout"),
    "name twice": (
        b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[],"data_offsets":[4,8]}}',
        b"\0" * 8,
        "twice",
    ),
    "name twice by escape": (
        b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        b'"\\u0061":{"dtype":"F32","shape":[],"data_offsets":[4,8]}}',
        b"\0" * 8,
        "twice",
    ),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', b"", "twice"),
    "metadata key twice": (b'{"__metadata__":{"k":"1","k":"2"}}', b"", "twice"),
    "metadata not text": (b'{"__metadata__":{"k":1}}', b"", "expected '\"'"),
    "deep arrays": (b'{"a":{"dtype":"F32","shape":' + b"[" * 1_000_000, b"", "whole number"),
    "deep objects": (b'{"a":' * 1_000_000, b"", "dtype, shape"),
    "many dimensions": ({"a": entry([1] * 33, 0, 4)}, b"\0" * 4, "dimensions"),
    "long name": ({"n" * 5000: entry([], 0, 4)}, b"\0" * 4, "longer than"),
    "no object": (b"[]", b"", "does not begin with"),
    "leading space": (b" {}", b"", "does not begin with"),
    "text after": (b"{}x", b"", "follows the end"),
    "trailing comma": (b'{"a":{"dtype":"F32",}}', b"", "expected '\"'"),
    "single quotes": (b"{'a':{}}", b"", "expected '\"'"),
    "control character": (b'{"a\n":{}}', b"", "control character"),
    "not UTF-8": (b'{"a\xff":{}}', b"", "UTF-8"),
    "overlong UTF-8": (b'{"\xc0\x80":{}}', b"", "UTF-8"),
    "UTF-8 surrogate": (b'{"\xed\xa0\x80":{}}', b"", "UTF-8"),
    "beyond Unicode": (b'{"\xf4\x90\x80\x80":{}}', b"", "UTF-8"),
    "cut UTF-8": (b'{"\xe2\x82', b"", "UTF-8"),
    "lone surrogate": (b'{"\\ud800":{}}', b"", "surrogate"),
    "bad escape": (b'{"\\x41":{}}', b"", "escape"),
    "empty": (b"", b"", "does not begin with"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(tmp_path: Path, lie: str) -> None:
    header, data, expected = LIES[lie]
    started = time.process_time()
    assert expected in refusal(write_raw(tmp_path / "x", header, data))
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("claim", [17, 10**8, 10**8 + 1, 2**63, 2**64 - 1])
def test_header_lengths_that_lie(tmp_path: Path, claim: int) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", claim) + b"{}" + b" " * 14)
    assert str(claim) in refusal(tmp_path / "x")


def test_all_faults_are_listed_and_hostile_names_are_escaped(tmp_path: Path) -> None:
    header = {f"t{i}\x1b[2J": entry([2], 4 * i, 4 * i + 4, "F31") for i in range(50)}
    text = refusal(write_raw(tmp_path / "x", header, b"\0" * 200))
    assert text.count("\n  - ") == 21
    assert text.endswith("and 30 more")
    assert "\x1b" not in text
    assert "t0\\x1b[2J" in text


LIMITED = """
import resource, sys, time
from armt._core import SafetensorsFile
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.process_time()
try:
    SafetensorsFile(sys.argv[1])
    result = "opened"
except ValueError:
    result = "refused"
seconds = time.process_time() - started
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print(result, seconds, grown)
"""


def limited(path: Path) -> tuple[str, float, int]:
    """Opens a file in a process of its own: result, seconds, MiB."""
    out = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], check=True, capture_output=True, text=True
    ).stdout.split()
    return out[0], float(out[1]), int(out[2])


@pytest.mark.parametrize("honest", [True, False])
def test_a_hundred_thousand_tensors(tmp_path: Path, honest: bool) -> None:
    count = 100_000
    header = {f"layers.{i}.some.weight": entry([1], 4 * i, 4 * i + 4) for i in range(count)}
    path = write_raw(tmp_path / "x", header, b"\0" * (4 * count if honest else 4))
    result, seconds, grown = limited(path)
    assert result == ("opened" if honest else "refused")
    assert seconds < 1.0
    assert grown < 200


def test_a_header_of_a_hundred_megabytes(tmp_path: Path) -> None:
    one = b',"%07d":{"dtype":"F32","shape":[],"data_offsets":[0,4]}'
    text = b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}' + b"".join(
        one % i for i in range(99_000_000 // len(one % 0))
    )
    result, seconds, grown = limited(write_raw(tmp_path / "x", text + b"}", b"\0" * 4))
    assert result == "refused"
    assert seconds < 2.0
    assert grown < 200


def test_only_regular_files(tmp_path: Path) -> None:
    assert "folder" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "absent")
    assert "regular file" in refusal(Path("/dev/null"))
    os.mkfifo(tmp_path / "pipe")
    assert "regular file" in refusal(tmp_path / "pipe")
    (tmp_path / "closed").write_bytes(b"")
    assert "found 0 bytes" in refusal(tmp_path / "closed")


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": np.ones(3)}, dtype="F32")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = [SafetensorsFile(tmp_path / "x") for _ in range(min(soft + 10, 5000))]
    assert all(file.tensor("a")[0] == 1.0 for file in files)


def test_reading_in_many_threads(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {str(i): np.full(100, i) for i in range(50)}, dtype="F32")
    file = SafetensorsFile(tmp_path / "x")
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(i for i in range(50) if not (file.tensor(str(i)) == i).all())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
