"""Ways to stretch rotary embeddings over a longer context, as divisors of their frequencies."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Factors = tuple[float, ...]


def llama3_factors(
    theta: float, num_dims: int, *, factor: float, low: float, high: float, original_context: int
) -> Factors:
    """Divisors of Llama 3.1, by how often a pair rotates in the original context.

    None from `high` times on, `factor` up to `low` times, and a way from one to the other between them.
    """
    rotations = original_context * _frequencies(theta, num_dims) / (2 * math.pi)
    way = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return _divisors(way, factor)


def yarn_factors(
    theta: float,
    num_dims: int,
    *,
    factor: float,
    original_context: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    whole: bool = True,
) -> Factors:
    """Divisors of YaRN (Peng et al., 2023, section 3.2), by how often a pair rotates in the original context.

    None from the pair that rotates `beta_fast` times, `factor` from the one that rotates `beta_slow` times; `whole`
    rounds these two outward.
    """

    def pair_that_rotates(times: float) -> float:
        return num_dims * math.log(original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_rotates(beta_fast), pair_that_rotates(beta_slow)
    if whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, num_dims - 1)
    if first == last:
        last += 0.001
    way = 1.0 - np.clip((np.arange(num_dims // 2) - first) / (last - first), 0.0, 1.0)
    return _divisors(way, factor)


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies queries and keys with so that attention keeps its sharpness."""
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def longrope_magnitude(factor: float, original_context: int) -> float:
    """The same for LongRoPE (Ding et al., 2024)."""
    return 1.0 if factor <= 1.0 else math.sqrt(1.0 + math.log(factor) / math.log(original_context))


def _frequencies(theta: float, num_dims: int) -> npt.NDArray[np.float64]:
    return np.asarray(theta ** (-2.0 * np.arange(num_dims // 2) / num_dims), np.float64)


def _divisors(way: npt.NDArray[np.float64], factor: float) -> Factors:
    """Frequencies go from f / factor (0) to f (1)."""
    return tuple((1.0 / ((1.0 - way) / factor + way)).tolist())
