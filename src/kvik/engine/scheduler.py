"""Who computes how many tokens in the next step, and what a step leaves behind."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from kvik.cache import BlockPool, KVCacheSpec
from kvik.engine.batch import ScheduledBatch, build_batch
from kvik.engine.sequence import FinishReason, Sequence
from kvik.errors import CacheTooSmall


class Scheduler:
    """One sequence runs at a time, in order of arrival; it owns the blocks that its tokens need and no more."""

    def __init__(self, pool: BlockPool, kv_spec: KVCacheSpec, *, token_budget: int, context: int) -> None:
        self.pool = pool
        self.kv_spec = kv_spec
        self.token_budget = token_budget
        self.context = context
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.running.append(sequence)

    def schedule(self) -> ScheduledBatch | None:
        """Choose how many tokens the sequence at the head computes in this step; `None` when nothing is to do.

        The budget closes the gap between `num_tokens` and `num_computed_tokens`, a prompt in chunks, a decode step at
        once. A sequence for which other holders leave too few blocks is aborted with its `error` set.
        """
        while self.running:
            sequence = self.running[0]
            count = min(sequence.num_missing_tokens, self.token_budget)
            if self._grow(sequence, sequence.num_computed_tokens + count):
                return build_batch([sequence], [count])
        return None

    def record(self, batch: ScheduledBatch, token_ids: SequenceOf[int], *, weight_bytes: int) -> list[Sequence]:
        """Note what the step computed and sampled; gives those that got a token. Finished ones leave the queue."""
        sampling = batch.sampling
        for sequence, count in zip(batch.sequences, batch.num_scheduled, strict=True):
            sequence.num_computed_tokens += count
            sequence.total_computed_tokens += count
            sequence.weight_bytes += weight_bytes
        for sequence, token_id in zip(sampling, token_ids, strict=True):
            self._append(sequence, token_id)
            if not sequence.keep_cache:
                sequence.num_computed_tokens = 0
            if sequence.finish_reason is not None:
                self.running.remove(sequence)
        return sampling

    def abort(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue; its blocks stay its own until `release`."""
        if sequence in self.running:
            self.running.remove(sequence)
            sequence.finish_reason = "abort"
            sequence.text.finish()

    def release(self, sequence: Sequence, num_kept_tokens: int = 0) -> None:
        """Give back the blocks behind the first `num_kept_tokens` tokens."""
        num_kept = self.kv_spec.num_blocks_for(num_kept_tokens)
        self.pool.release(sequence.block_table[num_kept:])
        del sequence.block_table[num_kept:]
        sequence.num_computed_tokens = min(sequence.num_computed_tokens, num_kept_tokens)

    def check(self, held: SequenceOf[Sequence]) -> None:
        """Prove that the pool's account agrees with the tables of all sequences that still hold blocks."""
        self.pool.check(sequence.block_table for sequence in held)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence the blocks for `num_tokens` tokens, or abort it."""
        missing = max(0, self.kv_spec.num_blocks_for(num_tokens) - len(sequence.block_table))
        blocks = self.pool.allocate(missing)
        if blocks is None:
            sequence.error = CacheTooSmall(
                f"{num_tokens:,} tokens need {missing:,} more blocks, the cache has {self.pool.num_free:,} of"
                f" {self.pool.num_blocks:,} free",
                hint="close other sessions of this LLM, or make another LLM for them",
            )
            self.abort(sequence)
            self.release(sequence)
            return False
        sequence.block_table += blocks
        return True

    def _append(self, sequence: Sequence, token_id: int) -> None:
        sequence.append(token_id)
        params = sequence.params
        counted = sequence.num_completion_tokens >= params.min_tokens
        ended = token_id in sequence.stop_token_ids
        if not ended:  # the text of an end-of-text token is not part of the completion
            sequence.text.add(token_id, may_stop=counted)
        reason: FinishReason | None = None
        if ended or sequence.text.stopped:
            reason = "stop"
        elif sequence.num_completion_tokens >= params.max_tokens or sequence.num_tokens >= self.context:
            reason = "length"
        if reason is not None:
            sequence.finish_reason = reason
            sequence.text.finish()
