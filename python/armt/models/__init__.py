"""The trained models that come with the package."""

from __future__ import annotations

from pathlib import Path

from armt.errors import CheckpointError

FOLDER = Path(__file__).parent
DEFAULT = "babilong-qa1"
ALIASES = {"demo": DEFAULT, DEFAULT: DEFAULT}


def resolve(name: str) -> Path:
    """``name`` as a path: that of an existing file or folder, else that of a model of the package.

    Raises CheckpointError where it is neither.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name in ALIASES:
        return FOLDER / ALIASES[name]
    raise CheckpointError(
        f"{name}: no such file or folder, expected a checkpoint, or a model of the package: "
        + ", ".join(ALIASES)
    )
