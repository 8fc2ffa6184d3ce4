"""From logits to a token: vectorised over the vocabulary, random only through (seed, position)."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt

from kvik.engine.output import TokenLogprobs
from kvik.engine.sequence import Sequence

FloatArray = npt.NDArray[np.float32]


class Sampler:
    """Chooses the next token of each sequence."""

    def sample(self, logits: FloatArray, sequences: SequenceOf[Sequence]) -> list[int]:
        """One token id for each row of logits (R, vocab_size), noting logprobs where they were asked for."""
        return [self._choose(row, sequence) for row, sequence in zip(logits, sequences, strict=True)]

    def _choose(self, logits: FloatArray, sequence: Sequence) -> int:
        adjusted = apply_penalties(logits, sequence)
        token_id = draw(adjusted, sequence)
        if sequence.params.logprobs is not None:
            sequence.logprobs.append(token_logprobs(logits, token_id, sequence.params.logprobs))
        return token_id


def apply_penalties(logits: FloatArray, sequence: Sequence) -> FloatArray:
    """The logits after penalties, with forbidden end tokens at -inf; the given array stays as it is."""
    params = sequence.params
    adjusted = logits
    if params.repetition_penalty != 1.0:
        seen = np.unique(sequence.token_ids)
        adjusted = adjusted.copy()
        values = adjusted[seen]
        adjusted[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        used, counts = np.unique(np.asarray(sequence.completion_ids, np.int64), return_counts=True)
        adjusted = adjusted.copy()
        adjusted[used] -= (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)
    if sequence.num_completion_tokens < params.min_tokens and sequence.stop_token_ids:
        adjusted = adjusted.copy()
        adjusted[list(sequence.stop_token_ids)] = -np.inf
    return adjusted


def draw(logits: FloatArray, sequence: Sequence) -> int:
    """The most likely token at temperature 0 (the lowest id of equals), else one draw from what the filters leave."""
    params = sequence.params
    if params.temperature == 0.0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # next to no temperature: all but the most likely end at -inf
        scaled = (logits.astype(np.float64) - float(logits.max())) / params.temperature
    order = np.argsort(-scaled, kind="stable")
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp(scaled[order])  # most likely first, so weights[0] is 1
    if params.top_p < 1.0:
        mass_before = np.cumsum(weights) - weights
        kept = int(np.count_nonzero(mass_before < params.top_p * weights.sum()))
        order, weights = order[:kept], weights[:kept]
    if params.min_p > 0.0:
        kept = int(np.count_nonzero(weights >= params.min_p))
        order, weights = order[:kept], weights[:kept]
    cumulative = np.cumsum(weights)
    chosen = np.searchsorted(cumulative, uniform(sequence.seed, sequence.num_tokens) * cumulative[-1], side="right")
    return int(order[min(int(chosen), len(order) - 1)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone, by the counter-based Philox (Salmon et al., 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def token_logprobs(logits: FloatArray, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-softmax of the raw logits: at the chosen token and at the `num_top` most likely."""
    wide = logits.astype(np.float64)
    top = wide.max()
    logprobs = wide - (top + np.log(np.exp(wide - top).sum()))
    most_likely = np.argsort(-logprobs, kind="stable")[:num_top]
    return TokenLogprobs(token_id, float(logprobs[token_id]), {int(i): float(logprobs[i]) for i in most_likely})
