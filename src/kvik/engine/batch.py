"""The tokens of one step, from sequences to flat arrays."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np

from kvik.cache import BLOCK_SIZE, BlockCopy
from kvik.engine.sequence import Sequence
from kvik.ops.base import Batch, KVIndex


@dataclass(frozen=True, slots=True)
class Scheduled:
    """What a step computes of one sequence: tokens it has, and behind them its drafts."""

    sequence: Sequence
    num_tokens: int  # without drafts
    copies: list[BlockCopy]  # to be made before
    closes_gap: bool  # a token is sampled from what the step computes, or an embedding is whole
    num_logits: int  # rows of logits, those of its last tokens
    num_hidden: int = 0  # rows of hidden states, the same


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """Which sequences a step advances, by how many tokens, and the same as arrays."""

    items: list[Scheduled]
    arrays: Batch

    @property
    def copies(self) -> dict[int, list[tuple[int, int]]]:
        """Blocks to be copied before the step, in this order: by group of layers, (source, target)."""
        found: dict[int, list[tuple[int, int]]] = {}
        for source, target, group in chain.from_iterable(item.copies for item in self.items):
            found.setdefault(group, []).append((source, target))
        return found


def build_batch(items: list[Scheduled], num_groups: int) -> ScheduledBatch:
    """Flatten the next tokens of each sequence; their block tables already reach that far.

    Sequences whose tables begin alike come one after the other, so that attention can read what they share once.
    """
    items.sort(key=lambda item: item.sequence.table.block_ids)
    max_blocks = max(len(item.sequence.table.block_ids) for item in items)
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sequence_index: list[int] = []
    tables: list[list[int]] = []
    logit_rows: list[int] = []
    hidden_rows: list[int] = []
    for row, item in enumerate(items):
        sequence = item.sequence
        table = sequence.table.block_ids
        start = sequence.num_computed_tokens
        end = start + item.num_tokens
        token_ids += sequence.token_ids[start:end]
        if item.closes_gap and sequence.draft_ids:
            token_ids += sequence.draft_ids
            end += len(sequence.draft_ids)
        positions += range(start, end)
        slots += _slots(table, start, end)
        sequence_index += [row] * (end - start)
        tables.append(table + [0] * (max_blocks - len(table)))
        logit_rows += range(len(token_ids) - item.num_logits, len(token_ids))
        hidden_rows += range(len(token_ids) - item.num_hidden, len(token_ids))
    # Python's code is cold after a decode step, so calling `np.array` eight times beats one clever call.
    of_blocks = KVIndex(np.array(slots, np.int32), np.array(tables, np.int32))
    twins = items[0].sequence.table.twins
    arrays = Batch.of_text(
        token_ids=np.array(token_ids, np.int32),
        positions=np.array(positions, np.int32),
        sequence_index=np.array(sequence_index, np.int32),
        logit_rows=np.array(logit_rows, np.int32),
        groups=[_index_of(items, group, max_blocks) if group in twins else of_blocks for group in range(num_groups)],
        hidden_rows=np.array(hidden_rows, np.int32),
    )
    return ScheduledBatch(items, arrays)


def _index_of(items: list[Scheduled], group: int, max_blocks: int) -> KVIndex:
    """The same tokens in a group of layers that has other physical blocks."""
    tables, slots = [], []
    for item in items:
        sequence = item.sequence
        table = sequence.table.twins[group].padded(max_blocks)
        tables.append(table)
        start = sequence.num_computed_tokens
        end = start + item.num_tokens + (len(sequence.draft_ids) if item.closes_gap else 0)
        slots += _slots(table, start, end)
    return KVIndex(np.array(slots, np.int32), np.array(tables, np.int32))


def _slots(table: list[int], start: int, end: int) -> list[int]:
    """Where the tokens at these places of a block table are."""
    return [table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in range(start, end)]
