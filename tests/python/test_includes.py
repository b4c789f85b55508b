"""The dependency rule of the C++ code: bindings -> engine -> layers -> backend.h <- cpu, cuda."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Folder -> prefixes that its #include "..." lines may name besides files of its own folder.
ALLOWED = {
    "cpp/include/armt": ("armt/",),
    "cpp/src/layers": ("armt/", "backend.h"),
    "cpp/src/schedule": ("armt/", "backend.h", "layers/", "engine/plan.h", "engine/stream.h"),
    "cpp/src/engine": ("armt/", "backend.h", "layers/", "schedule/"),
    "cpp/src/checkpoint": ("armt/", "backend.h", "engine/"),
    "cpp/src/cpu": ("armt/", "backend.h", "slots.h"),
    "cuda": ("armt/", "backend.h", "slots.h"),
}
NO_DEVICE = re.compile(r"cuda|pybind11|#\s*ifdef", re.IGNORECASE)


def sources(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#include\s+"([^"]+)"', path.read_text(), re.MULTILINE)


def violations() -> list[str]:
    found = []
    for name, allowed in ALLOWED.items():
        folder = ROOT / name
        for path in sources(folder):
            own = folder.name + "/"
            for target in includes(path):
                beside = (path.parent / target).exists() or (folder / target).exists()
                if beside or target.startswith(own) or target.startswith(allowed):
                    continue
                found.append(f"{path.relative_to(ROOT)} includes {target}")
    return found


def test_includes_follow_the_rule() -> None:
    assert violations() == []


def test_public_headers_name_no_device_and_no_build_flag() -> None:
    for path in sources(ROOT / "cpp/include/armt"):
        assert not NO_DEVICE.search(path.read_text()), path


def test_the_rule_covers_every_folder() -> None:
    folders = {p.parent.relative_to(ROOT).as_posix() for p in sources(ROOT / "cpp/src")}
    uncovered = {f for f in folders if f != "cpp/src" and not f.startswith(tuple(ALLOWED))}
    assert uncovered == set()
