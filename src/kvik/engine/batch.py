"""The tokens of one step, from sequences to flat arrays."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from kvik.cache import BLOCK_SIZE
from kvik.engine.sequence import Sequence
from kvik.ops.base import Batch


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """Which sequences a step advances, by how many tokens, and the same as arrays."""

    sequences: list[Sequence]
    num_scheduled: list[int]  # tokens of each
    arrays: Batch

    @property
    def sampling(self) -> list[Sequence]:
        """The sequences whose gap this step closes: one row of logits each, in this order."""
        return [
            sequence
            for sequence, count in zip(self.sequences, self.num_scheduled, strict=True)
            if count == sequence.num_missing_tokens
        ]


def build_batch(sequences: list[Sequence], num_scheduled: list[int]) -> ScheduledBatch:
    """Flatten the next `num_scheduled` tokens of each sequence; their block tables already reach that far."""
    width = max(len(sequence.block_table) for sequence in sequences)
    tables = np.zeros((len(sequences), width), np.int32)
    token_ids: list[int] = []
    positions, slots, logit_rows = [], [], []
    for row, (sequence, count) in enumerate(zip(sequences, num_scheduled, strict=True)):
        tables[row, : len(sequence.block_table)] = sequence.block_table
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + count
        token_ids += sequence.token_ids[start:end]
        position = np.arange(start, end, dtype=np.int32)
        positions.append(position)
        slots.append(tables[row, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        if end == sequence.num_tokens:
            logit_rows.append(len(token_ids) - 1)
    arrays = Batch(
        token_ids=np.asarray(token_ids, np.int32),
        positions=_joined(positions),
        slot_mapping=_joined(slots),
        sequence_index=np.repeat(np.arange(len(sequences), dtype=np.int32), num_scheduled),
        block_tables=tables,
        logit_rows=np.asarray(logit_rows, np.int32),
    )
    return ScheduledBatch(sequences, num_scheduled, arrays)


def _joined(
    parts: SequenceOf[np.ndarray[tuple[int], np.dtype[np.int32]]],
) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.concatenate(parts, dtype=np.int32)
