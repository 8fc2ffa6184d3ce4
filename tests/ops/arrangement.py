"""Sequences laid out in blocks, and weights by type: what the tests of several ops need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from gguf_files import FLOAT_TYPES, random_blocks
from kvik.cache import BLOCK_SIZE, KVCacheSpec
from kvik.config import KVDType
from kvik.ops.base import AttentionRule, Batch, IntArray, LayerKV, Linear, Ops, Weight, slots_of

KV_DTYPES = (*get_args(KVDType), "k=int8,v=f16", "k=f16,v=int8", "k=f32,v=f16")
CODED_KV_DTYPES = ("k4v4", "k=k4,v=f16", "k=f32,v=v4", "k=int8,v=v4", "k=k4,v=int8")
"""For heads that are a power of two, and layers without a window."""

FloatArray = npt.NDArray[np.float32]
WideArray = npt.NDArray[np.float64]
Chunk = tuple[int, int, int]
"""(sequence, first position, past the last position)."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Random weights of one type: the raw blocks and the values that they stand for."""

    kind: GGMLQuantizationType
    blocks: npt.NDArray[np.uint8]  # (rows, bytes of a row)
    values: FloatArray  # (rows, columns)

    @property
    def quantized(self) -> bool:
        return self.kind not in FLOAT_TYPES

    def load(self, ops: Ops) -> Weight:
        return ops.load_weight(self.kind.name, self.blocks.reshape(-1), *self.values.shape)

    def linear(self, ops: Ops) -> Linear:
        return Linear(self.load(ops))


def random_weights(
    kind: GGMLQuantizationType, rows: int, columns: int, rng: np.random.Generator, *, std: float = 1.0
) -> Matrix:
    blocks = random_blocks(kind, rows, columns, rng, std=std)
    return Matrix(kind, blocks, dequantize(blocks, kind).reshape(rows, columns))


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class History:
    """Queries, keys and values of several sequences, and the blocks that they are to lie in."""

    heads: Heads
    q: list[FloatArray]  # of each sequence: (length, num_heads, head_dim)
    k: list[FloatArray]  # (length, num_kv_heads, head_dim)
    v: list[FloatArray]
    block_tables: IntArray  # (sequences, most blocks of any)
    num_blocks: int

    def batch(self, chunks: Sequence[Chunk]) -> Batch:
        positions = np.concatenate([np.arange(start, stop, dtype=np.int32) for _, start, stop in chunks])
        sequence_index = np.repeat(
            np.asarray([sequence for sequence, _, _ in chunks], np.int32), [stop - start for _, start, stop in chunks]
        )
        return Batch.in_blocks(
            token_ids=np.zeros(len(positions), np.int32),
            positions=positions,
            sequence_index=sequence_index,
            block_tables=self.block_tables,
            logit_rows=np.zeros(0, np.int32),
            num_groups=2,
        )

    def allocate(self, ops: Ops, dtype: str) -> LayerKV:
        spec = KVCacheSpec.uniform(1, self.heads.num_kv_heads, self.heads.head_dim, dtype)
        return ops.allocate_kv(spec, self.num_blocks)[0]

    def write(self, ops: Ops, kv: LayerKV, chunks: Sequence[Chunk]) -> None:
        k, v = (gather(stored, chunks) for stored in (self.k, self.v))
        ops.write_kv(kv, k, v, *slots_of(kv, self.batch(chunks)))

    def attend(
        self,
        ops: Ops,
        kv: LayerKV,
        chunks: Sequence[Chunk],
        window: int | None = None,
        sinks: FloatArray | None = None,
    ) -> FloatArray:
        rule = AttentionRule(window=window, sinks=sinks)
        return ops.to_numpy(ops.attend(gather(self.q, chunks), kv, self.batch(chunks), rule))

    @property
    def everything(self) -> list[Chunk]:
        return [(sequence, 0, len(keys)) for sequence, keys in enumerate(self.k)]


def gather(arrays: Sequence[FloatArray], chunks: Sequence[Chunk]) -> FloatArray:
    """The chunks' rows of each sequence's array, one after the other."""
    return np.concatenate([arrays[sequence][start:stop] for sequence, start, stop in chunks])


def random_history(
    heads: Heads, lengths: Sequence[int], rng: np.random.Generator, *, sharpness: float = 1.0, value_std: float = 1.0
) -> History:
    """Normal queries, keys and values in shuffled blocks, of which some belong to nobody."""

    def normal(num_heads: int, std: float) -> list[FloatArray]:
        return [rng.normal(0, std, (length, num_heads, heads.head_dim)).astype(np.float32) for length in lengths]

    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    num_blocks = sum(counts) + 3
    block_ids = iter(rng.permutation(num_blocks))
    tables = np.zeros((len(lengths), max(counts)), np.int32)
    for row, count in enumerate(counts):
        tables[row, :count] = [next(block_ids) for _ in range(count)]
    return History(
        heads,
        q=normal(heads.num_heads, sharpness),
        k=normal(heads.num_kv_heads, 1.0),
        v=normal(heads.num_kv_heads, value_std),
        block_tables=tables,
        num_blocks=num_blocks,
    )
