"""Lengths in tokens as people write them."""

from __future__ import annotations

import re

from armt.errors import InvalidArgument

UNIT = {"": 1, "k": 1 << 10, "m": 1 << 20}


def parse_length(text: str) -> int:
    """ "32k" as 32,768; k = 1,024, M = 1,048,576."""
    found = re.fullmatch(r"(\d+)([kKmM]?)", text.strip())
    if found is None:
        raise InvalidArgument(f"length: found {text!r}, expected tokens such as 512, 32k or 1M")
    return int(found[1]) * UNIT[found[2].lower()]


def length_name(tokens: int) -> str:
    """ "4k" for 4,096, "1M" for 1,048,576."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"
