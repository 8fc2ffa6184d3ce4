"""The helpers that size the tests: loops that name what failed, simulations of each tier, seeds that repeat a run."""

from __future__ import annotations

import pytest

import tiers
from looped import looped


def test_a_loop_names_each_case_that_failed() -> None:
    seen = []

    @looped("case", [1, 2, 3, 4], lambda case: f"number {case}")
    def check(case: int) -> None:
        seen.append(case)
        with pytest.raises(ZeroDivisionError):
            assert 1 // (case % 2)

    with pytest.raises(BaseExceptionGroup, match="case: 2 of 4 failed: number 1, number 3") as caught:
        check()
    assert seen == [1, 2, 3, 4]
    assert len(caught.value.exceptions) == 2


@looped("case", "ab")
@pytest.mark.parametrize("number", [1, 2])
def test_a_loop_keeps_fixtures_and_parameters(number: int, case: str, tmp_path: object) -> None:
    assert number in (1, 2)
    assert case in "ab"
    assert tmp_path


def test_each_tier_runs_more_simulations_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVIK_SIMULATIONS", raising=False)
    monkeypatch.delenv("KVIK_SIMULATION_SEED", raising=False)
    monkeypatch.setattr(tiers, "TIER", "all")
    monkeypatch.setattr(tiers, "RANDOM_SEEDS", False)
    seeds: dict[str, list[int]] = {"tiny": [], "": [], "full": []}
    for group in tiers.simulation_groups():
        (seed_range,) = group.values
        assert isinstance(seed_range, range)
        marks = [mark.name for mark in group.marks]
        seeds[marks[0] if marks else ""] += seed_range
    assert seeds["tiny"] == list(range(100))
    assert seeds[""] == list(range(100, 300))
    assert seeds["full"] == list(range(300, 2000))
    monkeypatch.setattr(tiers, "TIER", "test")
    assert tiers.num_simulations() == 300
    monkeypatch.setattr(tiers, "RANDOM_SEEDS", True)
    assert all(mark.name == "nightly" for group in tiers.simulation_groups() for mark in group.marks)


def test_a_seed_follows_from_the_test_and_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVIK_SEED", raising=False)
    fixed = tiers.run_seed("garbage")
    assert fixed == tiers.run_seed("garbage") != tiers.run_seed("sharing")
    monkeypatch.setenv("KVIK_SEED", "7")
    assert tiers.run_seed("garbage") != fixed
