"""What a sampler is given and gives back, and the whole numbers that both samplers compute with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvik.config import SamplingParams
from kvik.engine.output import TokenLogprobs

FloatArray = npt.NDArray[np.float32]

WEIGHT_ONE = 2**40
"""The weight of the most likely token: weights are whole multiples of 2**-40 of it."""

WHOLE_MASS = 2**53
"""Uniform numbers and `top_p` are whole multiples of 2**-53."""

LOG2_E = 1.4426950408889634
MAX_SCALE = 1e300  # of the lowest temperatures; the least difference between two logits times this is beyond any weight


class SampleRow(NamedTuple):
    """What one row of logits is sampled with: made for each row of a step, hence no dataclass, which takes longer."""

    row: int  # index into the step's logits
    params: SamplingParams
    seed: int
    position: int  # number of tokens before the one to be drawn
    token_ids: SequenceOf[int]  # prompt and completion, with accepted drafts, so far; read only where a penalty is set
    num_prompt_tokens: int
    forbidden_ids: SequenceOf[int] = ()  # such as end-of-text tokens before min_tokens
    mask: bytes | None = None  # bit i % 8 of byte i // 8, the lowest first: token i is allowed; None: all are


class Sampled(NamedTuple):
    """The token of one row."""

    token_id: int  # -1 where the row is not finite (a NaN, +inf or nothing but -inf), or no token is allowed
    logprobs: TokenLogprobs | None  # where the params ask for them


class Sampler(Protocol):
    """Chooses tokens. A row's result depends on that row alone: not on the others, nor on which sampler it is."""

    def sample(self, logits: FloatArray, rows: SequenceOf[SampleRow]) -> list[Sampled]:
        """One token for each of `rows`, from logits (R, vocab_size), which are not written to."""

    def prompt_logprobs(self, logits: FloatArray, next_ids: SequenceOf[int], num_top: int) -> list[TokenLogprobs]:
        """Of each row (R, vocab_size), the logprobs of the token that does follow and of the `num_top` most likely.

        The logprob of a row that is not finite is NaN.
        """


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """Temperature and filters as numbers that NumPy and C++ read alike."""

    scale: float  # log2(e) / temperature; 0: the most likely token
    top_k: int  # 0: all
    top_p: int  # in units of 1 / WHOLE_MASS
    min_weight: int  # in units of 1 / WEIGHT_ONE

    @classmethod
    def of(cls, params: SamplingParams) -> DrawSettings:
        """Those of a request."""
        return cls(
            scale=min(LOG2_E / params.temperature, MAX_SCALE) if params.temperature else 0.0,
            top_k=params.top_k,
            top_p=max(1, round(params.top_p * WHOLE_MASS)),
            min_weight=math.ceil(params.min_p * WEIGHT_ONE),
        )


def logprobs_entry(
    token_id: int, logit: float, highest: float, total: int, top: Iterable[tuple[int, float]]
) -> TokenLogprobs:
    """Log-softmax from a row's highest logit and the sum of its weights at temperature 1."""
    log_sum = math.log(total / WEIGHT_ONE)
    return TokenLogprobs(
        token_id, logit - highest - log_sum, {other: value - highest - log_sum for other, value in top}
    )


def no_logprobs(token_id: int) -> TokenLogprobs:
    """Those of a row that is not finite."""
    return TokenLogprobs(token_id, math.nan, {})
