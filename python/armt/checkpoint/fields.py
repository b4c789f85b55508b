"""Typed access to the fields of a JSON object; faults are collected, defaults carry on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from armt.checkpoint.problems import Problems

T = TypeVar("T")
LARGEST = 2**31 - 1


class Fields:
    """``values`` over ``defaults``. A null counts as not given."""

    def __init__(
        self,
        where: str,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
        problems: Problems,
    ) -> None:
        self._where = where
        self._values = {key: value for key, value in values.items() if value is not None}
        self._defaults = defaults
        self._problems = problems

    def given(self, name: str) -> bool:
        """Whether the file or the caller says it."""
        return name in self._values

    def raw(self, name: str) -> Any:
        """The value as it is, the default, or None."""
        return self._values.get(name, self._defaults.get(name))

    def whole(self, name: str, *, least: int = 1, most: int = LARGEST) -> int:
        """A whole number between the limits."""
        value = self.raw(name)
        # JSON writers of some languages turn 4 into 4.0.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        return self._wrong(name, f"a whole number {least} .. {most}", least)

    def number(self, name: str, *, or_zero: bool = False) -> float:
        """A finite positive number, or 0 where that is allowed."""
        value = self.raw(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if math.isfinite(number) and (number > 0.0 or (or_zero and number == 0.0)):
                return number
        return self._wrong(name, "a positive number" + (" or 0" if or_zero else ""), 1.0)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.raw(name)
        if isinstance(value, bool):
            return value
        return self._wrong(name, "true or false", False)

    def choice(self, name: str, options: Mapping[str, T]) -> T:
        """The meaning of one of several words."""
        value = self.raw(name)
        if isinstance(value, str) and value in options:
            return options[value]
        first = next(iter(options.values()))
        return self._wrong(name, f"one of {', '.join(options)}", first)

    def refuse(self, name: str, *, why: str) -> None:
        """A setting that must be off."""
        value = self.raw(name)
        if value is not None and value is not False:
            self._problems.add(f"{self._where}.{name}: found {_short(value)}: {why}")

    def problem(self, name: str, text: str) -> None:
        """Any other fault of a field."""
        self._problems.add(f"{self._where}.{name}: {text}")

    def nested(self, name: str, values: Mapping[str, Any]) -> Fields:
        """Access to the fields of an object inside this one."""
        return Fields(f"{self._where}.{name}", values, {}, self._problems)

    def _wrong(self, name: str, expected: str, carry_on: T) -> T:
        value = self.raw(name)
        found = "nothing" if value is None else _short(value)
        self._problems.add(f"{self._where}.{name}: found {found}, expected {expected}")
        return carry_on


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
