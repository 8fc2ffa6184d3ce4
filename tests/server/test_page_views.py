"""The page at `/` before a server that the tests play: what it draws of any state, and what it does when refused."""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from kvik.server.live.page_files import PAGE, PAGE_FILES

ADDRESS = "http://127.0.0.1:9"

program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(program is None, reason="no Chromium here: install Debian's package chromium")

# The events are fed by `send`; before that each of `refusals` is answered once.
PLAYED = """
window.refusals = REFUSALS;
window.joined = 0;
const others = fetch;
window.fetch = async (path, options) => {
  if (path !== "/v1/events") return others(path, options);
  const refused = refusals.shift();
  if (refused) return new Response('{"error": {"message": "not now"}}', refused);
  joined += 1;
  const stream = new ReadableStream({ start: (controller) => (window.feed = controller) });
  return new Response(stream);
};
window.send = (name, data) => {
  const told = JSON.stringify({ now_s: performance.now() / 1000 + 1000, ...data });
  feed.enqueue(new TextEncoder().encode(`event: ${name}\\ndata: ${told}\\n\\n`));
};
"""

COUNTERS = dict.fromkeys(
    (
        *("held_blocks", "reusable_blocks", "free_blocks", "generated_tokens", "computed_tokens", "cached_tokens"),
        *("queried_tokens", "found_tokens", "committed_bytes", "evicted_blocks", "copied_blocks", "running", "waiting"),
    ),
    0,
)


def state(num_blocks: int = 64, requests: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """A model with that many blocks, which are free but for those that requests hold."""
    states = bytearray(num_blocks)
    for row in requests or ():
        for block in row["blocks"][0]:
            states[block] += 2
    model = {
        "id": "played",
        "is_chat": True,
        "context": 4096,
        "block_size": 32,
        "token_bytes": 1024,
        "kv_dtype": "int8",
        "num_bytes": num_blocks << 15,
        "weight_bytes": 1 << 20,
        "groups": [{"kind": "full", "layers": 2, "block_bytes": 1 << 15, "num_blocks": num_blocks}],
        "states": [base64.b64encode(states).decode()],
        "requests": requests or [],
        "hits": [[], []],
        "counters": COUNTERS | {"free_blocks": num_blocks},
        "history": {"names": ["at_s", *COUNTERS], "rows": []},
    }
    return {"sees_text": True, "models": [model | changes]}


def request(key: int, phase: str = "decode", blocks: list[int] | None = None, **changes: Any) -> dict[str, Any]:
    """A row of one that is as far as its phase says, submitted a second after the one before."""
    times = {"queued": 1, "prefill": 2, "decode": 4, "done": 4}[phase]
    names = ("submitted_s", "begun_s", "first_token_s", "last_token_s")
    return {
        "key": key,
        "request_id": f"req-{key:024x}",
        "choice": 0,
        "prompt": f"Question {key}: why?",
        "written": "",
        "phase": phase,
        "num_prompt_tokens": 64,
        "num_cached_tokens": 32,
        "num_computed_tokens": 32,
        "num_written_tokens": 2 if times == 4 else 0,
        "miss_reason": None,
        "finish_reason": "stop" if phase == "done" else None,
        "is_own": True,
        "blocks": [blocks or []],
        **{name: 900 + key + at / 10 if at < times else None for at, name in enumerate(names)},
        **changes,
    }


def change(**changes: Any) -> dict[str, Any]:
    """A message in which nothing has changed but what is named."""
    nothing: dict[str, Any] = {"id": "played", "counters": COUNTERS, "blocks": [[[], []]], "requests": []}
    return {"models": [nothing | {"hits": [[], []], "gone": [], "evicted": [], "copied": []} | changes]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


Answers = dict[str, tuple[int, Any]]
Play = Callable[..., Page]


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


def feed(page: Page, name: str, data: dict[str, Any]) -> None:
    """Have the page get a message, once it listens."""
    page.wait_for_function("window.joined > 0")
    page.evaluate("([name, data]) => send(name, data)", [name, data])
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


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


PLAN = {
    "max_context": 4096,
    "kv_dtypes": ["f16", "int8"],
    "kv_dtype": "f16",
    "context": 1024,
    "users": 4,
    "attention": "GQA",
    "bytes": {"token": 1, "sequence": 1, "kv": 1, "weights": 1, "others": 1, "needed": 3, "memory": 4},
    "fits": True,
    "most_users": 4,
    "largest_context": 4096,
    "doubled": None,
    "advice": [],
}


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


PIECES = (
    *("\n", "\n\n", " ", "a", "word ", "**", "*", "_", "__", "~~", "`", "``", "```", "~~~", "\\", "|", "a|b\n|-|-|\n"),
    *(
        "# ",
        "- ",
        "1. ",
        "2) ",
        "> ",
        "    ",
        "---",
        "***\n",
        "<",
        "<b>x</b>",
        "<script>alert(1)</script>",
        "&lt;",
        "&",
    ),
    *("<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "[x](data:text/html,x)", "![x](http://x/y.png)"),
    *(
        "[x](https://example.org/a?b=c)",
        "[x]( http://x)",
        '[x](http://x" onclick="y)',
        "http://example.org.",
        "[",
        "](",
        ")",
    ),
    *("https://user:pass@x/", "é", "\u202e", "\x00", "🙂", "\t"),
)


def test_markdown_is_never_read_as_html(play: Play) -> None:
    """Whatever a model writes becomes these elements and attributes alone, in whatever pieces it comes."""
    rng = random.Random(7)
    texts = ["".join(rng.choices(PIECES, k=rng.randrange(1, 40))) for _ in range(1500)]
    size = 20_000
    texts += [piece * (size // len(piece)) for piece in PIECES if piece.strip()]
    texts += [
        "> " * 5000 + "x",
        "- " * 5000 + "x",
        "[" * size,
        "**a " * 5000,
        "`a``b" * 4000,
        "|" * size + "\n" + "|-" * size,
    ]
    page = play("chat")
    wrong = page.evaluate(
        """async ([texts, cuts]) => {
            const { Markdown } = await import("/page/markdown.js");
            const LISTS = "HR LI OL UL TABLE TBODY TD TH THEAD TR";
            const NAMES = `A BLOCKQUOTE CODE DEL DIV EM H3 H4 H5 H6 P PRE SMALL STRONG ${LISTS}`.split(" ");
            const ATTRIBUTES = "aria-label class href rel role scope start tabindex target".split(" ");
            const isKnown = ({ name }) => ATTRIBUTES.includes(name);
            const wrong = [];
            for (const [at, text] of texts.entries()) {
                const whole = new Markdown();
                whole.append(text);
                for (const element of whole.element.querySelectorAll("*")) {
                    const isGood = NAMES.includes(element.tagName) && [...element.attributes].every(isKnown);
                    const { href, rel } = element;
                    const isSafe = href === undefined || (/^https?:/.test(href) && rel.includes("noopener"));
                    if (!isGood || !isSafe) wrong.push([at, element.outerHTML]);
                }
                if (at >= cuts.length) continue;
                const parts = new Markdown();
                let from = 0;
                for (const cut of [...cuts[at], text.length]) {
                    parts.append(text.slice(from, cut));
                    from = Math.max(from, cut);
                }
                const found = [parts, whole].map(({ element }) => element.innerHTML);
                if (found[0] !== found[1]) wrong.push([at, text, ...found]);
            }
            return wrong.slice(0, 3);
        }""",
        [texts, [sorted(rng.randrange(len(text) + 1) for _ in range(12)) for text in texts[:1500]]],
    )
    assert wrong == []


def test_markdown_is_shown(play: Play) -> None:
    text = """# Title

A *word*, **two**, ~~gone~~ and `a * b`, snake_case_name, 2 * 3 * 4,
[here](https://example.org/x), https://kvik.dev.

- one
  1. inner
- two

```python
print("**as it is**")
```

| a | b |
|---|--:|
| 1 | x |
| 2 \\| 3 | 4 |

> quoted
"""
    page = play("chat")
    found = page.evaluate(
        """async (text) => {
            const { Markdown } = await import("/page/markdown.js");
            const made = new Markdown();
            made.append(text);
            const of = (selector) => [...made.element.querySelectorAll(selector)].map((each) => each.textContent);
            const names = ["h3", "em", "strong", "del", "p code", "a", "ul > li", "ol > li", "pre", "th", "td"];
            return Object.fromEntries([...names, "blockquote"].map((each) => [each, of(each)]));
        }""",
        text,
    )
    assert found == {
        "h3": ["Title"],
        "em": ["word"],
        "strong": ["two"],
        "del": ["gone"],
        "p code": ["a * b"],
        "a": ["here (example.org)", "https://kvik.dev"],
        "ul > li": ["oneinner", "two"],
        "ol > li": ["inner"],
        "pre": ['print("**as it is**")'],
        "th": ["a", "b"],
        "td": ["1", "x", "2 | 3", "4"],
        "blockquote": ["quoted"],
    }


def test_only_the_last_blocks_are_made_again(play: Play) -> None:
    page = play("chat")
    kept = page.evaluate(
        """async () => {
            const { Markdown } = await import("/page/markdown.js");
            const made = new Markdown();
            for (let at = 0; at < 50; at++) made.append(`Paragraph ${at}.\n\n`);
            const before = [...made.element.children];
            made.append("and ");
            made.append("more");
            const after = [...made.element.children];
            return before.filter((element, at) => after[at] === element).length;
        }"""
    )
    assert kept >= 48


def test_cells_are_light_on_paper(play: Play) -> None:
    page = play("blocks", color_scheme="dark")
    feed(page, "state", state(requests=[request(1, blocks=[0]), request(2, blocks=[0])]))
    pixel = "[...document.querySelector('#blocks canvas').getContext('2d').getImageData(3, 3, 1, 1).data]"
    assert page.evaluate(pixel) == [0x56, 0xB4, 0xE9, 255]
    page.emulate_media(media="print")
    page.wait_for_function(f"String({pixel}) === '0,114,178,255'")
    page.emulate_media(media="screen")
    page.wait_for_function(f"String({pixel}) === '86,180,233,255'")


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
