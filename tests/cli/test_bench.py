"""`kvik bench`: what it measures, and where a step's time goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import Kvik
from kvik import LLM
from kvik.cli import measure

SHORT = ("--prompt-tokens", "40", "--tokens", "3", "--rounds", "2")


def test_rates_are_printed_a_line_each(kvik: Kvik) -> None:
    result = kvik("bench", *SHORT)
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert first.startswith("prefill, 40 tokens")
    assert second.startswith("decode, 3 tokens at depth 0")
    assert first.count("tok/s") == second.count("tok/s") == 1


def test_a_profile_has_a_line_for_each_kind_of_op(kvik: Kvik) -> None:
    result = kvik("bench", *SHORT, "--profile", "--depth", "7")
    assert result.exit_code == 0, result.output
    _, prefill, decode = result.stdout.split("\n\n")
    for table, title in ((prefill, "prefill, 40 tokens"), (decode, "decode, one token at depth 7")):
        lines = table.splitlines()
        assert lines[0] == title
        assert [line.split()[0] for line in lines[2:9]] == [
            "embed", "norm_qkv", "attend", "linear", "norm_gated", "linear", "take_rows",
        ]  # fmt: skip
        assert lines[-2].startswith("all")
        assert lines[-1].startswith("limits, measured now: ")


def test_json_is_whole_and_adds_up(kvik: Kvik, tiny: Path) -> None:
    result = kvik("bench", *SHORT, "--profile", "--json")
    report = json.loads(result.stdout)
    assert report["model"]["path"] == str(tiny)
    assert [len(case["rounds"]) for case in report["tokens_per_s"].values()] == [2, 2]
    weights = LLM(str(tiny)).model.decoder.weights
    for profile in report["profiles"]:
        assert all(op["seconds"] > 0 and op["least_seconds"] >= 0 for op in profile["ops"])
        assert sum(op["count"] for op in profile["ops"]) == 3 + 5 * len(weights.layers)
        assert all(limit > 0 for limit in profile["limits"].values())


@pytest.mark.parametrize("option", ["--prompt-tokens", "--tokens", "--rounds"])
def test_numbers_that_measure_nothing_are_refused(kvik: Kvik, option: str) -> None:
    result = kvik("bench", option, "0")
    assert result.exit_code == 2
    assert f"InvalidInput: {option} is 0" in result.stderr


def test_more_tokens_than_the_context_are_refused(kvik: Kvik) -> None:
    result = kvik("bench", "--depth", "500", "--context", "400", "--tokens", "4")
    assert result.exit_code == 2
    assert "the longest case has" in result.stderr
    assert "hint: lower --depth" in result.stderr


def test_measuring_leaves_no_block_behind(tiny: Path) -> None:
    engine = LLM(str(tiny), context=200, prefix_cache=False).engine
    measure.prefill_rate(engine, 50)
    measure.decode_rate(engine, 5, depth=40)
    measure.profile_prefill(engine, 30, rounds=1)
    measure.profile_decode(engine, depth=0, rounds=1)
    assert engine.cache.pool.num_free == engine.cache.pool.num_blocks
    assert engine.step() is None
