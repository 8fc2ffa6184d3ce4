"""How a cost grows with the length: the exponent of a power law, with its confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95
MIN_POINTS = 4


@dataclass(frozen=True, slots=True)
class Growth:
    """cost ~ length ** exponent, by least squares of the logarithms."""

    exponent: float
    low: float  # bounds of the exponent's confidence interval
    high: float
    num_points: int


def fit_growth(lengths: Sequence[float], costs: Sequence[float]) -> Growth | None:
    """The exponent and its 95 % confidence interval; `None` where there are too few points or lengths to tell.

    Ordinary least squares of log(cost) over log(length), the slope's standard error and Student's t. It takes the
    points' errors for independent, which a slow spell of the machine is not.
    """
    if len(lengths) < MIN_POINTS or min(costs) <= 0:
        return None
    x, y = [math.log(one) for one in lengths], [math.log(one) for one in costs]
    count = len(x)
    mean_x, mean_y = math.fsum(x) / count, math.fsum(y) / count
    spread = math.fsum((one - mean_x) ** 2 for one in x)
    if spread == 0:
        return None
    slope = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    errors = [(b - mean_y) - slope * (a - mean_x) for a, b in zip(x, y, strict=True)]
    deviation = math.sqrt(math.fsum(error**2 for error in errors) / (count - 2) / spread)
    margin = student_t(0.5 + CONFIDENCE / 2, count - 2) * deviation
    return Growth(slope, slope - margin, slope + margin, count)


def student_t(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution.

    Exact for 2 degrees of freedom; from 3 on the expansion in 1 / degrees of Abramowitz and Stegun, 26.7.5, with four
    terms: 0.3 % off at 3, less above.
    """
    if degrees == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees**power for power, term in enumerate(terms, 1))
