"""The trained models that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

from armt.errors import CheckpointError

FOLDER = Path(__file__).parent
SHIPPED = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
DEFAULT = "babilong"
"""The demo's."""
ALIASES = {"demo": DEFAULT} | {name: name for name in SHIPPED}


def place(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """``path`` itself, or where the model of the package lies that it names ("demo")."""
    if isinstance(path, str) and path in ALIASES and not Path(path).exists():
        return FOLDER / ALIASES[path]
    return path


def resolve(name: str) -> Path:
    """``name`` as a path: that of an existing file or folder, else that of a model of the package.

    Raises CheckpointError where it is neither.
    """
    path = Path(place(name)).expanduser()
    if path.exists():
        return path
    raise CheckpointError(
        f"{name}: no such file or folder, expected a checkpoint, or a model of the package: "
        + ", ".join(ALIASES)
    )
