"""Answers as they come, in a file that survives an interruption; a later run goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from armt.errors import InvalidArgument

Cell: TypeAlias = Mapping[str, Any]
"""What a group of answers has in common: task, length and the like."""
Line: TypeAlias = dict[str, Any]

SETTINGS = "settings.json"
ANSWERS = "answers.jsonl"


class Journal:
    """The answers of a folder, or of this process alone."""

    def __init__(self, folder: Path | None = None, settings: Mapping[str, Any] | None = None):
        """``settings`` is all that the answers depend on beside their cell. InvalidArgument if the
        folder holds answers of other settings."""
        self.folder = folder
        self._lines: dict[str, list[Line]] = {}
        if folder is None:
            return
        if folder.exists() and not folder.is_dir():
            raise InvalidArgument(f"{folder}: found a file, expected a folder, or none yet")
        folder.mkdir(parents=True, exist_ok=True)
        self._check(folder / SETTINGS, json.loads(json.dumps(dict(settings or {}))))
        self._read(folder / ANSWERS)

    @property
    def cells(self) -> list[Cell]:
        """All cells with answers, in the order of their first ones."""
        return [json.loads(key) for key in self._lines]

    def of(self, cell: Cell) -> list[Line]:
        """The answers of a cell in order."""
        return self._lines.get(_key(cell), [])

    def add(self, cell: Cell, lines: Sequence[Line]) -> None:
        """More answers of a cell; they are on disk when this returns."""
        if self.folder is not None:
            text = "".join(
                json.dumps({"cell": dict(cell)} | line, ensure_ascii=False) + "\n" for line in lines
            )
            with (self.folder / ANSWERS).open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        self._lines.setdefault(_key(cell), []).extend(lines)

    def _check(self, path: Path, settings: dict[str, Any]) -> None:
        if not path.is_file():
            if any(path.parent.iterdir()):
                raise InvalidArgument(
                    f"{path.parent}: found a folder with other files, expected an empty one, or "
                    "one that an earlier run wrote"
                )
            path.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", "utf-8")
            return
        try:
            found = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise InvalidArgument(f"{path}: {error}; expected what an earlier run wrote") from error
        names = sorted({*found, *settings})
        differing = [n for n in names if found.get(n) != settings.get(n)]
        if differing:
            name = differing[0]
            raise InvalidArgument(
                f"{path.parent}: holds answers with {name} = {found.get(name)!r}, found "
                f"{settings.get(name)!r} now; choose another folder"
            )

    def _read(self, path: Path) -> None:
        if not path.is_file():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # cut short by the end of an earlier run
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, text in enumerate(whole.decode("utf-8").splitlines(), 1):
            try:
                line = json.loads(text)
                cell = line.pop("cell")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InvalidArgument(f"{path}, line {number}: expected an answer") from error
            self._lines.setdefault(_key(cell), []).append(line)


def _key(cell: Cell) -> str:
    return json.dumps(dict(cell), sort_keys=True)
