"""The page in a browser: it draws, follows the keys, says what the trace says, and speaks to nobody."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from explain.conftest import traced
from families.goldens import golden_of
from kvik import LLM, SamplingParams
from kvik.explain.html import render_page
from kvik.explain.page_data import page_data
from kvik.explain.prefixes import default_follow_ups, follow_up
from kvik.explain.run import TracedRun, trace_run
from kvik.explain.selection import select

SECTIONS = ("loop", "head", "work", "phases", "memory", "prefixes")
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (  # as root, without a screen, and without its own talk to its maker
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
MINUS, TIMES = "\u2212", "\u00d7"

FIGURES = {
    "times(99.4, 1)": "99 x",
    "times(99.7, 1)": "100 x",
    "times(1234, 1)": "1,234 x",
    "times(1, 8)": "0.13 x",
    "time(0.0123456)": "12.3 ms",
    "time(0.9994)": "999 ms",
    "time(1.5)": "1.50 s",
    "time(1234.4)": "1,234 s",
    "short(999)": "999",
    "short(999600)": "1.00 M",
    "bytes(1474560)": "1.47 MB",
    "counted(1, 'token')": "1 token",
    "counted(1128, 'token')": "1,128 tokens",
    "percent(0.0994)": "9.9 %",
    "percent(1)": "100 %",
    "real(-0.0004)": "0.000",
    "real(-1.5)": "-1.500",
}

program = next(filter(None, map(shutil.which, PROGRAMS)), None)
pytestmark = pytest.mark.skipif(program is None, reason="no Chromium here: install Debian's package chromium")


@dataclass
class Opened:
    """A page, and whatever it said or asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def go_to(self, step: int) -> None:
        """To a step, counted from 0."""
        self.page.locator("#step").fill(str(step))
        self.page.locator("#step").blur()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()


Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Open what `page_data` gave; in the end nothing may have complained or left the page."""
    opened: list[Opened] = []

    def open_one(data: dict[str, Any], width: int = 1280, **options: Any) -> Opened:
        path = tmp_path / f"{len(opened)}.html"
        path.write_text(render_page(data), encoding="utf-8")
        one = Opened(browser.new_page(viewport={"width": width, "height": 900}, **options))
        opened.append(one)
        one.page.on("console", lambda message: one.complaints.append(message.text))
        one.page.on("pageerror", lambda error: one.complaints.append(str(error)))
        one.page.on("dialog", lambda dialog: one.complaints.append(dialog.message))
        one.page.on("request", lambda request: one.requests.append(request.url))
        one.page.goto(path.as_uri())
        return one

    yield open_one
    for one in opened:
        assert one.complaints == []
        assert [url for url in one.requests[1:] if not url.startswith("data:")] == []
        one.page.close()


@pytest.fixture(scope="module")
def default_run(default_model_path: Path) -> TracedRun:
    """64 tokens of the default model."""
    llm = LLM(str(default_model_path))
    prompt_ids = llm.encode("The cat sat on the mat because")
    spec = llm.model.decoder.spec
    selection = select(spec, spec.kv_spec("f16"), 64)
    params = SamplingParams(max_tokens=64 - len(prompt_ids), ignore_eos=True)
    return trace_run(llm, prompt_ids, params, selection)


@pytest.fixture(scope="module")
def default_data(default_run: TracedRun) -> dict[str, Any]:
    llm = default_run.llm
    follow_ups = default_follow_ups(llm, default_run.prompt_ids, default_run.token_ids)
    return page_data(default_run, "smollm2", [follow_up(llm, default_run.token_ids, *each) for each in follow_ups], [])


def totals(data: dict[str, Any], lane: str, name: str, step: int) -> float:
    return float(sum(each[lane][name] for each in data["steps"][: step + 1]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_every_section_draws_and_nothing_sticks_out(
    open_page: Open, data: dict[str, Any], width: int, scheme: str
) -> None:
    opened = open_page(data, width, color_scheme=scheme)
    for name in SECTIONS:
        figure = opened.page.locator(f"#{name} .figure")
        box = figure.bounding_box()
        assert box is not None
        assert box["height"] > 150, name
        if name != "prefixes":
            assert figure.locator("svg path, svg rect").count() > 3, name
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    assert opened.page.evaluate("document.querySelector('main').innerHTML").count("NaN") == 0
    assert not re.search(r"undefined|\bNaN\b|Infinity|\[object", opened.text("body"))


@pytest.mark.full
def test_the_default_model_in_64_tokens_is_below_2_megabytes(open_page: Open, default_data: dict[str, Any]) -> None:
    assert len(default_data["tokens"]) == 64
    page = render_page(default_data)
    assert len(page.encode()) < 2_000_000
    opened = open_page(default_data)
    opened.page.keyboard.press("End")
    assert opened.text("#position").startswith("step 57 of 57")
    assert "all 1,890 rows agree" not in opened.text("#work")  # of 30 layers, keys and values
    assert "all 3,780 rows agree" in opened.text("#work")
    assert "same bits" in opened.text("#tiles")


def test_keys_slider_and_tokens_step(open_page: Open, data: dict[str, Any]) -> None:
    opened = open_page(data)
    page, last = opened.page, len(data["steps"])

    def position() -> int:
        found = re.match(rf"step (\d+) of {last}:", opened.text("#position"))
        assert found is not None
        return int(found[1])

    page.keyboard.press("Home")
    assert position() == 1
    assert page.locator("#back").is_disabled()
    page.keyboard.press("ArrowLeft")
    assert position() == 1
    page.keyboard.press("ArrowRight")
    assert position() == 2
    page.keyboard.press("End")
    assert position() == last
    assert page.locator("#next").is_disabled()
    page.locator("#back").click()
    assert position() == last - 1
    page.locator("#text button").nth(data["num_prompt_tokens"] + 6).click()
    assert position() == 7
    page.locator("#step").focus()
    page.keyboard.press("ArrowRight")  # the slider's own key, once and not twice
    assert position() == 8
    page.keyboard.press("Control+ArrowRight")
    page.locator("#layer").focus()
    page.keyboard.press("ArrowRight")
    assert position() in (8, 9), "keys of a choice are its own"
    assert page.locator("#text button[aria-current=step]").count() == 1


@pytest.mark.parametrize("step", [0, 3, 29])
def test_totals_are_those_of_the_trace(open_page: Open, data: dict[str, Any], step: int) -> None:
    opened = open_page(data)
    opened.go_to(step)
    cells = opened.page.locator("#work [data-total]").all()
    assert len(cells) == 14
    for cell in cells:
        lane, name = (cell.get_attribute("data-total") or "").split(".")
        wanted = totals(data, lane, name, step)
        assert float(cell.get_attribute("data-value") or "nan") == pytest.approx(wanted, rel=1e-12)
        assert shown(cell.inner_text(), name) == pytest.approx(wanted, rel=5.1e-3)
    computed = [totals(data, lane, "num_tokens", len(data["steps"]) - 1) for lane in ("without", "with_cache")]
    assert f"{computed[0]:,.0f} → {computed[1]:,.0f}" in opened.text("#tiles")


def shown(text: str, name: str) -> float:
    """What a figure with a unit stands for."""
    number, _, unit = text.replace(",", "").partition(" ")
    if name == "seconds":
        return float(number) * {"ms": 1e-3, "s": 1.0}[unit]
    return float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit.removesuffix("B")]


def test_the_head_is_computed_from_the_run(open_page: Open, data: dict[str, Any], run: TracedRun) -> None:
    """Scores, weights and the arithmetic of a cell, against NumPy over what the tracer kept."""
    opened = open_page(data)
    page, step = opened.page, 5
    opened.go_to(step)
    page.locator("#layer").select_option("1")
    page.locator("#query-head").select_option("3")
    position = data["num_prompt_tokens"] - 1 + step
    tracer = run.with_cache.tracer
    q = tracer.queries[1][position, 3].astype(np.float64)
    k = tracer.keys[1].astype(np.float16)[: position + 1, 1].astype(np.float64)  # query heads 2 and 3 share KV head 1
    v = tracer.values[1].astype(np.float16)[: position + 1, 1].astype(np.float64)
    scores = k @ q / 4
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    texts = page.locator("#cells svg text").all_text_contents()
    written = [text.replace(MINUS, "-") for text in texts]
    for score in scores:
        assert any(re.fullmatch(r"-?\d+\.\d\d", text) and abs(float(text) - score) < 0.0051 for text in written), score
    assert largest_difference(opened, run, data) < 2e-6
    assert "shares KV head 1 with 1 other query head" in opened.text("#head .controls")

    def numbers() -> list[float]:
        text = opened.text("#detail").replace(MINUS, "-")
        return [float(number) for number in re.findall(r"(?<![\w\[])-?\d+\.\d+", text)]

    box = page.locator("#cells svg").bounding_box()
    assert box is not None
    cells = page.locator("#cells")
    cells.scroll_into_view_if_needed()
    key_frame = page.locator("#cells svg g").nth(4).locator("rect").nth(1).bounding_box()
    value_frame = page.locator("#cells svg g").nth(4).locator("rect").nth(2).bounding_box()
    assert key_frame is not None
    assert value_frame is not None
    middle = key_frame["y"] + key_frame["height"] / 2
    page.mouse.move(key_frame["x"] + key_frame["width"] * 5.5 / 16, middle)
    assert "k[5]" in opened.text("#detail")
    assert numbers() == pytest.approx([q[5], k[4, 5], q[5] * k[4, 5], k[4] @ q], abs=6e-4)
    page.mouse.move(value_frame["x"] + value_frame["width"] * 2.5 / 16, middle)
    assert "v[2]" in opened.text("#detail")
    output = weights @ v
    assert numbers() == pytest.approx([weights[4], v[4, 2], weights[4] * v[4, 2], output[2]], abs=6e-4)
    cells.focus()
    page.keyboard.press("Home")  # not one of the picture's: it goes to the page
    assert opened.text("#position").startswith("step 1 of")


def test_cells_can_be_chosen_with_the_keyboard(open_page: Open, data: dict[str, Any]) -> None:
    opened = open_page(data)
    opened.go_to(4)
    cells = opened.page.locator("#cells")
    cells.focus()
    assert opened.text("#detail").startswith("weight of")
    for _ in range(11):
        opened.page.keyboard.press("ArrowUp")
    assert opened.text("#detail").startswith(f"weight of “{data['tokens'][0]['text']}”")
    seen = []
    for key in ("ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowUp", "ArrowDown", "ArrowDown"):
        opened.page.keyboard.press(key)
        seen.append(opened.text("#detail"))
    assert seen[0].startswith("score of")
    assert seen[1].startswith(f"q[15] {TIMES} k[15]")
    assert seen[2].startswith(f"q[14] {TIMES} k[14]")
    assert seen[3].startswith("q[14] = ")
    assert seen[4].startswith(f"q[14] {TIMES} k[14]")
    assert seen[5] != seen[4]
    for _ in range(60):
        opened.page.keyboard.press("ArrowRight")
    assert "v[15]" in opened.text("#detail")
    for _ in range(40):
        opened.page.keyboard.press("ArrowDown")
    assert opened.text("#detail").startswith("output[15] = ")
    assert opened.text("#position").startswith("step 5 of"), "the picture's keys do not step"


def test_heads_are_drawn_as_mha_gqa_and_mqa(open_page: Open, data: dict[str, Any]) -> None:
    opened = open_page(data)
    for num_kv_heads in (4, 2, 1):
        opened.page.locator(f"#memory input[value='{num_kv_heads}']").check()
        assert opened.page.locator("#heads rect").count() == num_kv_heads
        assert opened.page.locator("#heads circle").count() == 4
    rows = [row.split("\t")[:4] for row in opened.page.locator("#memory [data-variant]").all_inner_texts()]
    assert rows == [["MHA", "4", "512", "100 %"], ["GQA (this)", "2", "256", "50 %"], ["MQA", "1", "128", "25 %"]]
    product = f"2 layers {TIMES} 2 KV heads {TIMES} 32 bytes (16 numbers of type f16) = 256 bytes"
    assert product in opened.text("#memory-sentence")


def test_prefixes_say_where_the_match_ends_and_why(open_page: Open, data: dict[str, Any]) -> None:
    opened = open_page(data)
    turn, other = opened.page.locator("#prefixes article").all_inner_texts()
    found_turn, found_other = data["follow_ups"]
    assert "all that the first one has. There the match ends." in turn
    assert "copied as far as both agree" in turn
    assert f"agree in their first {found_other['num_common_tokens']} tokens" in other
    assert "There the match ends." in other
    tokens = opened.page.locator("#prefixes article").nth(0).locator(".token")
    assert tokens.count() == len(found_turn["tokens"])
    kept = opened.page.locator("#prefixes article").nth(0).locator(".token.kept")
    assert kept.count() == found_turn["num_shared_tokens"] == 32


def test_a_window_hides_the_tokens_before_it(open_page: Open, tmp_path: Path) -> None:
    llm = LLM(str(golden_of("gemma2").write_folder(tmp_path / "model")))
    run = traced(llm, list(range(3, 40)), 3)
    data = page_data(run, "gemma", [], [])
    window = next(layer for layer in data["layers"] if layer["window"])
    opened = open_page(data)
    opened.page.locator("#layer").select_option(str(data["layers"].index(window)))
    opened.page.keyboard.press("Tab")
    opened.page.keyboard.press("End")
    assert opened.page.locator("#cells svg g").count() == window["window"]
    assert "sees the newest 24 tokens" in opened.text("#head .controls")
    assert "tanh" in opened.text("#head .formula"), "Gemma 2 caps its scores"
    assert "this model's own scale" in opened.text("#head .formula")
    arithmetic = pointed_at_score(opened)
    assert largest_difference(opened, run, data) < 2e-5, "window, scale and cap together"
    assert arithmetic.startswith("score of")
    assert "tanh" in arithmetic


def largest_difference(opened: Opened, run: TracedRun, data: dict[str, Any]) -> float:
    """Between what the page computes for each drawn head at each token, and what the engine's attention gave."""
    largest = 0.0
    for index, layer in enumerate(data["layers"]):
        computed = opened.page.evaluate(
            """async ([index, numHeads, numTokens]) => {
                const { readTrace } = await import("kvik/trace.js");
                const { attend } = await import("kvik/attention.js");
                const layer = readTrace().layers[index];
                const all = (count, make) => Array.from({ length: count }, (_, at) => make(at));
                return all(numTokens, (position) => all(numHeads, (head) => attend(layer, head, position).output));
            }""",
            [index, len(layer["heads"]), len(data["tokens"]) - 1],
        )
        attended = run.with_cache.tracer.attended[index][:, layer["heads"]]
        largest = max(largest, float(np.abs(np.array(computed) - attended).max()))
    return largest


def pointed_at_score(opened: Opened) -> str:
    """The arithmetic of the last row's score."""
    opened.page.locator("#cells").focus()
    opened.page.keyboard.press("ArrowLeft")
    opened.page.locator("#cells").blur()
    return opened.text("#detail")


def test_blocks_that_a_window_gave_back_are_striped(open_page: Open, tmp_path: Path) -> None:
    llm = LLM(str(golden_of("gemma3").write_folder(tmp_path / "model")))
    run = traced(llm, list(range(3, 83)), 3)
    data = page_data(run, "gemma", [], [])
    (window,) = data["memory"]["windows"]
    opened = open_page(data)
    assert largest_difference(opened, run, data) < 2e-5
    opened.go_to(2)
    kept = len(data["tokens"]) - 1
    gone = (kept + 1 - window["window"]) // 32
    assert gone > 0
    assert f"gave back {gone} block" in opened.text("#memory-sentence")
    stripes = opened.page.locator("#memory svg rect[style*='given-back']")
    assert float(stripes.get_attribute("height") or 0) == 34 * gone
    held = run.with_cache.lane.engine.kv_spec.held_bytes(kept)
    assert data["memory"]["held_bytes"][kept] == held
    longest = data["memory"]["variants"][0]
    assert longest["whole_context_bytes"] >= max(longest["context_bytes"]), "a longer text takes no less"


def test_an_int8_cache_counts_its_scales(open_page: Open, tiny: Path) -> None:
    run = traced(LLM(str(tiny), kv_dtype="int8"), max_tokens=3)
    data = page_data(run, "tiny", [], [])
    opened = open_page(data)
    assert largest_difference(opened, run, data) < 1e-4
    sentence = opened.text("#memory-sentence")
    assert f"2 KV heads {TIMES} 20 bytes (16 numbers of type int8 and a scale) = 160 bytes" in sentence
    assert "queries and weights to 16-bit integers" in opened.text("#head")


def test_256_tokens_are_drawn_and_a_chosen_cell_stays_in_view(open_page: Open, llm: LLM) -> None:
    opened = open_page(page_data(traced(llm, list(range(3, 253)), 6), "tiny", [], []))
    page = opened.page
    assert opened.text("#position").startswith("step 5 of 6")
    page.locator("#cells").focus()
    for _ in range(120):
        page.keyboard.press("ArrowUp")
    top, bottom, mark = page.evaluate(
        """() => {
            const place = (name) => document.querySelector(name).getBoundingClientRect();
            const [outer, inner] = [place("#cells"), place("#chosen")];
            return [outer.top, outer.bottom, (inner.top + inner.bottom) / 2];
        }"""
    )
    assert top <= mark <= bottom
    assert page.locator("#text button[tabindex='0']").count() == 1


def test_emoji_and_long_tokens_are_cut_between_characters(open_page: Open, data: dict[str, Any]) -> None:
    changed = [dict(token, text="\U0001f600" * 40) for token in data["tokens"]]
    opened = open_page({**data, "tokens": changed})
    assert "\ufffd" not in opened.text("body")
    labels = opened.page.locator("#cells svg text").all_text_contents()
    assert any(label.startswith("\U0001f600") and label.endswith("…") for label in labels)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 1280


def test_a_space_is_seen_in_pictures(open_page: Open, data: dict[str, Any]) -> None:
    changed = [dict(token, text=" a " if at % 2 else " ") for at, token in enumerate(data["tokens"])]
    opened = open_page({**data, "tokens": changed})
    labels = opened.page.locator("#cells svg text").all_text_contents()
    assert "␣a␣" in labels
    assert "␣" in labels
    assert "“a”" in opened.text("#position")


def test_figures_are_written_without_exponents(open_page: Open, data: dict[str, Any]) -> None:
    opened = open_page(data)
    for expression, shown in FIGURES.items():
        found = opened.page.evaluate(f"import('kvik/figures.js').then((module) => module.{expression})")
        assert found == shown.replace("x", TIMES).replace("-", MINUS), expression


def test_one_token_after_one_token(open_page: Open, llm: LLM) -> None:
    opened = open_page(page_data(traced(llm, [5], 1), "tiny", [], []))
    assert opened.text("#position").startswith("step 1 of 1")
    assert opened.page.locator("#next").is_disabled()
    assert "There is one row" in opened.text("#loop")
    assert "here the run stops" in opened.text("#loop")
    assert "This prompt is one token" in opened.text("#phases") or "computes 1 token with" in opened.text("#phases")
    assert "no room" in opened.text("#prefixes")
    assert not re.search(r"undefined|NaN|Infinity", opened.text("body"))


def test_hostile_text_is_text(open_page: Open, llm: LLM) -> None:
    run = traced(llm, "</script><img src=x onerror=alert(1)>__DATA__", 2)
    name = "</title><script>alert(2)</script>"
    opened = open_page(page_data(run, name, [], []))
    assert name in opened.text("#kicker")
    assert opened.page.locator("img").count() == 0


def test_the_page_may_not_reach_the_network(open_page: Open, data: dict[str, Any]) -> None:
    opened = open_page(data)
    answer = opened.page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.name)")
    assert answer == "TypeError"
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)
    opened.complaints.clear()
    opened.requests[:] = opened.requests[:1]


def test_printed_it_has_no_controls(open_page: Open, data: dict[str, Any]) -> None:
    opened = open_page(data, color_scheme="dark")
    opened.page.emulate_media(media="print")
    assert not opened.page.locator("#steps").is_visible()
    colour = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == "rgb(255, 255, 255)", "ink on white whatever the screen's colours are"
    assert len(opened.page.pdf(format="A4")) > 10_000
