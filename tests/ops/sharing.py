"""Sequences that hold the same blocks at some segments: what the tests of shared reading need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvik.cache import BLOCK_SIZE, BLOCKS_PER_SUPERBLOCK, KVCacheSpec
from kvik.ops.base import AttentionRule, Batch, IntArray, LayerKV, Ops
from ops.arrangement import Chunk, FloatArray, Heads

SEGMENT = BLOCK_SIZE * BLOCKS_PER_SUPERBLOCK


def filled(ops: Ops, heads: Heads, dtype: str, num_blocks: int, rng: np.random.Generator) -> LayerKV:
    """One layer's cache with something of its own in each slot, so that a block's id says what it holds."""
    kv = ops.allocate_kv(KVCacheSpec.uniform(1, heads.num_kv_heads, heads.head_dim, dtype), num_blocks)[0]
    slots = np.arange(num_blocks * BLOCK_SIZE, dtype=np.int32)
    k, v = (rng.normal(0, 1, (len(slots), heads.num_kv_heads, heads.head_dim)).astype(np.float32) for _ in range(2))
    ops.write_kv(kv, k, v, slots, None if kv.recent_group is None else slots)
    return kv


def batch_of(tables: IntArray, chunks: Sequence[Chunk]) -> Batch:
    """The chunks' tokens; the first ones' ids are 0, 1, 2 ..."""
    positions = np.concatenate([np.arange(start, stop, dtype=np.int32) for _, start, stop in chunks])
    counts = [stop - start for _, start, stop in chunks]
    rows = np.repeat(np.asarray([sequence for sequence, _, _ in chunks], np.int32), counts)
    every = np.arange(len(positions), dtype=np.int32)
    return Batch.in_blocks(every, positions, rows, tables, every, num_groups=2)


@dataclass(frozen=True, slots=True)
class Sharers:
    """A batch of ragged chunks whose neighbours share segments by chance."""

    heads: Heads
    num_blocks: int
    tables: IntArray
    chunks: list[Chunk]
    q: FloatArray  # (T, num_heads, head_dim)
    sinks: FloatArray | None = None  # (num_heads,)

    @property
    def batch(self) -> Batch:
        return batch_of(self.tables, self.chunks)

    def together(self, ops: Ops, kv: LayerKV, window: int | None = None) -> FloatArray:
        return ops.to_numpy(ops.attend(self.q, kv, self.batch, AttentionRule(window=window, sinks=self.sinks)))

    def one_by_one(self, ops: Ops, kv: LayerKV, window: int | None = None) -> FloatArray:
        """Each token in a batch of its own."""
        tokens = [(sequence, at, at + 1) for sequence, start, stop in self.chunks for at in range(start, stop)]
        rule = AttentionRule(window=window, sinks=self.sinks)
        outs = [
            ops.to_numpy(ops.attend(self.q[i : i + 1], kv, batch_of(self.tables, [token]), rule))
            for i, token in enumerate(tokens)
        ]
        return np.concatenate(outs)


def random_sharers(heads: Heads, num_sequences: int, max_tokens: int, rng: np.random.Generator) -> Sharers:
    """At each segment a sequence has the blocks of the one before it, all but one of them, or its own."""
    lengths = rng.integers(1, 5 * SEGMENT, num_sequences)
    if rng.random() < 0.5:  # of about one length, as sharers often are
        lengths = lengths.max() - rng.integers(0, lengths.max() // 4 + 1, num_sequences)
    num_blocks, width = 64, 5 * BLOCKS_PER_SUPERBLOCK
    tables = rng.integers(0, num_blocks, (num_sequences, width), dtype=np.int32)
    for row in range(1, num_sequences):
        for first in range(0, width, BLOCKS_PER_SUPERBLOCK):
            chance = rng.random()
            if chance < 0.7:
                tables[row, first : first + BLOCKS_PER_SUPERBLOCK] = tables[
                    row - 1, first : first + BLOCKS_PER_SUPERBLOCK
                ]
            if 0.6 < chance < 0.7:
                tables[row, first + rng.integers(BLOCKS_PER_SUPERBLOCK)] ^= 1
    counts = np.minimum(rng.integers(1, max_tokens + 1, num_sequences), lengths)
    chunks = [(row, int(lengths[row] - counts[row]), int(lengths[row])) for row in range(num_sequences)]
    q = rng.normal(0, 2, (int(counts.sum()), heads.num_heads, heads.head_dim)).astype(np.float32)
    return Sharers(heads, num_blocks, tables, chunks, q)
