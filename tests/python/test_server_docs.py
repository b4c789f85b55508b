"""docs/server.md against the application: every path, field, code, metric and command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason='needs the extra "server"')
pytest.importorskip("httpx", reason="needs httpx")

from armt.server import create_app
from armt.server.errors import CODES
from serving import engine, live

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "server.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def schema() -> Any:
    return create_app(engine()).openapi()


def test_every_path_is_there_and_no_other() -> None:
    found = {
        f"{method.upper()} {path}"
        for path, methods in schema()["paths"].items()
        for method in methods
    }
    written = set(re.findall(r"`((?:GET|POST|DELETE|PUT) /[^`]*)`", PAGE)) - {"GET /openapi.json"}
    assert written == found


def test_every_field_is_there() -> None:
    for name, body in schema()["components"]["schemas"].items():
        if name in ("HTTPValidationError", "ValidationError"):
            continue
        for field in body.get("properties", {}):
            if name in ("Message", "ContentPart", "ResponseFormat", "StreamOptions"):
                continue
            assert f"`{field}`" in PAGE or f"`{field}: " in PAGE, f"{name}.{field}"


def test_every_code_is_there_with_its_status() -> None:
    rows = re.findall(r"^\| (\d{3}) \| ([^|]*) \|", PAGE, re.MULTILINE)
    written = {
        code: int(status) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)
    }
    assert written == {code: status for code, (status, _) in CODES.items()}


def test_every_metric_is_there() -> None:
    with live() as server:
        server.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        server.get("/nowhere")
        text = server.get("/metrics").text
    found = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    found = {name for name in found if not name.endswith("_created")}
    assert set(re.findall(r"`(armt_\w+)`", PAGE)) == found


def test_every_option_exists() -> None:
    import inspect

    from armt.cli.serve import serve

    options = {name.replace("_", "-") for name in inspect.signature(serve).parameters}
    for name in re.findall(r"`--([a-z-]+)", PAGE):
        assert name.removeprefix("no-") in options, name


def test_the_commands_work(tmp_path: Path) -> None:
    if shutil.which("curl") is None or shutil.which("bash") is None:
        pytest.skip("needs curl and bash")
    (script,) = (block for block in blocks("console") if "curl" in block)
    lines = [line[2:] for line in script.splitlines() if line.startswith("$ ")]
    with live() as server:
        code = "\n".join(lines).replace(":8080", f":{server.port}")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "no_proxy": "*"},
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert '"text":" garden"' in done.stdout and '"tokens":' in done.stdout
        assert len(server.get("/v1/sessions").json()["data"]) == 1  # the fork


def test_the_python_works(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai", reason="needs the package openai")
    with live() as server:
        for block in blocks("py"):
            exec(block.replace(":8080", f":{server.port}"), {})
    assert capsys.readouterr().out.split() == ["garden", "garden"]
