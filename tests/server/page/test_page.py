"""The page before a server that the tests play: what it does when refused, when it fails, and on paper."""

from __future__ import annotations

import base64
import re

import pytest
from playwright.sync_api import expect

from played_page import PLAN, PROGRAM, Answers, Play, feed, request, state

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: install Debian's package chromium")


def test_a_server_that_has_no_time_yet_is_asked_again(play: Play) -> None:
    later = {"headers": {"Retry-After": "1"}}
    refusals = [{"status": 503, **later}, {"status": 429, **later}]
    page = play("blocks", {"/v1/models": (503, {"error": {"message": "loading"}})}, refusals=refusals)
    expect(page.locator("#status")).to_have_text("not now")
    expect(page.locator("#key")).to_be_hidden()
    feed(page, "state", state())
    expect(page.locator("#status")).to_have_text("")
    expect(page.locator("#blocks .counts")).to_contain_text("64 free")
    page.evaluate("feed.close()")
    page.wait_for_function("window.joined === 2")


def test_only_a_wrong_key_is_asked_for_again(play: Play) -> None:
    page = play("blocks", refusals=[{"status": 401}], facts="key")
    page.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_have_text("not now")
    page.get_by_label("Key", exact=True).fill("right")
    page.keyboard.press("Enter")
    feed(page, "state", state())
    expect(page.locator("#blocks .counts")).to_contain_text("64 free")
    assert page.evaluate("sessionStorage.getItem('kvik-key')") == "right"
    assert page.locator("#views a").count() == 8


def test_an_error_of_a_view_is_said_and_the_page_goes_on(play: Play) -> None:
    page = play("blocks")
    page.evaluate("import('/page/live.js').then(({ onLive }) => onLive(() => { throw new Error('of a view'); }))")
    page.evaluate("addEventListener('error', (event) => { event.preventDefault(); window.said = event.message; })")
    feed(page, "state", state())
    expect(page.locator("#blocks .counts")).to_contain_text("64 free")
    assert "of a view" in page.evaluate("window.said")
    assert page.evaluate("window.joined") == 1


def test_the_view_stays_with_the_skip_link_and_another_begins_at_its_top(play: Play) -> None:
    page = play("requests", width=400)
    feed(page, "state", state(requests=[request(key, "done") for key in range(1, 61)]))
    page.evaluate("scrollTo({ top: 500, behavior: 'instant' })")
    page.locator("#views a", has_text="Numbers").evaluate("link => link.click()")
    page.wait_for_function("document.title.startsWith('Numbers') && scrollY === 0")
    page.locator("#skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    expect(page.locator("#numbers")).to_be_visible()


@pytest.mark.parametrize("view", ["chat", "race", "blocks", "requests", "numbers", "prefixes", "planner"])
def test_paper_is_white_and_has_no_controls(play: Play, view: str) -> None:
    """As it comes out: the picture of the printed page, and a PDF of few pages."""
    run = {"level": 0, "first_token": 0, "num_tokens": 32, "num_blocks": 1, "num_holders": 1, "num_children": 0}
    tree = {"data": [{**run, "last_block": 3, "text": "Why?"}], "has_more": False, "has_deeper": False, "above": None}
    answers: Answers = {
        "/v1/cache/tree": (200, tree),
        "/v1/plan/models": (200, {"data": [{"id": "played", "is_served": True}]}),
        "/v1/plan": (200, PLAN),
    }
    page = play(view, answers, color_scheme="dark", width=720)
    feed(page, "state", state(requests=[request(key, blocks=[key]) for key in range(1, 9)]))
    if view not in ("chat", "race"):
        page.locator(f"#{view} :is(svg, canvas, .tree button)").first.wait_for()
    page.emulate_media(media="print")
    page.wait_for_timeout(100)
    for control in ("#views", "#models", ".screen", ".composer", ".replay", ".skip"):
        assert page.locator(f"{control}:visible").count() == 0, control
    shares = page.evaluate(
        """async (encoded) => {
            const picture = new Image();
            picture.src = `data:image/png;base64,${encoded}`;
            await picture.decode();
            const { width, height } = picture;
            const canvas = Object.assign(document.createElement("canvas"), { width, height });
            const context = canvas.getContext("2d");
            context.drawImage(picture, 0, 0);
            const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
            let [light, dark] = [0, 0];
            for (let at = 0; at < data.length; at += 4) {
                const sum = data[at] + data[at + 1] + data[at + 2];
                light += sum > 720;
                dark += sum < 300;
            }
            return [light, dark].map((each) => each / (data.length / 4));
        }""",
        base64.b64encode(page.screenshot(full_page=True)).decode(),
    )
    assert shares[0] > 0.6, "most of the paper stays white"
    assert 0.001 < shares[1] < 0.2, "and there is ink on it"
    page.emulate_media(media="screen")
    printed = page.pdf(format="A4", print_background=True)
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 3
