"""Collecting every fault of a checkpoint, so that a user mends it in one go."""

from __future__ import annotations

from armt.errors import CheckpointError

LONGEST_LIST = 200


class Problems:
    """Faults found so far; :meth:`raise_if_any` turns them into one CheckpointError."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._lines: list[str] = []

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, line: str) -> None:
        """One fault: what was found and what was expected."""
        self._lines.append(line)

    def raise_if_any(self, hint: str) -> None:
        """Raises CheckpointError with all faults and, in the end, what to do about them."""
        if not self._lines:
            return
        shown = self._lines[:LONGEST_LIST]
        if len(self._lines) > LONGEST_LIST:
            shown = [*shown, f"and {len(self._lines) - LONGEST_LIST} more"]
        count = f"{len(self._lines)} problem{'s' if len(self._lines) > 1 else ''}"
        listed = "".join(f"\n  - {line}" for line in shown)
        raise CheckpointError(f"{self.where}: {count}{listed}\n{hint}")


def shape_text(shape: tuple[int, ...]) -> str:
    """[3, 16]; a size that could not be determined (-1) is shown as a question mark."""
    return "[" + ", ".join("?" if size < 0 else str(size) for size in shape) + "]"
