"""The page at /, driven in a headless Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason='needs the extra "server"')
pytest.importorskip("httpx", reason="needs httpx")

import httpx

from armt.server import Settings
from serving import KEYS, Live, engine, live, text_settings, tokenizer, until

STORY = (
    "Mary went to the kitchen. " + "It rained all day long. " * 200 + "John moved to the garden."
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("needs chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_the_page_needs_nothing_from_outside() -> None:
    with live() as server:
        answer = httpx.get(f"http://127.0.0.1:{server.port}/")
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        for word in ("http://", "https://", "//cdn", "@import", "innerHTML", "eval("):
            assert word not in answer.text


def opened(browser: Any, server: Live) -> tuple[Any, list[str]]:
    """A page, and what its console complains about."""
    page = browser.new_page(viewport={"width": 1080, "height": 1180})
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
    page.goto(f"http://127.0.0.1:{server.port}/")
    seen(page, "document.all.model.textContent.includes('segments')")
    return page, faults


def seen(page: Any, condition: str) -> None:
    """Waits until JavaScript says so; the page's own policy forbids Playwright's way of waiting."""
    until(lambda: bool(page.evaluate(condition)))


def test_read_ask_fork_compare(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "story.txt"
    file.write_text(STORY)
    with live() as server:
        page, faults = opened(browser, server)
        page.set_input_files("#file", file)
        page.click("#read")
        seen(page, "document.getElementById('progress').value === 1")
        page.wait_for_selector("#layers .bar")
        text = "".join(text_settings().prepared([STORY]))
        want = engine().session()
        want.feed(tokenizer().encode(text, specials=True))
        assert page.inner_text("#tokens") == f"{want.tokens:,}"
        assert page.inner_text("#segments") == str(want.segments)
        assert page.locator("#layers .bar").count() == want.state.layers
        assert page.inner_text("#speed") != "-"

        page.fill("#question", "Where is John?")
        page.click("#ask")
        page.wait_for_selector(".answer p:not(:empty)")
        answered = want.fork()
        question = tokenizer().encode(text_settings().prompt("Where is John?"))
        answered.feed(question)
        expected = tokenizer().decode(
            answered.generate(60, stop_ids=engine().checkpoint.eos_token_ids)
        )
        assert page.inner_text(".answer p") == expected.strip()

        page.click("#fork")
        seen(page, "document.getElementById('session').length === 2")
        page.evaluate("document.getElementById('file').value = ''")
        page.fill("#text", "John went back to the office.")
        page.click("#read")
        seen(page, f"document.getElementById('tokens').textContent !== '{want.tokens:,}'")
        page.click("#compare")
        seen(page, "document.querySelectorAll('.answer p:not(:empty)').length === 2")
        texts = page.locator(".answer p").all_inner_texts()
        want.feed(tokenizer().encode(" John went back to the office."))
        want.feed(question)
        other = tokenizer().decode(want.generate(60, stop_ids=engine().checkpoint.eos_token_ids))
        assert sorted(texts) == sorted([expected.strip(), other.strip()])
        if picture := os.environ.get("ARMT_SCREENSHOT"):
            page.screenshot(path=picture, full_page=True)
        page.click("#delete")
        seen(page, "document.getElementById('session').length === 1")
        assert faults == []
        page.close()


def test_the_page_says_what_is_wrong(browser: Any) -> None:
    with live(Settings(api_keys=KEYS), key=KEYS[0]) as server:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        seen(page, "document.all.trouble.textContent.includes('API key')")
        page.fill("#key", KEYS[0])
        page.press("#key", "Tab")
        seen(page, "document.all.model.textContent.includes('segments')")
        assert page.inner_text("#trouble") == ""
        page.click("#new")
        seen(page, "document.getElementById('session').length === 1")
        assert len(server.get("/v1/sessions").json()["data"]) == 1
        page.close()
