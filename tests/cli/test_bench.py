"""`kvik bench`: what it measures and counts, how it shows that, and where a step's time goes."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from command_line import Kvik
from kvik import LLM
from kvik.cli.bench_report import moved
from kvik.cli.terminal import INTERRUPTED
from kvik.config import TOKEN_BUDGET, KVDType
from kvik.machine import available_threads
from kvik.measure import passes as measure
from kvik.measure.cases import Bench, Case, Kind, make_cases
from kvik.ops.program import MachineLimits
from work_formulas import TinyShape

SHORT = ("--prompt", "40", "--gen", "3", "--rounds", "2")
ALL = (
    "--prompt", "40,600", "--gen", "5", "--depth", "0,70", "--batch", "1,3", "--kv", "f32,int8", "--threads", "1,2",
    "--rounds", "2",
)  # fmt: skip
SCHEMA = Path(__file__).parents[2] / "docs/schemas/bench-1.json"
SHAPE = TinyShape()


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes seconds, and is tested elsewhere."""
    monkeypatch.setattr("kvik.ops.limits.measured_limits", lambda threads, fresh=False: MachineLimits(1e10, 1e11, 5e10))
    monkeypatch.setattr("kvik.ops.limits.better_limits", lambda threads: MachineLimits(1e10, 1e11, 5e10))


@pytest.fixture
def too_low(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Limits as a busy minute leaves them, and the threads with which they are measured again."""
    calls: list[int] = []

    def measure_again(threads: int) -> MachineLimits:
        calls.append(threads)
        return MachineLimits(1e15, 1e15, 1e15)

    monkeypatch.setattr("kvik.ops.limits.measured_limits", lambda threads, fresh=False: MachineLimits(1e5, 1e15, 1e15))
    monkeypatch.setattr("kvik.ops.limits.better_limits", measure_again)
    return calls


def report_of(kvik: Kvik, *arguments: str) -> dict[str, Any]:
    result = kvik("bench", *arguments, "--json")
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    jsonschema.validate(report, json.loads(SCHEMA.read_text(encoding="utf-8")))
    return report


def test_every_combination_is_a_row(kvik: Kvik, tiny: Path) -> None:
    report = report_of(kvik, *ALL)
    rows = report["rows"]
    expected: list[tuple[int, str, Kind, int, int, int]] = []
    for threads, kv in itertools.product((1, 2), ("f32", "int8")):
        expected += [(threads, kv, kind, length, 1, 1) for length in (40, 600) for kind in ("prefill", "seen")]
        expected += [(threads, kv, "decode", depth, 5, batch) for depth in (0, 70) for batch in (1, 3)]
    names = ("threads", "kv_dtype", "kind", "length", "num_tokens", "batch")
    assert [tuple(row[name] for name in names) for row in rows] == expected
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    assert report["model"] == {"name": str(tiny), "path": str(tiny), "file_bytes": tiny.stat().st_size}
    assert not report["is_interrupted"]


def test_counts_are_those_of_closed_formulas(kvik: Kvik) -> None:
    for row in report_of(kvik, *ALL)["rows"]:
        length, kv = row["length"], SHAPE.kv_token_bytes(row["kv_dtype"])
        if row["kind"] == "decode":
            batch, steps, depth = row["batch"], row["num_tokens"], max(1, length)
            assert (row["num_steps"], row["num_computed_tokens"]) == (steps, batch * steps)
            assert row["weight_multiply_adds"] == SHAPE.multiply_adds(batch * steps, batch * steps)
            assert row["attention_multiply_adds"] == batch * SHAPE.attention(depth, depth + steps)
            assert row["weight_bytes"] == steps * SHAPE.step_bytes()
            assert row["kv_bytes"] == batch * kv * sum(range(depth + 1, depth + steps + 1))
            continue
        cached = row["num_cached_tokens"]
        assert cached == (0 if row["kind"] == "prefill" else length - 1)
        ends = [*range(cached + TOKEN_BUDGET, length, TOKEN_BUDGET), length]  # of the steps
        assert (row["num_steps"], row["num_computed_tokens"]) == (len(ends), length - cached)
        assert row["weight_multiply_adds"] == SHAPE.multiply_adds(length - cached, 1)
        assert row["attention_multiply_adds"] == SHAPE.attention(cached, length)
        head = SHAPE.vocab * SHAPE.hidden * 34 // 32 + SHAPE.hidden * 4  # read by the last step alone
        assert row["weight_bytes"] == len(ends) * SHAPE.step_bytes() - (len(ends) - 1) * head
        assert row["kv_bytes"] == kv * sum(ends)


def test_limits_that_a_row_went_beyond_are_measured_again_once(kvik: Kvik, too_low: list[int]) -> None:
    result = kvik("bench", *SHORT, "--threads", "1,2", "--json")
    assert too_low == [1, 2]
    assert result.stderr.count("measuring again what the machine can do") == 2
    report = json.loads(result.stdout)
    assert {limit["bytes_per_s"] for limit in report["limits"]} == {1e15}
    assert all(row["share_of_bandwidth"] < 1 for row in report["rows"])


def test_limits_that_hold_are_not_measured_again(
    kvik: Kvik, too_low: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvik.ops.limits.measured_limits", lambda threads, fresh=False: MachineLimits(1e15, 1e15, 1e15))
    assert kvik("bench", *SHORT, "--profile").exit_code == 0
    assert too_low == []


def test_limits_that_an_op_went_beyond_are_measured_again(
    kvik: Kvik, too_low: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "kvik.cli.bench_report.exceeds", lambda *_: False
    )  # as rows of much else than that op would not
    assert kvik("bench", *SHORT, "--profile", "--threads", "1").exit_code == 0
    assert too_low == [1]


def test_a_profile_s_own_limits_are_measured_again_where_an_op_went_beyond(
    kvik: Kvik, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = itertools.cycle([1e5, 1e15])
    monkeypatch.setattr("kvik._native.read_bandwidth", lambda pool, num_bytes: next(rates))
    for profile in report_of(kvik, *SHORT, "--profile")["profiles"]:
        assert profile["limits"]["bytes_per_s"] == 1e15


def test_figures_follow_from_times_and_limits(kvik: Kvik) -> None:
    for row in report_of(kvik, *SHORT, "--kv", "f16")["rows"]:
        processed = row["length"] if row["kind"] != "decode" else row["num_tokens"] * row["batch"]
        assert row["tokens_per_s"] == pytest.approx(processed / row["median_s"])
        assert row["time_per_token_s"] == pytest.approx(row["median_s"] / row["num_tokens"])
        read = row["weight_bytes"] + row["kv_bytes"]
        assert row["share_of_bandwidth"] == pytest.approx(read / 1e10 / row["median_s"])
        math_s = 2 * row["weight_multiply_adds"] / 1e11 + 2 * row["attention_multiply_adds"] / 5e10
        assert row["share_of_arithmetic"] == pytest.approx(math_s / row["median_s"])


def test_the_table(kvik: Kvik) -> None:
    result = kvik("bench", *SHORT)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "medians of 2" in lines[0]
    assert lines[2].split()[:4] == ["case", "batch", "KV", "threads"]
    assert [line[:24].rstrip() for line in lines[3:6]] == [
        "prefill 40",
        "prefill 40, seen before",
        "decode 3 at depth 0",
    ]
    assert lines[4].split()[7] == "-"  # what is read back has no rate
    assert lines[7].startswith(f"{available_threads()} threads can read 10.0 GB/s and do 100 GOP/s of int8, 50 GFLOP/s")


def test_markdown_and_csv_have_the_same_rows(kvik: Kvik) -> None:
    markdown = kvik("bench", *SHORT, "--markdown").stdout.splitlines()
    assert markdown[3] == "|---|---|---|---|---|---|---|---|---|"
    assert [line.split("|")[1].strip() for line in markdown[4:7]] == [
        "prefill 40", "prefill 40, seen before", "decode 3 at depth 0",
    ]  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(kvik("bench", *SHORT, "--csv").stdout)))
    assert [row["kind"] for row in rows] == ["prefill", "seen", "decode"]
    assert all(len(row["seconds"].split()) == 2 and float(row["median_s"]) > 0 for row in rows)


def test_a_profile_has_a_line_for_each_kind_of_op(kvik: Kvik) -> None:
    result = kvik("bench", *SHORT, "--profile", "--depth", "7")
    assert result.exit_code == 0, result.output
    *_, prefill, decode = result.stdout.split("\n\n")
    for table, title in ((prefill, "prefill, 40 tokens"), (decode, "decode, one token at depth 7")):
        lines = table.splitlines()
        assert lines[0] == title
        assert [line.split()[0] for line in lines[2:9]] == [
            "embed", "norm_qkv", "attend", "linear", "norm_gated", "linear", "take_rows",
        ]  # fmt: skip
        assert lines[-2].startswith("all")
        assert lines[-1].startswith("limits, measured now: ")


def test_profiles_in_json_add_up(kvik: Kvik, tiny: Path) -> None:
    weights = LLM(str(tiny)).model.decoder.weights
    profiles = report_of(kvik, *SHORT, "--profile")["profiles"]
    assert len(profiles) == 2
    for profile in profiles:
        assert all(op["seconds"] > 0 and op["least_seconds"] >= 0 for op in profile["ops"])
        assert sum(op["count"] for op in profile["ops"]) == 3 + 5 * len(weights.layers)
        assert all(limit > 0 for limit in profile["limits"].values())


def test_what_is_saved_can_be_compared_with(kvik: Kvik, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    assert kvik("bench", *SHORT, "--save", str(old)).exit_code == 0
    report = json.loads(old.read_text())
    report["machine"]["processor"] = "another"
    for row in report["rows"]:
        row["seconds"] = [1000.0 + index for index in range(5)]
    report["rows"][2]["batch"] = 2
    old.write_text(json.dumps(report))
    result = kvik("bench", *SHORT[:-1], "4", "--compare", str(old))
    assert result.exit_code == 0, result.output
    lines = result.stdout.partition("against ")[2].splitlines()
    assert lines[0] == f"{old}:"
    assert lines[1].startswith("  another machine: processor was another, is ")
    assert [line.split("  ")[-1].strip() for line in lines[-4:]] == ["faster", "faster", "new", "not measured now"]
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ([4.0, 5, 6, 7], [1.0, 2, 3, 3.9], "faster"),
        ([1.0, 2, 3, 3.9], [4.0, 5, 6, 7], "slower"),
        ([4.0, 5, 6, 7], [1.0, 2, 3, 4], "within noise"),
        ([4.0, 5, 6], [1.0, 2, 3, 3.9], "too few rounds to tell, 4 each would"),
    ],
)
def test_noise_is_told_from_movement(before: list[float], now: list[float], said: str) -> None:
    assert moved(before, now) == said


def test_ctrl_c_shows_and_saves_what_was_measured(
    kvik: Kvik, interrupt_at: Callable[[int], None], tmp_path: Path
) -> None:
    saved = tmp_path / "bench.json"
    # 8 steps warm up, 3 are the two cases of the prompt (seen before: twice), 1 computes the context: the 13th writes.
    interrupt_at(13)
    result = kvik("bench", *SHORT, "--save", str(saved))
    assert result.exit_code == INTERRUPTED
    assert "prefill 40, seen before" in result.stdout
    assert "decode" not in result.stdout
    assert result.stderr.splitlines()[-1] == "interrupted; shown is what was measured"
    report = json.loads(saved.read_text())
    assert report["is_interrupted"]
    assert [row["kind"] for row in report["rows"]] == ["prefill", "seen"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt", "0"), "InvalidInput: --prompt is 0"),
        (("--prompt", "-5"), "InvalidInput: --prompt has '-5' in it"),
        (("--prompt", "12,,5"), "InvalidInput: --prompt is '12,,5'"),
        (("--prompt", "12,12"), "InvalidInput: --prompt is '12,12'"),
        (("--prompt", "9" * 30), "InvalidInput: --prompt has '99999"),
        (("--gen", "0"), "InvalidInput: --gen is 0"),
        (("--depth", "x"), "InvalidInput: --depth has 'x' in it"),
        (("--batch", "100000"), "InvalidInput: --batch is 100,000"),
        (("--threads", "0"), "InvalidInput: --threads is 0"),
        (("--rounds", "0"), "InvalidInput: --rounds is 0"),
        (("--kv", "f15"), "InvalidInput: --kv has 'f15' in it"),
        (("--json", "--csv"), "InvalidInput: more than one of --json, --csv"),
        (("--save", "/nowhere/at/all.json"), "InvalidInput: --save is /nowhere/at/all.json: there is no folder"),
        (("--save", "/"), "InvalidInput: --save is /, a folder"),
        (("--compare", "/nowhere/at/all.json"), "InvalidInput: --compare is /nowhere/at/all.json: No such file"),
        (("--depth", "500", "--context", "400"), "InvalidInput: decode 64 at depth 500 takes 565 tokens"),
        (("--kv-memory", "1MiB", "--batch", "64", "--depth", "4000"), "InvalidInput: decode 64 at depth 4,000, batch"),
    ],
)
def test_bad_input_is_refused_with_a_hint(kvik: Kvik, arguments: tuple[str, ...], said: str) -> None:
    result = kvik("bench", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    message, hint = result.stderr.splitlines()
    assert message.startswith(said)
    assert hint.startswith("hint: ")


def test_a_near_kv_type_is_suggested(kvik: Kvik) -> None:
    for given, meant in (("fp16", "f16"), ("k4v", "k4v4")):
        _, hint = kvik("bench", "--kv", given).stderr.splitlines()
        assert hint.startswith(
            f"hint: did you mean {meant}? give one of f32, f16, int8, k4v4, or a pair like k=int8,v=f16"
        )


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"kind": "kvik bench", "version": 1, "rows": [{}]}',
     b'{"kind": "kvik bench", "version": 1, "machine": [1], "model": {}, "engine": {}, "rows": []}',
     b'{"kind": "kvik bench", "version": 1, "machine": {}, "model": {}, "engine": {}, "rows": [{"kind": "decode", '
     b'"threads": 1, "kv_dtype": "f16", "length": 1, "num_tokens": 1, "batch": 1, "seconds": [1.0]}]}',
     b'{"kind": "kvik bench", "version": 2, "rows": []}', b'{"kind": "kvik race", "version": 1}'],
)  # fmt: skip
def test_a_file_that_is_no_report_is_refused(kvik: Kvik, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "old.json"
    path.write_bytes(content)
    result = kvik("bench", "--compare", str(path))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"InvalidInput: --compare is {path}, ")


def test_contexts_that_do_not_fit_together_are_computed_again(tiny: Path) -> None:
    cases = make_cases(
        threads=[1], kv_dtypes=["f16"], prompts=[30], depths=[300, 400], batches=[1, 2], num_tokens=4
    )  # fmt: skip
    llm = LLM(str(tiny), kv_memory=2 * 512 * SHAPE.kv_token_bytes("f16"))
    bench = Bench(llm, cases)
    for _ in range(3):
        bench.run_round(lambda count: None)
    assert [len(row.seconds) for row in bench.rows] == [3] * 6


@pytest.mark.parametrize("dtype", ["f16", "f32", "int8"])
def test_a_case_takes_whole_superblocks_for_each_sequence(tiny: Path, dtype: KVDType) -> None:
    spec = LLM(str(tiny)).model.decoder.spec.kv_spec(dtype)
    case = Case("decode", 1, dtype, 250, 5, batch=3)  # 250, the first token, and 5
    assert case.max_total_tokens == 256
    assert case.kv_bytes(spec) == 3 * 256 * SHAPE.kv_token_bytes(dtype)


def test_profiling_leaves_no_block_behind(tiny: Path) -> None:
    engine = LLM(str(tiny), context=200, prefix_cache=False).engine
    measure.profile_prefill(engine, 30, rounds=1)
    measure.profile_decode(engine, depth=0, rounds=1)
    assert engine.cache.pool.num_free == engine.cache.pool.num_blocks
    assert engine.step() is None


def test_other_numbers_of_kv_heads_are_variants_of_the_shape(kvik: Kvik) -> None:
    rows = report_of(kvik, *SHORT, "--kv-heads", "4,2,1")["rows"]
    assert [row["num_kv_heads"] for row in rows] == [4] * 3 + [2] * 3 + [1] * 3
    own = SHAPE.kv_token_bytes("f16")
    by_heads = {row["num_kv_heads"]: row for row in rows if row["kind"] == "decode"}
    assert {heads: row["kv_token_bytes"] for heads, row in by_heads.items()} == {4: 2 * own, 2: own, 1: own // 2}
    assert by_heads[4]["kv_bytes"] == 2 * by_heads[2]["kv_bytes"] == 4 * by_heads[1]["kv_bytes"]
    assert by_heads[4]["held_weight_bytes"] > by_heads[2]["held_weight_bytes"] > by_heads[1]["held_weight_bytes"]
    # The model's own number of heads: as many bytes and operations as the model itself has.
    (itself,) = (row for row in report_of(kvik, *SHORT)["rows"] if row["kind"] == "decode")
    for figure in ("weight_bytes", "kv_bytes", "weight_multiply_adds", "attention_multiply_adds", "held_weight_bytes"):
        assert by_heads[2][figure] == itself[figure], figure


def test_the_table_of_variants_says_what_they_are(kvik: Kvik) -> None:
    result = kvik("bench", *SHORT, "--kv-heads", "4,1")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[2].startswith("KV heads  KV a token  weights")
    assert [line.split()[0] for line in lines[3:9]] == ["4"] * 3 + ["1"] * 3
    assert "what they write is not" in result.stdout


@pytest.mark.parametrize(
    ("heads", "hint"), [("3", "give some of 1, 2, 4"), ("8", "give some of 1, 2, 4"), ("0", "from 1 to"), ("x", "like")]
)
def test_numbers_of_kv_heads_that_do_not_divide_are_refused(kvik: Kvik, heads: str, hint: str) -> None:
    result = kvik("bench", *SHORT, "--kv-heads", heads)
    assert result.exit_code == 2
    assert hint in result.stderr
    assert kvik("bench", *SHORT, "--kv-heads", "1", "--profile").exit_code == 2
