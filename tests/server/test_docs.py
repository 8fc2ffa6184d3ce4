"""`/docs` in a browser: all routes and fields, at a desk and on a telephone, and it asks nobody for anything."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from kvik.server.app import ROUTES
from kvik.server.docs import render
from kvik.server.endpoint import plain_path
from kvik.server.openapi import describe

PAGE = render(describe(ROUTES, ()))
program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if program is None:
        pytest.skip("no Chromium here: install Debian's package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def test_the_page_has_every_route_and_loads_nothing() -> None:
    for route in ROUTES:
        assert f'<span class="path">{plain_path(route.path)}</span>' in PAGE
    assert not re.findall(r"<(?:script|link|img|iframe)|src=|url\(|@import", PAGE)
    links = set(re.findall(r"""href=["']([^"']+)""", PAGE))
    anchors = set(re.findall(r'id="(\w+)"', PAGE))
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    assert {link for link in links if not link.startswith("#")} == {"/openapi.json"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1100])
def test_it_fits_and_opens(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    path = tmp_path / "docs.html"
    path.write_text(PAGE, encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    field = page.locator("#ChatRequest tr", has_text="max_completion_tokens")
    assert field.is_visible()
    assert field.inner_text().split("\t")[1].strip() == "integer ≥ 1"
    assert page.locator("#ChatRequest td:first-child").first.bounding_box()["height"] < 60  # type: ignore[index]
    assert page.locator("#ChatChunk tr", has_text="prompt_progress").get_by_role("link").first.is_visible()
    chat = page.locator("details", has=page.get_by_text("/v1/chat/completions", exact=True))
    assert chat.get_by_role("link", name="ChatAnswer", exact=True).is_visible()
    assert "ChatUsage or null" in page.locator("#ChatChunk tr", has_text="usage").inner_text()
    assert chat.get_by_text("events of ChatChunk or Error").is_visible()
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (sum(map(int, re.findall(r"\d+", ink))) < sum(map(int, re.findall(r"\d+", paper)))) == (scheme == "light")
    assert requests == [path.as_uri()]
    page.close()
