"""Fitted exponents and their confidence."""

from __future__ import annotations

import random

import pytest

from kvik.measure.growth import fit_growth, student_t

LENGTHS = [64, 128, 256, 512, 1024, 2048]


@pytest.mark.parametrize("exponent", [0.0, 0.1, 1.0, 2.0])
def test_a_power_law_is_found_exactly(exponent: float) -> None:
    growth = fit_growth(LENGTHS, [3.5 * length**exponent for length in LENGTHS])
    assert growth is not None
    assert (growth.exponent, growth.low, growth.high) == pytest.approx((exponent, exponent, exponent), abs=1e-9)
    assert growth.num_points == 6


def test_the_interval_holds_the_true_exponent_as_often_as_it_says() -> None:
    rng = random.Random(7)
    hits, rounds = 0, 2000
    for _ in range(rounds):
        growth = fit_growth(LENGTHS, [length * rng.lognormvariate(0, 0.2) for length in LENGTHS])
        assert growth is not None
        hits += growth.low <= 1.0 <= growth.high
    # The standard deviation of the share is 0.5 %.
    assert 0.93 < hits / rounds < 0.97, "seed 7"


@pytest.mark.parametrize(
    ("lengths", "costs"), [([1, 2, 3], [1.0, 2.0, 3.0]), ([5] * 6, [1.0] * 6), (LENGTHS, [1.0] * 5 + [0.0]), ([], [])]
)
def test_what_tells_nothing_has_no_fit(lengths: list[int], costs: list[float]) -> None:
    assert fit_growth(lengths, costs) is None


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (126, 1.9790)]
)
def test_student_t_as_in_the_tables(degrees: int, quantile: float) -> None:
    assert student_t(0.975, degrees) == pytest.approx(quantile, rel=2e-3)
