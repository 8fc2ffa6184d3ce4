"""What sampling means, in plain NumPy: the judge of the native sampler, which gives the same bits.

A token's weight is exp((logit - highest) / temperature) as a whole number of 2**-40, computed by IEEE operations in a
fixed order. Sums of whole numbers are exact, so neither the order of adding nor a sort that is cut short can show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt

from kvik.config import SamplingParams
from kvik.engine.output import TokenLogprobs
from kvik.engine.sampling import (
    LOG2_E,
    WEIGHT_ONE,
    WHOLE_MASS,
    DrawSettings,
    FloatArray,
    Sampled,
    SampleRow,
    logprobs_entry,
    no_logprobs,
)

IdArray = npt.NDArray[np.int64]
WeightArray = npt.NDArray[np.int64]

# 2**f for |f| <= 1/2 to 1e-7, from the highest power down: a minimax fit that gives 1 at 0.
EXP2 = (
    0.0013264727123718878,
    0.009671512644834256,
    0.05550733743496679,
    0.24022242085262066,
    0.6931469775989935,
    1.0,
)
MIN_EXPONENT = -64.0
"""Lower ones are taken as this one, whose weight is 0."""


class NumpySampler:
    """The reference: one row after the other."""

    def sample(self, logits: FloatArray, rows: SequenceOf[SampleRow]) -> list[Sampled]:
        """One token for each row; see `Sampler`."""
        return [_sample_row(logits[row.row], row) for row in rows]

    def prompt_logprobs(self, logits: FloatArray, next_ids: SequenceOf[int], num_top: int) -> list[TokenLogprobs]:
        """Those of `token_logprobs`, row by row."""
        return [token_logprobs(row, token_id, num_top) for row, token_id in zip(logits, next_ids, strict=True)]


def _sample_row(logits: FloatArray, row: SampleRow) -> Sampled:
    if not math.isfinite(logits[logits.argmax()]):  # argmax gives the first NaN where there is one
        return Sampled(-1, None)
    token_id = draw(adjust(logits, row), row.params, row.seed, row.position)
    num_top = row.params.logprobs
    return Sampled(token_id, None if num_top is None or token_id < 0 else token_logprobs(logits, token_id, num_top))


def adjust(logits: FloatArray, row: SampleRow) -> FloatArray:
    """A copy after penalties and biases, with what is not allowed at -inf."""
    params, adjusted = row.params, logits.copy()
    if params.repetition_penalty != 1.0:
        seen = np.array(row.token_ids, np.int64)
        values = adjusted[seen]
        with np.errstate(over="ignore"):
            values = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        # A token seen twice is written twice, with the same value.
        adjusted[seen] = np.minimum(values, np.finfo(np.float32).max)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        times = np.bincount(np.array(row.token_ids[row.num_prompt_tokens :], np.int64))
        used = np.flatnonzero(times)
        adjusted[used] -= (params.presence_penalty + params.frequency_penalty * times[used]).astype(np.float32)
    for token_id, bias in params.biases:
        adjusted[token_id] += np.float32(bias)
    if row.mask is not None:
        bits = np.unpackbits(np.frombuffer(row.mask, np.uint8), bitorder="little")
        adjusted[bits[: len(adjusted)] == 0] = -np.inf
    adjusted[list(row.forbidden_ids)] = -np.inf
    return adjusted


def draw(logits: FloatArray, params: SamplingParams, seed: int, position: int) -> int:
    """The most likely token at temperature 0 (the lowest id of equals), else one draw from what the filters leave.

    The draw inverts the cumulative distribution: over token ids in order where no filter is set, over tokens from the
    most likely down where one is. -1 where no logit is finite.
    """
    settings = DrawSettings.of(params)
    most_likely = int(logits.argmax())
    highest = float(logits[most_likely])
    if not math.isfinite(highest):
        return -1
    if settings.scale == 0.0:
        return most_likely
    number = int(uniform(seed, position) * WHOLE_MASS)
    has_top_k = 0 < settings.top_k < len(logits)
    if not has_top_k and settings.top_p == WHOLE_MASS and settings.min_weight == 0:
        return _token_at(weights_of(logits, highest, settings.scale), number)
    order = _most_likely(logits, settings.top_k if has_top_k else len(logits))
    weights = weights_of(logits[order], highest, settings.scale)
    if settings.top_p < WHOLE_MASS:
        wanted = -(-settings.top_p * int(weights.sum()) // WHOLE_MASS)  # rounded up
        num_kept = 1 + int(np.searchsorted(np.cumsum(weights), wanted, side="left"))  # the fewest that reach it
        order, weights = order[:num_kept], weights[:num_kept]
    kept = weights >= settings.min_weight
    return int(order[kept][_token_at(weights[kept], number)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone, by the counter-based Philox (Salmon et al., 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def token_logprobs(logits: FloatArray, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-softmax of the raw logits: at the chosen token and at the `num_top` most likely."""
    highest = float(logits[logits.argmax()])
    if not math.isfinite(highest):
        return no_logprobs(token_id)
    total = int(weights_of(logits, highest, LOG2_E).sum())
    top = _most_likely(logits, num_top).tolist()
    return logprobs_entry(
        token_id, float(logits[token_id]), highest, total, ((other, float(logits[other])) for other in top)
    )


def weights_of(logits: FloatArray, highest: float, scale: float) -> WeightArray:
    """exp2((logit - highest) * scale) as whole multiples of 1 / WEIGHT_ONE: WEIGHT_ONE for the highest."""
    with np.errstate(over="ignore"):  # next to no temperature: all but the most likely end at -inf
        scaled = np.maximum(np.subtract(logits, highest, dtype=np.float64) * scale, MIN_EXPONENT)
    whole = np.rint(scaled)
    fraction = scaled - whole
    power = np.full_like(fraction, EXP2[0])
    for coefficient in EXP2[1:]:
        power = power * fraction + coefficient
    weights: WeightArray = np.rint(np.ldexp(power, whole.astype(np.int32)) * WEIGHT_ONE).astype(np.int64)
    return weights


def _token_at(weights: WeightArray, number: int) -> int:
    """The first index at which the sum so far passes `number` / WHOLE_MASS of the whole; never one of weight 0."""
    cumulative = np.cumsum(weights)
    target = number * int(cumulative[-1]) // WHOLE_MASS
    return int(np.searchsorted(cumulative, target, side="right"))


def _most_likely(logits: FloatArray, count: int) -> IdArray:
    """The ids of the `count` highest logits (of all, where there are fewer), highest first, of equals the lowest id."""
    if count == 0:
        return np.empty(0, np.int64)
    candidates = np.arange(len(logits))
    if count < len(logits):
        candidates = np.flatnonzero(logits >= np.partition(logits, len(logits) - count)[len(logits) - count])
    order: IdArray = candidates[np.argsort(-logits[candidates], kind="stable")[:count]]
    return order
