"""The views with real requests: their figures are the engine's."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Locator, expect

from kvik.planner.plan import plan
from opened_page import QUESTION, Open
from played_page import PROGRAM
from server_process import Server, wait_until

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: install Debian's package chromium")

VIEWS = ("chat", "race", "blocks", "prefixes", "requests", "numbers", "planner", "explain")


def test_figures_are_those_of_the_server(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    opened.limit(10)
    opened.say(QUESTION)
    opened.go("numbers")
    server.client.ok("/v1/chat/completions", {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 3})
    (told,) = server.client.get("/v1/cache").body["models"]
    lines = [line for line in server.client.get("/metrics").data.decode().splitlines() if not line.startswith("#")]
    metrics = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def shown(name: str) -> Locator:
        return opened.page.locator(f"#numbers .tile[data-name={name}]")

    for name, value in {
        "generated_tokens": metrics["kvik_generation_tokens_total"],
        "computed_tokens": metrics["kvik_prompt_tokens_computed_total"],
        "cached_tokens": metrics["kvik_prompt_tokens_cached_total"],
        "committed_bytes": told["bytes"]["committed"],
        "evicted_blocks": told["num_evicted_blocks"],
    }.items():
        expect(shown(name)).to_have_attribute("data-value", f"{value:g}" if value < 1e6 else str(int(value)))
    opened.page.locator("#numbers svg").first.wait_for()
    misses = opened.page.locator("#numbers tbody tr td:last-child").all_inner_texts()
    wanted = [line.rpartition(" ")[2] for line in lines if line.startswith("kvik_prefix_cache_misses_total")]
    assert sum(map(int, misses)) == sum(map(float, wanted)) > 0
    opened.go("blocks")
    counts = opened.page.locator("#blocks .counts")
    expect(counts).to_contain_text(f"{told['blocks']['reusable']} reusable")
    expect(counts).to_contain_text(f"{told['blocks']['free']} free")


def test_a_block_shows_its_tokens_and_the_past(open_page: Open, server: Server) -> None:
    server.client.ok("/v1/chat/completions", {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 40})
    opened = open_page(server)
    opened.go("blocks")
    first = next(at for at in range(server.engine.cache.pool.num_blocks) if server.engine.cache.pool.is_named(at))
    canvas = opened.page.locator("#blocks canvas").first
    canvas.focus()
    opened.page.keyboard.press("Home")
    for _ in range(first):
        opened.page.keyboard.press("ArrowRight")
    detail = opened.page.locator("#blocks .detail")
    expect(detail).to_contain_text(f"Block {first}: reusable, sealed")
    expect(detail.locator(".token")).to_have_count(32)
    slider = opened.page.locator("#blocks input[type=range]")
    slider.focus()
    slider.press("ArrowLeft")
    expect(opened.page.locator("#blocks output")).to_have_text("1 s ago")
    opened.page.get_by_role("button", name="Now").click()
    expect(opened.page.locator("#blocks output")).to_have_text("now")


def test_the_past_is_what_it_was(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    found = opened.page.evaluate(
        """async () => {
            const { Replay } = await import("/page/replay.js");
            const replay = new Replay(Uint8Array.from([0, 1, 2]));
            replay.begin(1);
            replay.set(0, 5, 3);
            replay.set(2, 9, 3.5);
            replay.set(0, 6, 4);
            replay.set(2, 9, 4.5);
            const moments = [0, 3.2, 3.7, undefined].map((moment_s) => [...replay.at(moment_s)]);
            return [moments, replay.seconds(11), replay.changedAt(2), replay.changedAt(1) ?? null];
        }"""
    )
    assert found == [[[0, 1, 2], [5, 1, 2], [5, 1, 9], [6, 1, 9]], 10, 3.5, None]


def test_the_tree_shows_runs_and_where_a_prompt_leaves_it(open_page: Open, server: Server) -> None:
    def ask(text: str) -> None:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2, "temperature": 0}
        server.client.ok("/v1/chat/completions", body)

    server.engine.clear_cache()
    opened = open_page(server)
    opened.go("prefixes")
    wait_until(lambda: server.state.live.num_watchers == 1)
    ask(QUESTION * 2 + "one " * 30)
    ask(QUESTION * 2 + "two " * 30)
    ask(QUESTION * 2 + "two " * 30)
    runs = opened.page.locator("#prefixes .tree button")
    expect(runs).to_have_count(5)  # two branches, and where each has ended
    trunk, *branches = (served := server.client.get("/v1/cache/tree").body)["data"]
    assert not served["has_more"]
    runs.first.click()
    detail = opened.page.locator("#prefixes .detail")
    expect(detail).to_contain_text(f"Tokens 0 to {trunk['num_tokens'] - 1} in {trunk['num_blocks']} block")
    expect(detail).to_contain_text("read back by 2 requests")
    expect(detail).to_contain_text("held by nobody")
    widths = opened.page.locator("#prefixes .tree i").evaluate_all("runs => runs.map((run) => run.offsetWidth)")
    assert widths[1] / widths[0] == pytest.approx(branches[0]["num_tokens"] / trunk["num_tokens"], rel=0.02)
    text = QUESTION * 2 + "three"
    opened.page.locator("#prefixes textarea").fill(text)
    opened.page.keyboard.press("Enter")
    told = server.client.ok("/v1/cache/match", {"messages": [{"role": "user", "content": text}]})
    outcome = opened.page.locator("#prefixes form [role=status]")
    expect(outcome).to_contain_text(f"{told['num_cached_tokens']} tokens of {told['num_tokens']} would match")
    expect(outcome).to_contain_text("From there on the tokens differ from what is cached")
    expect(outcome.locator(".token.new").first).to_have_text(told["found"][0])


def test_a_race_ends_with_the_same_bits(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    section = opened.go("race")
    section.locator("[name=race_tokens]").fill("30")
    section.get_by_role("button", name="Race").click()
    expect(section.locator(".verdict")).to_contain_text("Same tokens, same bits: 30 tokens")
    left, right = section.locator(".lane .words").all_inner_texts()
    assert left == right != ""
    computed = section.locator("[data-name=num_computed_tokens]").all_inner_texts()
    num_prompt = int(computed[1]) - 29
    assert int(computed[0].replace(",", "")) == 30 * num_prompt + 30 * 29 // 2


def test_a_page_is_made_of_a_prompt(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    section = opened.go("explain")
    section.locator("[name=explain_tokens]").fill("6")
    section.get_by_role("button", name="Make").click()
    with opened.page.expect_popup() as popup:
        section.get_by_role("link", name="Open").click()
    made = popup.value
    complaints: list[str] = []
    made.on("console", lambda message: complaints.append(message.text))
    made.locator("#position").wait_for()
    made.reload()
    expect(made.locator("#position")).to_contain_text("of 6")
    expect(made.locator("#tiles")).to_contain_text("same bits")
    assert made.evaluate("origin") == "null", "it has an origin of its own"
    assert complaints == []
    made.close()
    with opened.page.expect_download() as saved:
        section.get_by_role("button", name="Save").click()
    assert "Why the KV cache works" in saved.value.path().read_text()


def test_the_planner_plans_any_model(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    section = opened.go("planner")
    users = section.locator("[name=plan_users]")
    users.wait_for()
    model = section.locator("[name=plan_model]")
    expect(model).to_have_value("tools")
    expect(section.locator("li").first).to_be_visible()
    model.select_option("qwen2.5-0.5b")
    context = section.locator(".field output").first
    expect(context).to_have_text("8,192 tokens")
    users.focus()
    users.press("Home")
    wanted = plan("qwen2.5-0.5b", context=8192)
    doubled = plan("qwen2.5-0.5b", context=16384).kv.num_bytes - wanted.kv.num_bytes
    figures = section.locator(".tile b")
    expect(figures.first).to_have_text(f"{wanted.kv.num_bytes / 1e6:.0f} MB")
    expect(figures.last).to_have_text(f"+{doubled / 1e6:.0f} MB")
    expect(section.locator(".fits")).to_contain_text("does not fit")


def test_a_request_is_aborted_and_all_are_saved(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    opened.go("requests")
    body = {"prompt": QUESTION, "max_tokens": 5000, "ignore_eos": True}
    with server.client.streaming("/v1/completions", body):
        branch = server.wait_for_stream().branches[0]
        row = opened.page.locator("#requests tbody tr").first
        row.get_by_role("button", name="Abort").click()
        wait_until(lambda: branch.finish_reason == "abort")
    expect(row).to_contain_text("abort")
    expect(row.locator("rect")).to_have_count(3)
    server.assert_idle()
    with opened.page.expect_download() as saved:
        opened.page.get_by_role("button", name="Perfetto").click()
    trace = saved.value.path().read_text()
    assert '"name":"decode"' in trace
    assert branch.request.request_id in trace


@pytest.mark.parametrize(
    ("width", "scheme"), [(400, "light"), (400, "dark"), (1280, "light"), (1600, "dark")], ids=lambda value: str(value)
)
def test_every_view_draws_and_nothing_sticks_out(open_page: Open, server: Server, width: int, scheme: str) -> None:
    opened = open_page(server, width, color_scheme=scheme)
    opened.say(QUESTION) if width > 1100 else opened.page.locator("#say").wait_for()
    for view in VIEWS:
        section = opened.go(view)
        server.client.ok("/v1/completions", {"prompt": QUESTION, "max_tokens": 4})
        opened.page.wait_for_timeout(150)
        assert (
            section.locator("svg:visible, input:visible, canvas:visible, .tree:visible, textarea:visible").count() > 0
        )
        assert opened.page.evaluate("document.documentElement.scrollWidth") == width, view
        assert not re.search(r"undefined|\bNaN\b|Infinity|\[object|false", section.inner_text()), view
        current = opened.page.locator("#views [aria-current=page]")
        assert (current.get_attribute("href") or "") == f"#{view}"
    paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(19, 22, 27)") == (scheme == "dark")
    opened.page.emulate_media(media="print")
    assert not opened.page.locator("#views").is_visible()
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
