"""The page at `/` in a browser: with real requests, its figures are the engine's, and it speaks to nobody else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from kept_server import KEYS, KeptServer
from kvik.engine.llm import LLM
from kvik.engine.sequence import Sequence
from kvik.planner.plan import plan
from server_process import Server, wait_until, with_engine

VIEWS = ("chat", "race", "blocks", "prefixes", "requests", "numbers", "planner", "explain")
QUESTION = "Why is the sky blue, and why is it red in the evening? Answer so that a child understands it. "

program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(program is None, reason="no Chromium here: install Debian's package chromium")


@dataclass
class Opened:
    """The page, and whatever it said or asked for."""

    page: Page
    server: Server
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def go(self, view: str) -> Locator:
        """To a view, by its URL."""
        self.page.goto(f"http://127.0.0.1:{self.server.port}/#{view}")
        section = self.page.locator(f"#{view}")
        section.wait_for()
        return section

    def say(self, text: str) -> Sequence:
        """Send a message and wait for the answer: what the engine made of it."""
        self.page.locator("#say").fill(text)
        self.page.keyboard.press("Enter")
        return self.answered()

    def answered(self) -> Sequence:
        stream = self.server.wait_for_stream()
        wait_until(lambda: stream.branches[0].finish_reason is not None)
        self.page.locator(".talk > .composer .main", has_text="Send").wait_for()
        return stream.branches[0]

    def limit(self, num_tokens: int) -> None:
        self.page.locator("[name=max_tokens]").fill(str(num_tokens))

    def unfold(self, name: str) -> None:
        """Of the settings."""
        self.page.locator(".settings summary", has_text=name).click()

    def receipt(self) -> dict[str, str]:
        """Of the last answer."""
        parts = self.page.locator(".receipt").last.locator("div").all_inner_texts()
        return dict(part.split("\n", maxsplit=1) for part in parts)


Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
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


def test_a_conversation_branches_and_the_receipt_says_what_was_reused(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    opened.limit(40)
    first = opened.say(QUESTION)
    told = opened.receipt()
    assert told["prompt"] == f"{first.num_prompt_tokens} tokens"
    assert told["computed"] == str(first.num_prompt_tokens - first.costs.num_cached_tokens)
    second = opened.say("And the sea?")
    assert second.costs.num_cached_tokens >= first.num_prompt_tokens // 32 * 32 > 0
    turn = opened.page.locator(".turn.user").nth(1)
    turn.get_by_role("button", name="Edit").click()
    turn.locator("textarea").fill("And the rain?")
    opened.page.keyboard.press("Enter")
    branch = opened.answered()
    assert "rain" in server.engine.model.tokenizer.decode(list(branch.request.prompt_ids))
    told = opened.receipt()
    num_cached = branch.costs.num_cached_tokens
    assert (told["cached"], told["written"]) == (str(num_cached), str(branch.num_completion_tokens))
    assert told["computed"] == str(branch.num_prompt_tokens - num_cached)
    common = [a == b for a, b in zip(branch.request.prompt_ids, second.request.prompt_ids, strict=False)].index(False)
    assert num_cached >= common // 32 * 32 > 0, "the shared beginning is not computed again"
    strip = opened.page.locator(".turn.assistant").last.locator("svg")
    assert f"{num_cached} tokens from the cache" in (strip.get_attribute("aria-label") or "")
    opened.page.get_by_text("Why not more?").last.click()
    why = opened.page.locator(".why").last
    expect(why).to_contain_text(f"agree in {common} tokens")
    assert "rain" in "".join(why.locator(".token.new").all_inner_texts())
    assert "sea" in "".join(why.locator(".token.kept").all_inner_texts())
    expect(opened.page.locator(".branches").first).to_contain_text("2 of 2")
    opened.page.get_by_role("button", name="Previous branch").click()
    expect(opened.page.locator(".turn.user").nth(1).locator(".words")).to_have_text("And the sea?")


def test_an_answer_is_stopped_and_gives_its_blocks_back(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    opened.limit(100_000)
    opened.page.locator("[name=temperature]").fill("1")
    opened.unfold("JSON schema")
    opened.page.locator("[name=schema]").fill('{"type": "string", "minLength": 3000}')
    opened.page.locator("#say").fill("Tell me everything.")
    opened.page.keyboard.press("Enter")
    stream = server.wait_for_stream()
    wait_until(lambda: stream.branches[0].num_completion_tokens > 3)
    opened.page.locator("#say").press("Escape")
    wait_until(lambda: stream.branches[0].finish_reason == "abort")
    expect(opened.page.get_by_text("Stopped.")).to_be_visible()
    assert stream.branches[0].num_completion_tokens < 3000
    expect(opened.page.locator(".receipt")).to_contain_text(f"written{stream.branches[0].num_completion_tokens:,}")
    server.assert_idle()


def test_what_is_refused_is_said_and_the_words_are_kept(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    opened.unfold("JSON schema")
    opened.page.locator("[name=schema]").fill("{not json")
    opened.page.locator("#say").fill("Hello")
    opened.page.get_by_role("button", name="Send").click()
    expect(opened.page.get_by_role("alert").last).to_contain_text("The JSON schema is not JSON")
    expect(opened.page.locator("#say")).to_have_value("Hello")
    assert opened.page.locator(".turn").count() == 0


def test_what_fails_again_leaves_the_conversation_as_it_was(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    opened.limit(6)
    opened.say("Hello")
    opened.unfold("JSON schema")
    schema = opened.page.locator("[name=schema]")
    schema.fill("{not json")
    opened.page.get_by_role("button", name="Answer again").click()
    problem = opened.page.locator(".talk > .composer [role=alert]")
    expect(problem).to_contain_text("The JSON schema is not JSON")
    expect(opened.page.locator(".turn")).to_have_count(2)
    edited = opened.page.locator(".turn.user")
    edited.get_by_role("button", name="Edit").click()
    edited.locator("textarea").fill("Good morning")
    edited.get_by_role("button", name="Branch from here").click()
    expect(edited.get_by_role("alert")).to_contain_text("The JSON schema is not JSON")
    expect(edited.locator("textarea")).to_have_value("Good morning")
    expect(opened.page.locator("#say")).to_have_value("")
    schema.fill("")
    edited.get_by_role("button", name="Branch from here").click()
    opened.answered()
    expect(edited.locator(".words")).to_have_text("Good morning")
    expect(edited.locator(".branches")).to_contain_text("2 of 2")
    expect(opened.page.locator(".turn")).to_have_count(2)


def test_the_focus_and_what_is_open_stay(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    opened.limit(6)
    opened.say(QUESTION)
    assert opened.page.locator("h1:visible").all_inner_texts() == ["Chat"]
    why = opened.page.locator(".why").first
    why.locator("summary").click()
    assert opened.page.locator(".receipt > div > :not(dt, dd)").count() == 0, "a list of terms has nothing else in it"
    opened.say("And the sea?")
    expect(why).to_have_attribute("open", "")
    edit = opened.page.get_by_role("button", name="Edit").last
    edit.focus()
    for key in ("Escape", "Cancel"):
        opened.page.keyboard.press("Enter")
        box = opened.page.get_by_label("The turn, to be changed")
        expect(box).to_be_focused()
        box.press("Escape") if key == "Escape" else opened.page.get_by_role("button", name="Cancel").press("Enter")
        expect(edit).to_be_focused()
    opened.page.get_by_role("button", name="Answer again").last.press("Enter")
    opened.answered()
    for name in ("Previous branch", "Next branch"):
        opened.page.get_by_role("button", name=name).press("Enter")
        expect(opened.page.get_by_role("button", name=name)).to_be_focused()


def test_a_first_answer_says_where_it_leaves_the_cache(open_page: Open, server: Server) -> None:
    server.engine.clear_cache()
    opened = open_page(server)
    opened.limit(4)
    reasons = []
    why = opened.page.locator(".why")
    for system in ("You are a sailor. " + QUESTION, "You are a pilot. " + QUESTION):
        opened.page.locator("[name=system]").fill(system)
        found = opened.say("Hello")
        why.locator("summary").click()
        reasons.append(why.inner_text())
        opened.page.get_by_role("button", name="New chat").click() if len(reasons) == 1 else None
    assert "Nothing that is cached goes on from there" in reasons[0]
    assert f"{found.costs.num_cached_tokens} tokens of {found.num_prompt_tokens} came from the cache." in reasons[1]
    assert "differ from what is cached" in reasons[1]
    tokens = [server.engine.model.tokenizer.token_text(each) for each in found.request.prompt_ids]
    expect(why.locator(".token.new").first).to_have_text(tokens[found.costs.num_cached_tokens])
    assert "sailor" in "".join(why.locator(".token.kept").all_inner_texts())
    assert "pilot" in "".join(why.locator(".token.new").all_inner_texts())


def test_a_long_answer_is_followed_and_nothing_covers_its_end(open_page: Open, server: Server) -> None:
    opened = open_page(server, 400)
    opened.unfold("Settings")
    opened.limit(300)
    opened.say(QUESTION)
    turn, composer = opened.page.locator(".turn.assistant"), opened.page.locator(".talk > .composer")
    assert bottom(turn) - top(turn) > 900, "it did not fit"
    assert bottom(turn) <= top(composer)
    assert bottom(composer) - top(composer) < 80, "one row"
    opened.page.locator(".why summary").click()
    expect(opened.page.locator(".why")).to_have_attribute("open", "")
    why = opened.page.locator(".why div")
    wait_until(lambda: bottom(why) <= top(composer))


def top(of: Locator) -> float:
    """Where it begins, in pixels of the window."""
    place = of.bounding_box()
    assert place is not None
    return place["y"]


def bottom(of: Locator) -> float:
    """Where it ends."""
    place = of.bounding_box()
    assert place is not None
    return place["y"] + place["height"]


def test_tool_calls_are_shown(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    opened.limit(400)
    tool = '[{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at":'
    tool += ' {"enum": ["sky", "sea"]}}, "required": ["at"], "additionalProperties": false}}}]'
    opened.unfold("Tools")
    opened.page.locator("[name=tools]").fill(tool)
    opened.page.route("**/v1/chat/completions", must_call)
    opened.page.locator("#say").fill("Look!")
    opened.page.keyboard.press("Enter")
    # Who waits here and not for the engine lets the request be changed.
    call = re.compile(r'look\(\{"at": ?"(sky|sea)"\}\)')
    expect(opened.page.locator(".call")).to_have_text(call, timeout=20_000)
    first = opened.answered()
    opened.page.get_by_text("Why not more?").click()
    why = opened.page.locator(".why")
    expect(why).to_contain_text(f"{first.costs.num_cached_tokens} token")
    assert why.locator(".token.new").count() > 0, "the tokens where the first answer's prompt leaves the cache"


def must_call(route: Route) -> None:
    """The same request, whose answer has to be a call."""
    body = json.loads(route.request.post_data or "")
    route.continue_(post_data=json.dumps({**body, "tool_choice": "required", "parallel_tool_calls": False}))


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
