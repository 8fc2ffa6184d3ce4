"""The page at `/` before a server that the tests play: what it draws of any state, and what it does when refused."""

from __future__ import annotations

import base64
import json
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
                status, body = next(value for start, value in told.items() if path.startswith(start))
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
    expect(page.locator("#blocks .counts")).to_contain_text("50,000 free")
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
    expect(shown.first.locator(".what > span")).to_have_text("Question 1: why?")
    expect(shown.first.locator("small")).to_have_text("…000001")
    assert shown.first.locator(".what").get_attribute("title") == f"req-{1:024x}"
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


def test_numbers_have_gaps_where_nobody_watched_and_no_prompt_came(play: Play) -> None:
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


def test_cells_are_light_on_paper(play: Play) -> None:
    page = play("blocks", color_scheme="dark")
    feed(page, "state", state(requests=[request(1, blocks=[0]), request(2, blocks=[0])]))
    pixel = "[...document.querySelector('#blocks canvas').getContext('2d').getImageData(3, 3, 1, 1).data]"
    assert page.evaluate(pixel) == [0x56, 0xB4, 0xE9, 255]
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(pixel) == [0x00, 0x72, 0xB2, 255]
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(pixel) == [0x56, 0xB4, 0xE9, 255]


def test_a_chosen_run_is_as_new_as_the_tree(play: Play) -> None:
    run = {"first_token": 0, "num_tokens": 32, "num_blocks": 1, "num_holders": 1, "last_block": 3, "text": "Why?"}
    tree = {"data": [run], "has_more": False}
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
