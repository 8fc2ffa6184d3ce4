"""The tokens of one step, from sequences to flat arrays."""

from __future__ import annotations

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
    tables = np.zeros((len(sequences), max(len(sequence.block_table) for sequence in sequences)), np.int32)
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    for row, (sequence, count) in enumerate(zip(sequences, num_scheduled, strict=True)):
        table = sequence.block_table
        tables[row, : len(table)] = table
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + count
        token_ids += sequence.token_ids[start:end]
        positions += range(start, end)
        slots += [table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE for position in range(start, end)]
        if end == sequence.num_tokens:
            logit_rows.append(len(token_ids) - 1)
    arrays = Batch(
        token_ids=np.array(token_ids, np.int32),
        positions=np.array(positions, np.int32),
        slot_mapping=np.array(slots, np.int32),
        sequence_index=np.repeat(np.arange(len(sequences), dtype=np.int32), num_scheduled),
        block_tables=tables,
        logit_rows=np.array(logit_rows, np.int32),
    )
    return ScheduledBatch(sequences, num_scheduled, arrays)
