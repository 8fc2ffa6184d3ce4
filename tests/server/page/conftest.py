"""A browser, and the live page in it: of a real server, and before one that a test plays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

from kvik.engine.llm import LLM
from kvik.server.live.page_files import PAGE, PAGE_FILES
from opened_page import Open, Opened
from played_page import ADDRESS, PLAYED, PROGRAM, Answers, Play
from server_process import Server, with_engine


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=PROGRAM, args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open a server's page; in the end it may not have complained, or have asked another server for anything."""
    opened: list[Opened] = []

    def open_one(server: Server, width: int = 1280, **options: Any) -> Opened:
        one = Opened(browser.new_page(viewport={"width": width, "height": 900}, **options), server)
        opened.append(one)
        one.page.on("console", lambda message: one.complaints.append(message.text))
        one.page.on("pageerror", lambda error: one.complaints.append(str(error)))
        one.page.on("request", lambda request: one.requests.append(request.url))
        one.page.set_default_timeout(20_000)
        one.page.goto(f"http://127.0.0.1:{server.port}/")
        return one

    yield open_one
    for one in opened:
        one.page.close()
    for one in opened:
        assert one.complaints == []
        own = (f"http://127.0.0.1:{one.server.port}/", "data:,", "blob:")
        assert [url for url in one.requests if not url.startswith(own)] == []


@pytest.fixture(scope="module")
def live_server(tool_llm: LLM) -> Iterator[Server]:
    with Server({"tools": with_engine(tool_llm, kv_memory="4MiB")}) as server:
        yield server


@pytest.fixture
def server(live_server: Server) -> Iterator[Server]:
    live_server.streams  # noqa: B018  # forget those of others
    yield live_server
    live_server.assert_idle()


@pytest.fixture
def play(browser: Browser) -> Iterator[Play]:
    """Open the page at a view; answers are (status, body) by the paths' beginnings. No script may have failed."""
    opened: list[tuple[Page, list[str]]] = []

    def play_one(
        view: str,
        answers: Answers | None = None,
        *,
        refusals: list[dict[str, Any]] | None = None,
        facts: str = "",
        width: int = 1280,
        **options: Any,
    ) -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        errors: list[str] = []
        opened.append((page, errors))
        page.on("pageerror", lambda error: errors.append(error.message))
        page.set_default_timeout(10_000)
        page.add_init_script(PLAYED.replace("REFUSALS", json.dumps(refusals or [])))
        told: Answers = {"/v1/models": (200, {"data": []}), **(answers or {})}

        def answer(route: Route) -> None:
            path = route.request.url.removeprefix(ADDRESS)
            if path == "/":
                text = PAGE.replace("__FACTS__", facts).replace("__VERSION__", "0")
                route.fulfill(body=text, content_type="text/html")
            elif path.startswith("/page/"):
                found = PAGE_FILES[path.removeprefix("/page/")]
                route.fulfill(body=found.text, content_type=found.kind)
            else:
                nothing = (404, {"error": {"message": "not played"}})
                status, body = next((value for start, value in told.items() if path.startswith(start)), nothing)
                route.fulfill(status=status, json=body)

        page.route("**/*", answer)
        page.goto(f"{ADDRESS}/#{view}")
        return page

    yield play_one
    for page, errors in opened:
        page.close()
        assert errors == []
