"""From logits to a token, random only through (seed, position): the reference in NumPy, and the native sampler."""

from __future__ import annotations

from kvik.engine.sampler_native import NativeSampler
from kvik.engine.sampler_reference import NumpySampler
from kvik.engine.sampling import Sampled, Sampler, SampleRow
from kvik.engine.sequence import Sequence
from kvik.ops.base import Ops
from kvik.text.constraint import without

__all__ = ["NativeSampler", "NumpySampler", "SampleRow", "Sampled", "Sampler", "make_sampler", "sample_rows"]


def make_sampler(ops: Ops) -> Sampler:
    """The native one where the ops have a core for it."""
    core = ops.row_sampler()
    return NumpySampler() if core is None else NativeSampler(core)


def sample_rows(sequence: Sequence, first: int) -> list[SampleRow]:
    """What row `first` is sampled with, and the rows after its drafts. Raises what the sequence's matcher raises."""
    num_rows = len(sequence.draft_ids) + 1
    if sequence.matcher is None:
        return [_sample_row(sequence, first, count, None) for count in range(num_rows)]
    masks = sequence.matcher.masks(sequence.draft_ids)
    masks += [masks[-1]] * (num_rows - len(masks))  # rows behind a draft that cannot be chosen: nobody reads them
    return [_sample_row(sequence, first, count, mask) for count, mask in enumerate(masks)]


def _sample_row(sequence: Sequence, first: int, num_drafts: int, mask: bytes | None) -> SampleRow:
    """Of the row after so many drafts, as if they had been chosen.

    Where a grammar allows nothing but what should not come yet, the grammar wins: some token must be chosen.
    """
    params, token_ids, request = sequence.params, sequence.token_ids, sequence.request
    may_end = sequence.num_completion_tokens + num_drafts >= params.min_tokens
    forbidden_ids = () if may_end else tuple(request.stop_token_ids)
    if mask is not None:
        mask = without(mask, forbidden_ids or request.unwanted_end_ids)
        forbidden_ids = ()
    return SampleRow(
        row=first + num_drafts,
        params=params,
        seed=sequence.seed,
        position=len(token_ids) + num_drafts,
        token_ids=token_ids + sequence.draft_ids[:num_drafts] if num_drafts and params.has_penalties else token_ids,
        num_prompt_tokens=sequence.num_prompt_tokens,
        forbidden_ids=forbidden_ids,
        mask=mask,
    )
