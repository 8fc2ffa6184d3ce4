"""From logits to a token: vectorised over the vocabulary, random only through (seed, position).

The vocabulary is large (tens or hundreds of thousands of tokens), so nothing here sorts it where that can be helped: of
most rows the filters keep a few dozen tokens, and those are found first. What is chosen is what a stable sort of the
whole vocabulary would give: most likely first, of equals the lowest id.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvik.config import SamplingParams
from kvik.engine.output import TokenLogprobs

FloatArray = npt.NDArray[np.float32]
WideArray = npt.NDArray[np.float64]
IdArray = npt.NDArray[np.int64]

PRESELECTED = (64, 1024)  # most likely tokens among which top_p and min_p nearly always end
SUMMED = 256  # weights of neighbouring ids, summed as one before they are looked at singly
MAX_ROWS_FOLDED = 64


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What one row of logits is sampled with."""

    row: int  # index into the step's logits
    params: SamplingParams
    seed: int
    position: int  # tokens before the one to be drawn
    token_ids: SequenceOf[int]  # of prompt and completion; read only where a penalty is set
    num_prompt_tokens: int
    forbidden_ids: SequenceOf[int] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was drawn from a row."""

    token_id: int  # -1 where the row's logits are not finite
    logprobs: TokenLogprobs | None


class NumpySampler:
    """Samples row by row."""

    def sample(self, logits: FloatArray, rows: SequenceOf[SampleRow]) -> list[Sampled]:
        """A token for each row."""
        if not rows:
            return []
        most_likely = logits.argmax(axis=1).tolist()
        return [self._one(logits[row.row], row, most_likely[row.row]) for row in rows]

    def prompt_logprobs(self, logits: FloatArray, next_ids: SequenceOf[int], num_top: int) -> list[TokenLogprobs]:
        """Logprobs of known tokens."""
        return prompt_logprobs(logits, next_ids, num_top)

    def _one(self, logits: FloatArray, row: SampleRow, most_likely: int) -> Sampled:
        # argmax gives the first NaN where there is one.
        if not math.isfinite(logits[most_likely]):
            return Sampled(-1, None)
        adjusted = apply_penalties(logits, row)
        token_id = draw(adjusted, row, most_likely if adjusted is logits else None)
        num_top = row.params.logprobs
        return Sampled(token_id, None if num_top is None else token_logprobs(logits, token_id, num_top))


def apply_penalties(logits: FloatArray, sequence: SampleRow) -> FloatArray:
    """The logits after penalties, with forbidden end tokens at -inf; the given array itself where nothing is to do."""
    params = sequence.params
    repeats = params.repetition_penalty != 1.0
    counts = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    forbids = len(sequence.forbidden_ids) > 0
    if not (repeats or counts or forbids):
        return logits
    adjusted = logits.copy()
    if repeats:
        seen = _ids_of(sequence.token_ids)
        values = adjusted[seen]
        with np.errstate(over="ignore"):
            values = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        # A token seen twice is written twice, with the same value.
        adjusted[seen] = np.minimum(values, np.finfo(np.float32).max)
    if counts:
        completion = (
            seen[sequence.num_prompt_tokens :] if repeats else _ids_of(sequence.token_ids[sequence.num_prompt_tokens :])
        )
        times = np.bincount(completion)
        used = np.flatnonzero(times)
        adjusted[used] -= (params.presence_penalty + params.frequency_penalty * times[used]).astype(np.float32)
    if forbids:
        adjusted[list(sequence.forbidden_ids)] = -np.inf
    return adjusted


def draw(logits: FloatArray, sequence: SampleRow, most_likely: int | None = None) -> int:
    """The most likely token at temperature 0 (the lowest id of equals), else one draw from what the filters leave.

    The draw inverts the cumulative distribution: over token ids in order where no filter is set, over tokens from the
    most likely down where one is. `most_likely` is the argmax of `logits`, where the caller has it.
    """
    if most_likely is None:
        most_likely = int(logits.argmax())
    params = sequence.params
    highest = float(logits[most_likely])
    if params.temperature == 0.0 or highest == -math.inf:
        return most_likely
    number = uniform(sequence.seed, sequence.position)
    if not 0 < params.top_k < len(logits) and params.top_p == 1.0 and params.min_p == 0.0:
        return _pick(_weights(logits, highest, params.temperature), number)
    kept, weights = _filtered(logits, highest, params)
    return _token_at(logits, kept, _pick(weights, number))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone, by the counter-based Philox (Salmon et al., 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def token_logprobs(logits: FloatArray, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-softmax of the raw logits: at the chosen token and at the `num_top` most likely."""
    below_highest = _below(logits, float(logits.max()))
    log_sum = math.log(np.exp(below_highest).sum())
    top = _most_likely(logits, num_top).tolist() if num_top else []
    return TokenLogprobs(
        token_id,
        float(below_highest[token_id]) - log_sum,
        {other: float(below_highest[other]) - log_sum for other in top},
    )


def prompt_logprobs(rows: FloatArray, next_ids: SequenceOf[int], num_top: int) -> list[TokenLogprobs]:
    """Of each row (R, vocab_size), the logprobs of the token that does follow and of the `num_top` most likely.

    Bit for bit those of `token_logprobs`: a row is long enough to be worth its own calls, and still in the processor's
    cache from one to the next, which a matrix of rows is not.
    """
    return [token_logprobs(row, token_id, num_top) for row, token_id in zip(rows, next_ids, strict=True)]


def _filtered(logits: FloatArray, highest: float, params: SamplingParams) -> tuple[FloatArray, WideArray]:
    """What top_k, then top_p, then min_p leave: logits from the highest down, and their weights.

    Each keeps a beginning of the same order, so the shortest counts. The mass that top_p is a part of is that of all
    tokens, or of the `top_k` where that is set.
    """
    vocab_size = len(logits)
    has_top_k = 0 < params.top_k < vocab_size
    wanted_mass = math.inf
    if params.top_p < 1.0 and not has_top_k:
        wanted_mass = params.top_p * _weights(logits, highest, params.temperature).sum()
    for count in (params.top_k,) if has_top_k else (*PRESELECTED, vocab_size):
        kept = _highest(logits, count)
        weights = _weights(kept, highest, params.temperature)
        cumulative = np.cumsum(weights)
        if cumulative[-1] >= wanted_mass or weights[-1] < params.min_p:
            break
    if params.top_p < 1.0 and has_top_k:
        wanted_mass = params.top_p * weights.sum()
    num_for_top_p = 1 + int(np.searchsorted(cumulative[:-1], wanted_mass, side="left"))  # the fewest that reach it
    num_for_min_p = int(np.count_nonzero(weights >= params.min_p))  # the first weight is 1
    num_kept = min(num_for_top_p, num_for_min_p)
    return kept[:num_kept], weights[:num_kept]


def _token_at(logits: FloatArray, from_highest: FloatArray, rank: int) -> int:
    """The token at a rank, of which `from_highest` has the logit; equals rank by their ids."""
    equals = np.flatnonzero(logits == from_highest[rank])
    return int(equals[rank - int(np.argmax(from_highest == from_highest[rank]))])


def _highest(logits: FloatArray, count: int) -> FloatArray:
    """The `count` highest logits (all, where there are fewer), from the highest down."""
    if (bound := _bound(logits, count)) is not None:
        logits = logits[logits >= bound]
    return np.sort(logits)[::-1][:count]


def _most_likely(logits: FloatArray, count: int) -> IdArray:
    """The ids of the `count` highest logits (of all, where there are fewer), highest first, of equals the lowest id."""
    bound = _bound(logits, count)
    candidates = np.arange(len(logits)) if bound is None else np.flatnonzero(logits >= bound)
    return candidates[np.argsort(-logits[candidates], kind="stable")[:count]]


def _bound(logits: FloatArray, count: int) -> np.float32 | None:
    """A number that at least `count` and hardly more of the logits reach; `None` where all may be sorted as well.

    Folded into rows, a column's maximum is one of its logits, so the `count`-th highest maximum is such a number.
    """
    num_rows = min(MAX_ROWS_FOLDED, len(logits) // (4 * count))
    if num_rows < 2:
        return None
    num_columns = len(logits) // num_rows
    maxima = logits[: num_rows * num_columns].reshape(num_rows, num_columns).max(axis=0)
    bound: np.float32 = np.partition(maxima, num_columns - count)[num_columns - count]
    return bound


def _weights(logits: FloatArray, highest: float, temperature: float) -> WideArray:
    """Probabilities times a constant: 1 for the most likely token."""
    scaled = _below(logits, highest)
    with np.errstate(over="ignore"):  # next to no temperature: all but the most likely end at -inf
        np.divide(scaled, temperature, out=scaled)
    return np.exp(scaled, out=scaled)


def _below(logits: FloatArray, highest: float) -> WideArray:
    return np.subtract(logits, highest, dtype=np.float64)


def _pick(weights: WideArray, number: float) -> int:
    """The index at which the cumulative weights pass `number` (in [0, 1)) of their sum; never one of weight 0.

    In two steps, since adding up one after the other is the slowest that can be done to a row.
    """
    starts = np.arange(0, len(weights), SUMMED)
    ends = np.cumsum(np.add.reduceat(weights, starts))
    target = number * ends[-1]
    part = _first_above(ends, target)
    if part > 0:
        target -= ends[part - 1]
    return part * SUMMED + _first_above(np.cumsum(weights[part * SUMMED : (part + 1) * SUMMED]), target)


def _first_above(cumulative: WideArray, target: float) -> int:
    """The first index above `target`; where rounding left none, the last that added something."""
    index = int(np.searchsorted(cumulative, target, side="right"))
    return index if index < len(cumulative) else int(np.searchsorted(cumulative, cumulative[-1], side="left"))


def _ids_of(token_ids: SequenceOf[int]) -> IdArray:
    return np.fromiter(token_ids, np.int64, len(token_ids))
