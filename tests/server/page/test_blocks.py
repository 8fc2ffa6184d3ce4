"""The view of blocks: what it draws of any state, how fast, and the past that it plays again."""

from __future__ import annotations

import re
import statistics
from typing import Any

import pytest
from playwright.sync_api import expect

from played_page import COUNTERS, PROGRAM, Answers, Play, change, feed, request, state

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: install Debian's package chromium")


def test_50_000_blocks_are_drawn_30_times_a_second(play: Play) -> None:
    num_blocks = 50_000
    rows = [request(key, "decode", list(range(100 * key, 100 * key + 100))) for key in range(1, 301)]
    page = play("blocks", {"/v1/cache/blocks": (404, {"error": {"message": "none"}})})
    feed(page, "state", state(num_blocks, rows))
    expect(page.locator("#blocks .counts")).to_contain_text("20,000 free")
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")

    def busy_ms() -> float:
        """What the main thread has worked: scripts, styles, layout and painting."""
        metrics = devtools.send("Performance.getMetrics")["metrics"]
        return next(1000 * float(each["value"]) for each in metrics if each["name"] == "TaskDuration")

    def act(script: str, value: Any = None) -> float:
        """The work of an act and of the two frames after it."""
        before = busy_ms()
        frames = "await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));"
        page.evaluate(f"async (value) => {{ {script}; {frames} }}", value)
        return busy_ms() - before

    page.locator("#blocks canvas").focus()
    page.evaluate("rows => (window.rows = rows)", rows)
    works: dict[str, list[float]] = {"arrows": [], "evictions": [], "slider": []}
    for at in range(12):
        blocks = [(each * 97 + at * 131) % num_blocks for each in range(500)]
        told = change(blocks=[[blocks, [at % 3] * 500]], evicted=blocks)
        key = "ArrowDown" if at % 4 else "ArrowRight"
        canvas = "document.querySelector('#blocks canvas')"
        works["arrows"].append(act(f"{canvas}.dispatchEvent(new KeyboardEvent('keydown', {{ key: value }}))", key))
        works["evictions"].append(act("value.models[0].requests = rows; send('change', value)", told))
        slider = "document.querySelector('#blocks input[type=range]')"
        works["slider"].append(act(f"{slider}.value = value; {slider}.dispatchEvent(new Event('input'))", -(at % 2)))
    found = {name: statistics.median(each) for name, each in works.items()}
    assert max(found.values()) < 66, f"two frames' work: {found}"


def test_what_a_choice_shows_is_as_new_as_its_state(play: Play) -> None:
    block = {"state": "held", "num_holders": 1, "is_sealed": True, "first_token": 0, "num_tokens": 1}
    answers: Answers = {"/v1/cache/blocks": (200, {**block, "num_evicted_before": None, "tokens": ["today"]})}
    page = play("blocks", answers)
    feed(page, "state", state(requests=[request(1, blocks=[0])]))
    page.locator("#blocks canvas").focus()
    detail = page.locator("#blocks .detail")
    expect(detail).to_contain_text("today")
    answers["/v1/cache/blocks"] = (200, {**block, "num_evicted_before": None, "tokens": ["tomorrow"]})
    page.route("**/v1/cache/blocks/*", lambda route: route.fulfill(json=answers["/v1/cache/blocks"][1]))
    feed(page, "change", change(blocks=[[[0], [1]]], gone=[1]))
    expect(detail).to_contain_text("tomorrow")
    page.locator("#blocks input[type=range]").press("ArrowLeft")
    expect(detail).to_contain_text("1 s ago")
    expect(detail).not_to_contain_text("tomorrow")


def test_the_past_is_played(play: Play) -> None:
    page = play("blocks", color_scheme="light")
    feed(page, "state", state(requests=[request(1, blocks=[0])]))
    pixel = "[...document.querySelector('#blocks canvas').getContext('2d').getImageData(3, 3, 1, 1).data]"
    held, free = [0xCC, 0x79, 0xA7, 255], [0x74, 0xAE, 0xDB, 255]
    assert page.evaluate(pixel) == held
    page.wait_for_timeout(1200)
    gone = change(blocks=[[[0], [1]]], requests=[request(1, "done", blocks=[])], evicted=[0])
    feed(page, "change", gone)
    page.wait_for_function(f"String({pixel}) === '{','.join(map(str, free))}'")
    page.wait_for_timeout(1200)
    counts = page.locator("#blocks .counts")
    expect(counts).to_contain_text("0 held")
    page.locator("#blocks canvas").focus()
    page.keyboard.press(" ")
    expect(page.locator("#blocks .play")).to_have_text("Pause")
    expect(counts).to_contain_text("1 held")
    assert page.evaluate(pixel) == held, "from the beginning"
    flash = f"(([red, green, blue]) => red > 0x74 + 20 && blue < 0xdb - 20)({pixel})"
    page.wait_for_function(flash)  # the eviction, as it was
    detail = page.locator("#blocks .detail")
    expect(detail).to_contain_text("reusable")  # what is told of the cell goes along
    page.locator("#blocks .play").click()
    expect(page.locator("#blocks .play")).to_have_text("Play")
    expect(page.locator("#blocks output")).to_have_text(re.compile(r"\d s ago"))
    page.locator("#blocks select").select_option("20")
    page.locator("#blocks .play").click()
    expect(page.locator("#blocks output")).to_have_text("now")
    expect(counts).to_contain_text("0 held")
    expect(page.locator("#blocks .play")).to_have_text("Play")


def test_little_moves_for_those_who_want_that(play: Play) -> None:
    page = play("blocks", color_scheme="light", reduced_motion="reduce")
    feed(page, "state", state())
    shades = page.evaluate(
        """async () => {
            const context = document.querySelector("#blocks canvas").getContext("2d");
            const pixel = () => context.getImageData(3, 3, 1, 1).data.join();
            const told = { id: "played", blocks: [[[0], [1]]], requests: [], hits: [[], []], gone: [], copied: [] };
            send("change", { models: [{ ...told, counters: {}, evicted: [0] }] });
            const seen = new Set();
            for (const end = performance.now() + 1500; performance.now() < end; ) {
                await new Promise(requestAnimationFrame);
                seen.add(pixel());
            }
            return [...seen];
        }"""
    )
    assert len(shades) <= 3, f"before, while it is marked, and after: {shades}"
    assert shades[-1] == "116,174,219,255"


def test_cells_are_light_on_paper(play: Play) -> None:
    page = play("blocks", color_scheme="dark")
    feed(page, "state", state(requests=[request(1, blocks=[0]), request(2, blocks=[0])]))
    pixel = "[...document.querySelector('#blocks canvas').getContext('2d').getImageData(3, 3, 1, 1).data]"
    assert page.evaluate(pixel) == [0x56, 0xB4, 0xE9, 255]
    page.emulate_media(media="print")
    page.wait_for_function(f"String({pixel}) === '0,114,178,255'")
    page.emulate_media(media="screen")
    page.wait_for_function(f"String({pixel}) === '86,180,233,255'")


def test_blocks_that_are_on_disk_are_marked(play: Play) -> None:
    page = play("blocks", {"/v1/cache/blocks": (200, ON_DISK)}, color_scheme="light")
    feed(page, "state", state(counters=COUNTERS | {"disk_blocks": 7}))
    counts = page.locator("#blocks .counts")
    expect(counts).to_contain_text("0 also on disk, of 7 there")
    pixels = """() => {
        const canvas = document.querySelector("#blocks canvas");
        const { data, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, 40);
        const end = [...Array(40).keys()].find((at) => !data[4 * at + 3]) - 1;
        return [3, end].map((at) => data.slice(4 * (at * width + at), 4 * (at * width + at) + 4).join());
    }"""
    feed(page, "change", change(counters=COUNTERS | {"disk_blocks": 7}, blocks=[[[0, 1], [1, 0x81]]]))
    expect(counts).to_contain_text("2 reusable")
    expect(counts).to_contain_text("1 also on disk, of 7 there")
    assert page.evaluate(pixels) == ["116,174,219,255", "116,174,219,255"]
    feed(page, "change", change(counters=COUNTERS | {"disk_blocks": 7}, blocks=[[[0], [0x83]]]))
    expect(counts).to_contain_text("2 also on disk")
    expect(counts).to_contain_text("1 held")
    assert page.evaluate(pixels) == ["86,96,110,255", "0,0,0,0"], "its own colour, and a corner less"
    page.locator("#blocks canvas").focus()
    expect(page.locator("#blocks .detail")).to_contain_text("held by 1, sealed, also on disk")


ON_DISK = {
    "state": "held",
    "num_holders": 1,
    "is_sealed": True,
    "first_token": 0,
    "num_tokens": 1,
    "num_evicted_before": None,
    "tokens": ["sky"],
}


def test_the_past_ends_after_five_minutes(play: Play) -> None:
    page = play("blocks")
    kept = page.evaluate(
        """async () => {
            const { Replay } = await import("/page/replay.js");
            const replay = new Replay(new Uint8Array(9000));
            replay.begin(0);
            for (let block = 0; block < 9000; block++) replay.set(block, 1, block / 100);
            replay.set(0, 2, 395);
            return [replay.changes[0][0], replay.changes.at(-1)[0], replay.seconds(400)];
        }"""
    )
    assert kept == [40.96, 395, 300]


def test_a_request_that_is_gone_leaves_its_blocks(play: Play) -> None:
    page = play("blocks", color_scheme="light")
    feed(page, "state", state(requests=[request(1, blocks=[0])]))
    pixel = "[...document.querySelector('#blocks canvas').getContext('2d').getImageData(3, 3, 1, 1).data]"
    assert page.evaluate(pixel) == [0xCC, 0x79, 0xA7, 255], "a request's colour"
    feed(page, "change", change(gone=[1]))
    assert page.evaluate(pixel) == [0x56, 0x60, 0x6E, 255], "that of what somebody else holds"


def test_another_model_is_drawn_at_once(play: Play) -> None:
    page = play("blocks")
    first, other = state(), state(128, id="other")
    feed(page, "state", {**first, "models": [*first["models"], *other["models"]]})
    page.locator("#model").select_option("other")
    expect(page.locator("#blocks .counts")).to_contain_text("128 free")
