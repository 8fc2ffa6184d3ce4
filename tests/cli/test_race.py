"""`kvik race`: the lanes, their comparison, and what is printed."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from command_line import CTRL_C, Kvik, Terminal
from families.goldens import golden_of
from kvik import LLM, SamplingParams
from kvik.cli.race import DEFAULT_PROMPT
from kvik.cli.race_report import cost_of_token
from kvik.cli.terminal import INTERRUPTED
from kvik.config import TOKEN_BUDGET
from kvik.measure.lanes import RaceLane, Verdict, compare, digest, make_lanes, run_race
from kvik.measure.lengths import LengthCost, whole_text_s
from work_formulas import TinyShape

SCHEMA = Path(__file__).parents[2] / "docs/schemas/race-1.json"
SHAPE = TinyShape()
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)
SHORT = ("--max-tokens", "30")


@pytest.fixture(scope="module")
def llm(tiny: Path) -> LLM:
    return LLM(str(tiny))


def finished(llm: LLM, params: SamplingParams = PARAMS) -> tuple[RaceLane, RaceLane]:
    lanes = make_lanes(llm, llm.encode("hello there"), params)
    assert run_race(lanes, lambda: None)
    return lanes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_lanes_do_the_same_bit_for_bit(llm: LLM, temperature: float) -> None:
    lanes = finished(llm, SamplingParams(max_tokens=40, ignore_eos=True, temperature=temperature))
    assert compare(*lanes) == Verdict(40, None, None)
    assert compare(*lanes).is_same
    without, with_cache = lanes
    prompt = without.sequence.num_prompt_tokens
    assert with_cache.sequence.costs.num_computed_tokens == prompt + 39
    assert without.sequence.costs.num_computed_tokens == sum(range(prompt, prompt + 40))
    assert without.kv_kept_bytes == 0
    assert with_cache.kv_kept_bytes > 0


def test_the_lane_that_is_behind_steps_next(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = make_lanes(llm, llm.encode("hello"), SamplingParams(max_tokens=6, ignore_eos=True))
    order: list[str] = []

    def step(lane: RaceLane) -> None:
        lane.engine.step()
        lane.elapsed_s += 1.0 if lane.sequence.request.use_cache else 2.5
        order.append("+" if lane.sequence.request.use_cache else "-")

    monkeypatch.setattr(RaceLane, "step", step)
    assert run_race(lanes, lambda: None)
    assert "".join(order) == "-+++-++-+---"


def test_a_difference_is_found_where_it_begins(llm: LLM) -> None:
    lanes = finished(llm)
    lanes[1].digests[16] = lanes[1].digests[30] = b""
    assert compare(*lanes) == Verdict(40, None, 17)
    lanes[0].sequence.token_ids[-1] ^= 1
    assert compare(*lanes) == Verdict(40, 40, 17)
    assert not compare(*lanes).is_same


@pytest.mark.parametrize("other", [-0.0, np.nextafter(np.float32(0), np.float32(1))])
def test_one_bit_is_a_difference(other: float) -> None:
    row = np.zeros(50_000, np.float32)
    before = digest(row)
    row[-1] = other
    assert digest(row) != before


def test_a_race_that_is_stopped_compares_what_both_have(llm: LLM) -> None:
    lanes = make_lanes(llm, llm.encode("hello there"), PARAMS)
    steps = iter(range(25))
    assert not run_race(lanes, lambda: None, lambda: next(steps, None) is None)
    assert lanes[0].num_tokens + lanes[1].num_tokens == 25
    assert all(lane.is_done for lane in lanes)
    assert compare(*lanes) == Verdict(min(lane.num_tokens for lane in lanes), None, None)


def test_the_result_is_on_stdout(kvik: Kvik) -> None:
    result = kvik("race", *SHORT)
    assert result.exit_code == 0
    parts = result.stdout.split("\n\n")
    assert parts[0].startswith("both lanes wrote:\n")
    table, curve, growth, lengths, verdict = (part.splitlines() for part in parts[-5:])
    heading, without, with_cache = table
    assert heading.split("  ")[0] == "lane"
    assert re.match(r"without the cache +30 +\d+\.\d\d s +\S+ +\S+ m?s +[\d,]+ +0 B$", without)
    assert re.match(r"with the cache +30 +\d+\.\d\d s +\S+ +\S+ m?s +\d+ +[\d.]+ kB$", with_cache)
    assert len(heading) == len(without) == len(with_cache)
    assert [line.split()[0] for line in curve[2:-1]] == ["1", "2", "4", "8", "16", "30"]
    assert curve[-1].startswith("without the cache, ")
    assert len(growth) == 5
    assert all(line.count("n^") == 2 for line in growth[1:])
    assert [line.split()[0] for line in lengths[3:]] == ["64", "128", "256", "512", "1,024", "2,048"]
    assert re.fullmatch(r"ratio: [\d.]+ × faster, [\d.]+ × fewer tokens computed", verdict[0])  # noqa: RUF001
    assert verdict[1] == "same tokens: yes (30/30), same logits: bit for bit"
    first, *others = result.stderr.splitlines()
    assert DEFAULT_PROMPT in first
    assert others == ["timing one token at 6 lengths up to 2,048"]


def test_work_is_that_of_closed_formulas(kvik: Kvik) -> None:
    report = json.loads(kvik("race", "--raw", "q" * 600, "--json", "--max-tokens", "6", "--lengths", "5,700").stdout)
    prompt, kv = len(report["prompt"]["token_ids"]), SHAPE.kv_token_bytes("f16")
    assert prompt > 2 * TOKEN_BUDGET  # the first token takes three steps
    without, with_cache = report["lanes"]
    for lane in (without, with_cache):
        assert lane["num_cached_prompt_tokens"] == 0
        assert [one["length"] for one in lane["tokens"]] == list(range(prompt, prompt + 6))
        for index, one in enumerate(lane["tokens"]):
            first = 0 if index == 0 or not lane["use_cache"] else one["length"] - 1
            assert_is_work(one, first, one["length"], kv)
    total = sum(range(prompt, prompt + 6))
    assert without["num_computed_tokens"] == total
    assert without["num_repeated_tokens"] == total - (prompt + 5)
    assert with_cache["num_repeated_tokens"] == with_cache["repeated_multiply_adds"] == 0
    repeats = [(0, length - 1) for length in range(prompt + 1, prompt + 6)]
    assert without["repeated_multiply_adds"] == sum(
        SHAPE.multiply_adds(last - first, 0) + SHAPE.attention(first, last) for first, last in repeats
    )
    assert [one["length"] for one in report["lengths"]] == [1, 5, 700]
    for one in report["lengths"]:
        assert_is_work(one["first_token"], 0, one["length"], kv)
        assert_is_work(one["later_token"], one["length"], one["length"] + 1, kv)


def assert_is_work(counts: dict[str, int], first: int, last: int, kv_token_bytes: int) -> None:
    """Of tokens at positions `first` ... `last` - 1, in steps of `TOKEN_BUDGET`, and one row of logits."""
    ends = [*range(first + TOKEN_BUDGET, last, TOKEN_BUDGET), last]
    head = SHAPE.vocab * SHAPE.hidden * 34 // 32 + SHAPE.hidden * 4
    assert counts["num_steps"] == len(ends)
    assert counts["num_computed_tokens"] == last - first
    assert counts["weight_multiply_adds"] == SHAPE.multiply_adds(last - first, 1)
    assert counts["attention_multiply_adds"] == SHAPE.attention(first, last)
    assert counts["weight_bytes"] == len(ends) * SHAPE.step_bytes() - (len(ends) - 1) * head
    assert counts["kv_bytes"] == kv_token_bytes * sum(ends)


def test_tokens_of_guesses_are_counted_with_their_step(llm: LLM) -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True, speculate="ngram")
    lanes = make_lanes(llm, llm.encode("ab ab ab ab ab ab"), params)
    assert run_race(lanes, lambda: None)
    without, with_cache = lanes
    assert all(cost.num_tokens == 1 for cost in without.costs)
    assert max(cost.num_tokens for cost in with_cache.costs) > 1  # some guesses are right
    for lane in lanes:
        assert sum(cost.num_tokens for cost in lane.costs) == lane.num_tokens == 60
        last, so_far_s = cost_of_token(lane, 60)
        assert last is lane.costs[-1]
        assert so_far_s == pytest.approx(lane.elapsed_s)
        assert cost_of_token(lane, 1) == (lane.costs[0], lane.costs[0].seconds)


def test_multiply_adds_grow_as_they_must(kvik: Kvik) -> None:
    report = json.loads(kvik("race", "hello", "--raw", "--json", "--max-tokens", "200", "--lengths", "none").stdout)
    assert report["lengths"] == []
    fits = {(fit["cost"], fit["lane"]): fit for fit in report["growth"]}
    assert len(fits) == 4
    without, with_cache = (fits["its multiply-adds", name] for name in ("without the cache", "with the cache"))
    assert 0.9 < without["low"] <= without["exponent"] <= without["high"] < 1.7
    assert 0.0 < with_cache["low"] <= with_cache["exponent"] <= with_cache["high"] < 0.6
    assert without["num_points"] == 199


def test_a_length_is_timed_so_often_as_asked(kvik: Kvik) -> None:
    report = json.loads(kvik("race", "--json", "--max-tokens", "2", "--lengths", "40", "--rounds", "2").stdout)
    for one in report["lengths"]:
        assert len(one["first_token_s"]) == len(one["later_token_s"]) == 2
        assert min(one["first_token_s"] + one["later_token_s"]) > 0


def test_a_text_is_summed_over_costs_between_the_lengths() -> None:
    costs = [LengthCost(1, [1.0], [0.5]), LengthCost(3, [5.0], [0.5]), LengthCost(5, [9.0], [1.5])]
    assert whole_text_s(costs, 1) == (1.0, 0.5)
    assert whole_text_s(costs, 5) == (1.0 + 3 + 5 + 7 + 9, 0.5 + 0.5 + 0.5 + 1 + 1.5)


def test_lengths_beyond_a_small_context_are_left_out_unless_asked_for(kvik: Kvik) -> None:
    result = kvik("race", "--raw", "hello", "--context", "300", "--max-tokens", "3")
    assert result.exit_code == 0
    assert "timing one token at 3 lengths up to 256" in result.stderr


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_curves_are_drawn(kvik: Kvik, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"race.{suffix}"
    result = kvik("race", *SHORT, "--plot", str(path))
    assert result.exit_code == 0
    assert result.stderr.splitlines()[-1] == f"drawn: {path}"
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert len(content) > 10_000


def test_no_curves_without_matplotlib(kvik: Kvik, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = kvik("race", "--plot", str(tmp_path / "race.png"))
    assert result.exit_code == 2
    assert result.stderr == "InvalidInput: --plot needs matplotlib\nhint: install it: pip install 'kvik[plot]'\n"


def test_layers_with_a_window_are_counted_too(tmp_path: Path) -> None:
    folder = golden_of("gemma2").write_folder(tmp_path)
    without, with_cache = finished(LLM(str(folder)))
    assert compare(without, with_cache).is_same
    assert [cost.repeated.num_tokens for cost in with_cache.costs] == [0] * 40
    assert without.costs[-1].repeated.num_tokens == without.costs[-1].work.num_tokens - 1


def test_a_log_gets_a_line_now_and_then(kvik: Kvik, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvik.cli.race_view.LINE_S", 0.0)
    lines = kvik("race", *SHORT).stderr.splitlines()
    assert len(lines) == 1 + 60 + 1  # a line after each step of both lanes
    assert re.fullmatch(r"without the cache: 1/30 tokens, [\d.]+ s · with the cache: 0/30 tokens, 0\.0 s", lines[1])
    assert re.fullmatch(r"without the cache: 30/30 tokens, .* with the cache: 30/30 tokens, [\d.]+ s", lines[-2])


def test_a_prompt_of_several_chunks(kvik: Kvik) -> None:
    result = kvik("race", "--raw", "q" * 1100, "--max-tokens", "4")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "same tokens: yes (4/4), same logits: bit for bit"


def test_json_is_complete(kvik: Kvik) -> None:
    result = kvik("race", "hello", "--json", "--raw", *SHORT)
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    values = json.loads(result.stdout)
    jsonschema.validate(values, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert values["prompt"]["raw"] is True
    assert values["params"]["max_tokens"] == values["num_compared_tokens"] == 30
    assert (values["same_tokens"], values["same_logits"], values["is_interrupted"]) == (True, True, False)
    assert (values["first_token_difference"], values["first_logits_difference"]) == (None, None)
    assert [lane["use_cache"] for lane in values["lanes"]] == [False, True]
    for lane in values["lanes"]:
        assert len(lane["token_ids"]) == lane["num_completion_tokens"] == 30
        assert lane["total_s"] >= lane["time_to_first_token_s"] > 0


def test_a_difference_is_exit_1(kvik: Kvik, monkeypatch: pytest.MonkeyPatch) -> None:
    step = RaceLane.step

    def wrong_step(lane: RaceLane) -> None:
        step(lane)
        if lane.sequence.request.use_cache and lane.num_tokens == 17:
            lane.digests[-1] = digest(np.zeros(1, np.float32))

    monkeypatch.setattr(RaceLane, "step", wrong_step)
    result = kvik("race", *SHORT)
    assert result.exit_code == 1
    line = "same tokens: yes (30/30), same logits: no (first difference at token 17)"
    assert result.stdout.splitlines()[-1] == line


def test_other_tokens_are_exit_1_and_both_texts_are_shown(kvik: Kvik, monkeypatch: pytest.MonkeyPatch) -> None:
    step = RaceLane.step

    def wrong_step(lane: RaceLane) -> None:
        step(lane)
        if lane.sequence.request.use_cache and lane.num_tokens == 9:
            lane.sequence.token_ids[-1] ^= 1
            lane.sequence.text.parts[-1] += "!"

    monkeypatch.setattr(RaceLane, "step", wrong_step)
    result = kvik("race", *SHORT)
    assert result.exit_code == 1
    assert result.stdout.startswith("without the cache:\n")
    assert "\nwith the cache:\n" in result.stdout
    assert "same tokens: no (first difference at token 9), same logits: no" in result.stdout


def test_ctrl_c_shows_what_there_is(kvik: Kvik, interrupt_at: Callable[[int], None]) -> None:
    interrupt_at(22)  # two of them warmed the lanes up
    result = kvik("race", *SHORT)
    assert result.exit_code == INTERRUPTED
    assert re.search(r"^same tokens: yes \((\d+)/\1\), same logits: bit for bit$", result.stdout, re.MULTILINE)
    assert re.search(r"^interrupted; compared are the \d+ tokens that both lanes have$", result.stderr, re.MULTILINE)


def test_ctrl_c_while_lengths_are_timed_keeps_those_that_were(
    kvik: Kvik, interrupt_at: Callable[[int], None], tmp_path: Path
) -> None:
    # 2 steps warm up, 2 x 3 race, 6 are length 1 of the first round, 6 the next: in the 2nd of the third.
    interrupt_at(22)
    result = kvik("race", "--max-tokens", "3", "--lengths", "40,50", "--json", "--plot", str(tmp_path / "race.svg"))
    assert result.exit_code == INTERRUPTED
    report = json.loads(result.stdout)
    assert report["is_interrupted"]
    assert report["same_tokens"]
    assert report["num_compared_tokens"] == 3
    assert [(one["length"], len(one["later_token_s"])) for one in report["lengths"]] == [(1, 1), (40, 1), (50, 1)]
    assert (tmp_path / "race.svg").exists()


def test_ctrl_c_before_the_first_token(kvik: Kvik, interrupt_at: Callable[[int], None]) -> None:
    interrupt_at(2)
    result = kvik("race", *SHORT)
    assert result.exit_code == INTERRUPTED
    assert result.stdout.splitlines()[-1] == "same tokens: nothing to compare"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([""], "InvalidInput: the prompt is empty"),
        (["--max-tokens", "0"], "InvalidInput: max_tokens is 0"),
        (["--context", "20", "x" * 30], "PromptTooLong: the prompt has "),
        (["-m", "nothing"], "ModelNotFound: "),
        (["--lengths", "0"], "InvalidInput: --lengths is 0"),
        (["--lengths", "many"], "InvalidInput: --lengths has 'many' in it"),
        (["--lengths", "900", "--context", "800"], "InvalidInput: --lengths has 900 in it, the context holds 800"),
        (["--rounds", "0"], "InvalidInput: --rounds is 0"),
        (["--plot", "race.pdf"], "InvalidInput: --plot is race.pdf"),
        (["--plot", "/nowhere/at/all.png"], "InvalidInput: --plot is /nowhere/at/all.png: there is no folder"),
    ],
)
def test_bad_input_is_refused(kvik: Kvik, arguments: list[str], said: str) -> None:
    result = kvik("race", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(said)
    assert result.stderr.splitlines()[1].startswith("hint: ")


def test_a_terminal_sees_both_lanes_side_by_side(tiny: Path) -> None:
    with Terminal("race", "-m", str(tiny), "--max-tokens", "300") as terminal:
        frame = terminal.read_until("tokens computed")
        assert re.search(r"─ without the cache ─+╮╭─+ with the cache ─", frame)
        output, code = terminal.finish()
    assert code == 0
    assert output.rstrip().endswith("same tokens: yes (300/300), same logits: bit for bit")


def test_ctrl_c_on_a_terminal(tiny: Path) -> None:
    with Terminal("race", "-m", str(tiny), "--max-tokens", "20000") as terminal:
        terminal.read_until("tokens computed")
        terminal.type(CTRL_C)
        output, code = terminal.finish()
    assert code == -signal.SIGINT
    assert "\nsame tokens: " in output
    assert "\ninterrupted; " in output
