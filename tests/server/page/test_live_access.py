"""Who sees what: the page speaks to nobody else, asks for a key, and shows text to whom it belongs."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from kept_server import KEYS, KeptServer
from kvik.engine.llm import LLM
from opened_page import QUESTION, Open
from played_page import PROGRAM
from server_process import Server, wait_until, with_engine

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: install Debian's package chromium")


def test_a_file_is_not_sent_twice(server: Server) -> None:
    first = server.client.get("/page/base.css")
    assert first.headers["content-type"].startswith("text/css")
    assert first.headers["content-security-policy"].startswith(
        "default-src 'none'; script-src 'self'; style-src 'self'"
    )
    again = server.client.get("/page/base.css", **{"If-None-Match": first.headers["etag"]})
    assert (again.status, again.data) == (304, b"")
    assert server.client.get("/page/base.css", **{"If-None-Match": '"another"'}).data == first.data
    assert server.client.get("/page/none.js").status == 404


def test_the_page_may_not_reach_others(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    answer = opened.page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.name)")
    assert answer == "TypeError"
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)
    opened.complaints.clear()
    opened.requests[:] = opened.requests[:1]


def test_a_key_is_asked_for_and_shows_what_is_its_own(open_page: Open, tool_llm: LLM) -> None:
    with KeptServer(with_engine(tool_llm), api_keys=KEYS) as server:
        opened = open_page(server)
        expect(opened.page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
        key = opened.page.get_by_label("Key", exact=True)
        key.fill("key-of-nobody")
        key.press("Enter")
        expect(opened.page.get_by_role("alert").first).to_contain_text("wrong")
        assert opened.complaints.pop().startswith("Failed to load resource")
        key.fill("key-of-anna")
        key.press("Enter")
        opened.go("requests")
        expect(opened.page.locator("#status")).to_have_text("")
        wait_until(lambda: server.state.live.num_watchers == 1)
        for name, key_text in (("bert", "key-of-bert"), ("anna", "key-of-anna")):
            server.caller(key_text).chat([{"role": "user", "content": f"I am {name}. " * 5}])
        rows = opened.page.locator("#requests tbody tr")
        expect(rows).to_have_count(1)
        opened.page.close()


def test_an_explained_page_is_opened_with_a_key(open_page: Open, tool_llm: LLM) -> None:
    """Within the page, and in a tab of its own, whose address holds once."""
    with KeptServer(with_engine(tool_llm), api_keys=KEYS) as server:
        opened = open_page(server)
        opened.page.get_by_label("Key", exact=True).fill("key-of-anna")
        opened.page.keyboard.press("Enter")
        section = opened.go("explain")
        section.locator("[name=explain_tokens]").fill("4")
        section.get_by_role("button", name="Make").click()
        section.get_by_role("button", name="Show it here").click()
        frame = section.frame_locator("iframe")
        expect(frame.locator("#position")).to_contain_text("of 4")
        assert frame.locator("html").evaluate("() => origin") == "null"
        section.get_by_role("button", name="Hide it").click()
        expect(section.locator("iframe")).to_have_count(0)
        with opened.page.expect_popup() as popup:
            section.get_by_role("button", name="new tab").click()
        popup.value.locator("#position").wait_for()
        assert popup.value.evaluate("origin") == "null"
        popup.value.close()
        opened.page.close()


def test_a_page_for_others_shows_neither_chat_nor_text(open_page: Open, tool_llm: LLM) -> None:
    with KeptServer(with_engine(tool_llm), read_only=True, redact=True) as server:
        opened = open_page(server)
        opened.page.locator("#views a").first.wait_for()
        assert opened.page.locator("#views a").all_inner_texts() == [
            "Blocks",
            "Prefix tree",
            "Requests",
            "Numbers",
            "Planner",
        ]
        opened.go("requests")
        wait_until(lambda: server.state.live.num_watchers == 1)
        server.caller().chat([{"role": "user", "content": QUESTION}])
        row = opened.page.locator("#requests tbody tr")
        expect(row).to_have_count(1)
        assert "sky" not in row.inner_text()
        opened.go("blocks")
        opened.page.locator("#blocks canvas").first.focus()
        expect(opened.page.locator("#blocks .detail")).to_contain_text("not yours to see")
        opened.page.close()
