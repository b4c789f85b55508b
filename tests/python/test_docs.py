"""Every Python block and every shell block of README and docs runs, in order, page by page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from armt.models import resolve

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, code) of the page's blocks in ``language``."""
    text = page.read_text(encoding="utf-8")
    found = (m for m in BLOCK.finditer(text) if m[1] == language)
    return [(text.count("\n", 0, m.start()) + 2, m[2]) for m in found]


def prepare_guide(folder: Path) -> dict[str, Any]:
    """A book to read, and what the part about inspection takes as given."""
    (folder / "book.txt").write_text("It was late. The rain had ceased. " * 200)
    rng = np.random.default_rng(0)
    return {"layer": 1, "key": rng.standard_normal(64), "candidates": rng.standard_normal((5, 128))}


def prepare_formats(folder: Path) -> dict[str, Any]:
    """A bare state dict of PyTorch, and its base model's configuration."""
    torch = pytest.importorskip("torch", reason='pickled checkpoints need the extra "torch"')
    import json

    from reference.safetensors import read_safetensors

    demo = resolve("demo")
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(values))
        for name, values in read_safetensors(demo / "model.safetensors").items()
    }
    torch.save(tensors, folder / "model_best.pt")
    (folder / "gpt2").mkdir()
    config = json.loads((demo / "config.json").read_text())["base_model"]
    (folder / "gpt2" / "config.json").write_text(json.dumps(config))
    return {"armt": __import__("armt")}


def prepare_training(folder: Path) -> dict[str, Any]:
    """Nothing but PyTorch."""
    pytest.importorskip("torch", reason='training needs the extra "torch"')
    return {}


PREPARE: dict[str, Callable[[Path], dict[str, Any]]] = {
    "guide.md": prepare_guide,
    "formats.md": prepare_formats,
    "training.md": prepare_training,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(page, "python")
    if any("armt.text" in code for _, code in found):
        pytest.importorskip("tokenizers", reason='needs the extra "text"')
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "docs"}
    if found and page.name in PREPARE:
        names |= PREPARE[page.name](tmp_path)
    for line, code in found:
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_blocks_run(page: Path, tmp_path: Path) -> None:
    found = blocks(page, "sh")
    if found and shutil.which("bash") is None:
        pytest.skip("no bash")
    if found:
        pytest.importorskip("tokenizers", reason='needs the extra "text"')
    if any("armt train" in code for _, code in found):
        pytest.importorskip("torch", reason='training needs the extra "torch"')
    tool = tmp_path / "bin" / "armt"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m armt.cli "$@"\n')
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    for line, code in found:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{page.name}, line {line}:\n{done.stderr}"


def test_the_quick_start_says_what_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers", reason='needs the extra "text"')
    monkeypatch.chdir(tmp_path)
    for _, code in blocks(ROOT / "docs" / "quickstart.md", "python"):
        exec(code, {})
    assert capsys.readouterr().out.split() == ["office"]
    assert (tmp_path / "monday.armt-state").stat().st_size < 500 * 1024


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        file = page if not target else (page.parent / target)
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w]+", "-", t.lower()).strip("-") for t in titles}


def test_every_command_is_in_the_documentation() -> None:
    from armt.cli.app import app

    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    names = [command.name for command in app.registered_commands]
    for name in [*names, "eval retrieval", "eval babilong", "eval perplexity"]:
        assert f"armt {name}" in text, name


def test_no_page_is_missing_from_the_site() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f": {page.name}\n" in site, f"mkdocs.yml: {page.name} is not in nav"
