"""What a step computes, and what that means for its sequences: hidden states, tokens, the ends of some."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvik.engine.batch import ScheduledBatch
from kvik.engine.events import StepResult
from kvik.engine.mask_feed import MaskFeed, compute_beside
from kvik.engine.runner import Runner, StepOutput
from kvik.engine.sampler import SampleRow, sample_rows
from kvik.engine.sequence import Sequence
from kvik.errors import ModelError


class StepComputing:
    """The arithmetic of steps, over one runner; the accounts of blocks are the engine's."""

    def __init__(self, runner: Runner, model_name: str) -> None:
        self._runner = runner
        self._model_name = model_name

    def run(self, batch: ScheduledBatch) -> StepOutput:
        """Copy blocks that are shared, then run the model; masks of grammars are computed beside it."""
        for group, copies in batch.copies.items():
            self._runner.copy_blocks(copies, group)
        masks = compute_beside(_feeds(batch))
        try:
            return self._runner.run(batch)
        finally:
            if masks is not None:
                masks.result()

    def pool(self, batch: ScheduledBatch, hidden: npt.NDArray[np.float32]) -> None:
        """Add what is computed to the embeddings; one whose prompt is whole ends."""
        first = 0
        for item in batch.items:
            sequence, rows = item.sequence, hidden[first : first + item.num_hidden]
            first += item.num_hidden
            if sequence.hidden is None or not len(rows):
                continue
            sequence.hidden.add(sequence.num_computed_tokens + item.num_tokens - len(rows), rows)
            if not np.isfinite(rows).all():
                sequence.finish("abort", self._not_finite(sequence, "hidden states"))
            elif item.closes_gap:
                sequence.finish_embedding()

    def sample(self, batch: ScheduledBatch, logits: npt.NDArray[np.float32]) -> StepResult:
        """Choose tokens, a draft's successor only where the draft was chosen itself."""
        asked: list[SampleRow] = []
        askers: list[tuple[Sequence, int | None]] = []  # whose token it is, and the draft that it must equal
        first = 0
        for item in batch.items:
            sequence, end = item.sequence, first + item.num_logits
            if item.num_logits and sequence.request.wants_prompt_logprobs:
                self._note_prompt(sequence, logits[first:end])
            if item.closes_gap and sequence.hidden is None:
                for each in (*sequence.branches, sequence):
                    each.prompt_logprobs = sequence.prompt_logprobs
                    found = _rows_of(each, end - 1 - len(sequence.draft_ids))
                    asked += found
                    askers += [(each, draft_id) for draft_id, _ in zip((*each.draft_ids, None), found, strict=False)]
            first = end
        chosen: list[Sequence] = []
        rows: list[int] = []
        rejected: Sequence | None = None  # what follows a draft that was not chosen counts no more
        for (sequence, draft_id), row, sampled in zip(askers, asked, self._runner.sample(logits, asked), strict=True):
            if sequence is rejected or sequence.finish_reason is not None:
                continue
            if sampled.token_id < 0:
                sequence.finish("abort", self._not_finite(sequence))
                continue
            try:
                if sampled.logprobs is not None:
                    sequence.logprobs.append(sampled.logprobs)
                sequence.accept(sampled.token_id)
            except Exception as error:  # noqa: BLE001  # whatever it was, it is this request's alone
                sequence.finish("abort", error)
                continue
            chosen.append(sequence)
            rows.append(row.row)
            if sampled.token_id != draft_id:
                rejected = sequence
        for sequence in chosen:
            if sequence.matcher is not None:
                sequence.matcher.ask_ahead()
        return StepResult(chosen, rows, logits)

    def _note_prompt(self, sequence: Sequence, rows: npt.NDArray[np.float32]) -> None:
        """Append prompt logprobs for these rows, skipping those already known from before a preemption."""
        start = sequence.num_computed_tokens
        skipped = max(0, len(sequence.prompt_logprobs) - start)
        num_rows = max(0, len(rows) - skipped)
        next_ids = sequence.token_ids[start + skipped + 1 : sequence.num_prompt_tokens][:num_rows]
        num_top = sequence.params.logprobs
        assert num_top is not None
        if next_ids:
            found = self._runner.prompt_logprobs(rows[skipped : skipped + len(next_ids)], next_ids, num_top)
            if any(math.isnan(each.logprob) for each in found):
                sequence.finish("abort", self._not_finite(sequence))
            sequence.prompt_logprobs += found

    def _not_finite(self, sequence: Sequence, what: str = "logits") -> ModelError:
        return ModelError(
            f"{self._model_name}: the {what} after {sequence.num_tokens:,} tokens are not finite",
            hint="the file's weights are damaged; download it again",
        )


def _rows_of(sequence: Sequence, first: int) -> list[SampleRow]:
    """The rows of `sample_rows`; none where the sequence's grammar fails, which ends that sequence alone."""
    try:
        return sample_rows(sequence, first)
    except Exception as error:  # noqa: BLE001  # whatever it was, it is this request's alone
        sequence.finish("abort", error)
        return []


def _feeds(batch: ScheduledBatch) -> Iterator[tuple[MaskFeed, list[int]]]:
    """Whose masks a step needs, and the drafts."""
    for item in batch.items:
        if item.closes_gap and item.sequence.hidden is None:
            for each in (*item.sequence.branches, item.sequence):
                if each.matcher is not None:
                    yield each.matcher, each.draft_ids
