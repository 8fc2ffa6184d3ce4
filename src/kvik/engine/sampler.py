"""From logits to a token, random only through (seed, position): the reference in NumPy, and the native sampler."""

from __future__ import annotations

from kvik.engine.sampler_native import NativeSampler
from kvik.engine.sampler_reference import NumpySampler
from kvik.engine.sampling import Sampled, Sampler, SampleRow
from kvik.engine.sequence import Sequence
from kvik.ops.base import Ops

__all__ = ["NativeSampler", "NumpySampler", "SampleRow", "Sampled", "Sampler", "make_sampler", "sample_rows"]


def make_sampler(ops: Ops) -> Sampler:
    """The native one where the ops have a core for it."""
    core = ops.row_sampler()
    return NumpySampler() if core is None else NativeSampler(core)


def sample_rows(sequence: Sequence, first: int) -> list[SampleRow]:
    """What row `first` is sampled with, by each branch and by the sequence, and the rows after its drafts."""
    rows = [_sample_row(branch, first, 0) for branch in sequence.branches]
    return rows + [_sample_row(sequence, first, count) for count in range(len(sequence.draft_ids) + 1)]


def _sample_row(sequence: Sequence, first: int, num_drafts: int) -> SampleRow:
    """Of the row after so many drafts, as if they had been chosen."""
    params, token_ids = sequence.params, sequence.token_ids
    may_end = sequence.num_completion_tokens + num_drafts >= params.min_tokens
    return SampleRow(
        row=first + num_drafts,
        params=params,
        seed=sequence.seed,
        position=len(token_ids) + num_drafts,
        token_ids=token_ids + sequence.draft_ids[:num_drafts] if num_drafts and params.has_penalties else token_ids,
        num_prompt_tokens=sequence.num_prompt_tokens,
        forbidden_ids=() if may_end else tuple(sequence.request.stop_token_ids),
    )
