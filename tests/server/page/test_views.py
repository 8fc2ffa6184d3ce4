"""Requests, numbers, the tree and the planner before a server that the tests play."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from kvik.cache import MissReason
from played_page import ADDRESS, COUNTERS, PLAN, PROGRAM, Answers, Play, change, feed, request, state

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: install Debian's package chromium")


def test_requests_that_run_come_first_and_what_is_not_shown_is_said(play: Play) -> None:
    page = play("requests")
    rows = [
        request(1),
        *(request(key, "queued") for key in range(2, 40)),
        *(request(key, "done") for key in range(40, 301)),
    ]
    feed(page, "state", state(requests=rows))
    expect(page.locator("#requests [role=status]")).to_have_text("60 of 300")
    shown = page.locator("#requests tbody tr")
    assert shown.evaluate_all("rows => rows.map((row) => Number(row.dataset.key))") == [
        *(1, *range(39, 1, -1)),
        *range(300, 279, -1),
    ]
    expect(shown.first.locator(".what button")).to_have_text("… Question 1: why?")
    expect(shown.first.locator("small")).to_have_text("…000001")
    told = f"req-{1:024x}, of whose prompt these are the last 48 tokens"
    assert shown.first.locator(".what").get_attribute("title") == told
    assert page.locator("#requests .axis span").count() >= 3


def test_a_whole_prompt_is_read_on_demand(play: Play) -> None:
    whole = {"num_prompt_tokens": 64, "prompt": "The very first words.\n" + "word " * 500}
    page = play("requests", {"/v1/requests/": (200, whole)})
    chat = "of it.<|im_end|>\n<|im_start|>user\nAnd why?<|im_end|>\n<|im_start|>assistant\n"
    rows = [request(1, prompt=chat), request(2, num_prompt_tokens=9), request(3, prompt=None)]
    feed(page, "state", state(requests=rows))
    row = page.locator("#requests tbody tr[data-key='1']")
    expect(page.locator("[data-key='2'] .what button")).to_have_text("Question 2: why?")
    expect(page.locator("[data-key='3'] .what button")).to_be_disabled()
    expect(row.locator(".what button")).to_have_text("… And why?")
    row.locator(".what button").focus()
    page.keyboard.press("Enter")
    more = page.locator("#requests .more")
    expect(more).to_contain_text("The whole prompt, 64 tokens")
    expect(more).to_contain_text("The very first words.")
    feed(page, "change", change(requests=[request(4)]))
    assert row.evaluate("row => row.nextElementSibling.className") == "more", "it stays with its request"
    expect(row.locator(".what button")).to_be_focused()
    page.keyboard.press("Enter")
    expect(more).to_have_count(0)


def test_the_planner_asks_once_and_for_the_servers_own_type(play: Play) -> None:
    asked: list[str] = []
    models = (200, {"data": [{"id": "played", "is_served": True}]})
    answers: Answers = {"/v1/plan/models": (503, {"error": {"message": "loading"}}), "/v1/plan": (200, PLAN)}
    page = play("planner", answers)
    page.on("request", lambda sent: asked.append(sent.url.partition("/v1/plan")[2]) if "/v1/plan" in sent.url else None)
    feed(page, "state", state())
    verdict = page.locator("#planner .fits")
    expect(verdict).to_have_text("loading")
    for _ in range(5):
        feed(page, "change", change())
        page.wait_for_timeout(100)
    assert asked == ["/models"]
    page.route("**/v1/plan/models", lambda route: route.fulfill(status=models[0], json=models[1]))
    page.route("**/v1/plan?*", lambda route: route.fulfill(status=400, json={"error": {"message": "no plan"}}))
    page.locator("[name=plan_users]").press("ArrowRight")
    expect(verdict).to_have_text("no plan")
    for _ in range(5):
        feed(page, "change", change())
        page.wait_for_timeout(100)
    assert [url.partition("?")[0] for url in asked] == ["/models", "/models", ""]
    page.unroute("**/v1/plan?*")
    page.locator("[name=plan_users]").press("ArrowRight")
    expect(verdict).to_contain_text("It fits")
    assert "kv=int8" in asked[-1]


def test_numbers_have_gaps_where_the_server_stood_still_and_no_prompt_came(play: Play) -> None:
    page = play("numbers")
    times = [*range(0, 20, 2), *range(40, 60, 2)]  # seconds; nothing is asked from the 50th on
    now_s = page.evaluate("performance.now() / 1000 + 1000")
    rows = []
    for at_s in times:
        counters = COUNTERS | {"queried_tokens": min(at_s, 12), "found_tokens": min(at_s, 12) / 2, "held_blocks": 3}
        rows.append([now_s - 60 + at_s, *counters.values()])
    feed(page, "state", state(history={"names": ["at_s", *COUNTERS], "rows": rows}))
    paths = page.locator("#numbers .charts .figure").evaluate_all(
        """figures => figures.slice(0, 4).map((figure) =>
            [...figure.querySelectorAll("path[style*='fill: none']")].map((path) => path.getAttribute("d")))"""
    )
    speed, hits, memory, _ = paths
    assert [line.count("M") for line in (*speed, *memory)] == [2, 2, 2, 2]
    assert hits[0].count("M") == 1, "no prompt came after the gap"
    expect(page.locator("#numbers .figure", has_text="Memory of blocks").locator("text").nth(1)).to_contain_text("kB")


def test_why_matches_ended_is_drawn_over_time(play: Play) -> None:
    """A column for each moment, as high as the prompts that came in it; colours are those of the table's rows."""
    page = play("numbers")
    counters = COUNTERS | {"miss_differs": 0, "miss_all": 0, "miss_window": 0}
    now_s = page.evaluate("performance.now() / 1000 + 1000")
    differs, whole = "miss_differs", "miss_all"
    grown = {5: {differs: 6}, 20: {differs: 2, whole: 4}, 400: {whole: 3}, 835: {differs: 1}}
    first_s = now_s // 30 * 30 - 840  # where a column begins
    rows = []
    for at_s in range(int(now_s - first_s) + 1):
        for name, number in grown.get(at_s, {}).items():
            counters[name] += number
        rows.append([first_s + at_s, *counters.values()])
    feed(page, "state", state(counters=counters, history={"names": ["at_s", *counters], "rows": rows}))
    figure = page.locator("#numbers .figure", has_text="Why matches ended")
    expect(figure.locator("tbody tr")).to_have_text(
        [re.compile("the tokens differ.*9$"), re.compile("all but the last.*7$")], use_inner_text=False
    )
    expect(figure.locator(".note").last).to_have_text("Prompts in each 30 s.")
    heights = figure.locator("path[data-name]").evaluate_all(
        """paths => Object.fromEntries(paths.map((path) => [path.dataset.name, path.getAttribute("d").split("z")
            .filter(Boolean).map((part) => part.match(/[0-9.]+/g).map(Number)).map(([, base, to]) => base - to)]))"""
    )
    unit = heights["differs"][-1]
    assert [round(each / unit) for each in heights["differs"]] == [8, 1]
    assert [round(each / unit) for each in heights["all"]] == [4, 3]
    colours = [
        figure.locator(f"path[data-name={name}]").evaluate("path => getComputedStyle(path).fill") for name in heights
    ]
    assert colours == figure.locator("tbody i").evaluate_all(
        "keys => keys.map((key) => getComputedStyle(key).backgroundColor)"
    )
    assert "in 15 minutes: the tokens differ from what is cached 9" in (
        figure.locator("svg").get_attribute("aria-label") or ""
    )


def test_every_reason_has_words_and_a_colour(play: Play) -> None:
    page = play("numbers")
    found = page.evaluate(
        """async (names) => {
            const { colourOf, inShort, reasonOf } = await import("/page/reasons.js");
            const isKnown = (name) => reasonOf(name) && inShort(name) !== name && colourOf(name) !== colourOf("?");
            return names.filter((name) => !isKnown(name));
        }""",
        [reason.name.lower() for reason in MissReason],
    )
    assert found == ["off"], "whose grey is that of what is unknown"


def test_runs_that_begin_alike_are_named_by_what_is_their_own(play: Play) -> None:
    run = {"first_token": 0, "num_tokens": 64, "num_blocks": 2, "num_holders": 0, "num_children": 0}
    texts = ["<|im_start|>user\nWhy is the sky blue?", "<|im_start|>user\nWhy is the sea salty?", "def main():"]
    rows = [{**run, "level": 0, "last_block": at, "text": text} for at, text in enumerate(texts)]
    rows.append({**run, "level": 0, "last_block": 3})  # of somebody else
    tree = {"data": rows, "has_more": False, "has_deeper": False, "max_level": 64, "above": None}
    page = play("prefixes", {"/v1/cache/tree": (200, tree)})
    feed(page, "state", state())
    expect(page.locator("#prefixes .tree span")).to_have_text(
        ["… the sky blue?", "… the sea salty?", "def main():", "64 tokens"]
    )


def test_a_long_line_is_named_by_its_end(play: Play) -> None:
    page = play("requests")
    long = (
        "You are a gardener who keeps a diary of the weather, and answers in one sentence. Which flowers bloom in May?"
    )
    rows = [
        request(1, prompt=long, num_prompt_tokens=24),
        request(2, prompt="word " * 30 + "end", num_prompt_tokens=31),
    ]
    feed(page, "state", state(requests=rows))
    expect(page.locator("[data-key='1'] .what button")).to_have_text("… Which flowers bloom in May?")
    expect(page.locator("[data-key='2'] .what button")).to_have_text(re.compile("^… (word ){6}end$"))


def test_a_part_of_the_tree_has_its_own_address(play: Play) -> None:
    run = {"level": 64, "first_token": 2048, "num_tokens": 32, "num_blocks": 1, "num_holders": 0, "text": "Why?"}
    deep = {**run, "last_block": 7, "num_children": 3}
    tree = {"data": [deep], "has_more": False, "has_deeper": True, "max_level": 64, "above": None}
    answers: Answers = {
        "/v1/cache/tree?max_level=64&max_rows=300&model=played&below=7": (
            200,
            {**tree, "data": [{**deep, "level": 0}], "has_deeper": False, "above": 5},
        ),
        "/v1/cache/tree?max_level=64&max_rows=300&model=played&below=8": (404, {"error": {"message": "none"}}),
        "/v1/cache/tree": (200, tree),
        "/v1/cache/blocks": (200, {"num_evicted_before": None}),
    }
    page = play("prefixes", answers)
    feed(page, "state", state())
    section = page.locator("#prefixes")
    expect(section).to_contain_text("Runs behind 64 others are left out where a link says so")
    section.get_by_role("link", name="3 runs below").click()
    assert page.url.endswith("#prefixes/7")
    expect(section).to_contain_text("What goes on from block 7")
    expect(section.get_by_role("link", name="One run up")).to_have_attribute("href", "#prefixes/5")
    assert page.locator("#views [aria-current=page]").get_attribute("href") == "#prefixes"
    section.get_by_role("link", name="The whole tree").click()
    section.locator(".tree button").click()
    expect(section.get_by_role("link", name="Look only at the 3 runs")).to_have_attribute("href", "#prefixes/7")
    page.goto(f"{ADDRESS}/#prefixes/8")
    expect(section).to_contain_text("That run is no more")


def test_a_chosen_run_is_as_new_as_the_tree(play: Play) -> None:
    run = {"first_token": 0, "num_tokens": 32, "num_blocks": 1, "num_holders": 1, "last_block": 3, "text": "Why?"}
    run |= {"level": 0, "num_children": 0}
    tree = {"data": [run], "has_more": False, "has_deeper": False, "max_level": 64, "above": None}
    page = play("prefixes", {"/v1/cache/tree": (200, tree), "/v1/cache/blocks": (200, {"num_evicted_before": None})})
    feed(page, "state", state())
    page.locator("#prefixes .tree button").click()
    detail = page.locator("#prefixes .detail")
    expect(detail).to_contain_text("held by 1")
    tree["data"] = [{**run, "num_holders": 0}]
    feed(page, "change", change(blocks=[[[3], [1]]]))
    expect(detail).to_contain_text("held by nobody")
    tree["data"] = []
    feed(page, "change", change(blocks=[[[3], [0]]]))
    expect(detail).to_contain_text("That run is no more")
