"""The table of ops: what each gives, and what it costs at least, as said beside its method in `Ops`.

What notes ops, runs them natively, measures them or counts their work looks here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from kvik.cache import BLOCK_SIZE, BLOCKS_PER_SUPERBLOCK
from kvik.config import MAX_TOKENS
from kvik.experts import ExpertsRead

if TYPE_CHECKING:
    from kvik.ops.base import Batch, IntArray, Linear

Shape: TypeAlias = tuple[int, ...]

_SEGMENT = BLOCK_SIZE * BLOCKS_PER_SUPERBLOCK  # places whose keys and values sequences that share them read once


@dataclass(frozen=True, slots=True)
class Value:
    """An array that some op of a step computes: a row for each token, or for each logit row."""

    id: int
    shape: Shape  # behind the first axis
    of_logits: bool = False

    @property
    def width(self) -> int:
        """Items of a row."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class KVRead:
    """What attention reads and computes in one layer."""

    kv_group: int
    window: int | None
    key_bytes: int  # of a key with its value, in all KV heads
    key_multiply_adds: int  # of a token with one key and its value, in all query heads


@dataclass(frozen=True, slots=True)
class Cost:
    """What an op moves and computes at least, by what a step has; a multiply-add is two operations."""

    weight_bytes: int = 0  # read once where there are rows
    multiply_adds: int = 0  # with weights, for each row
    row_bytes: float = 0  # for each row
    row_operations: float = 0  # beside the multiply-adds
    kv: KVRead | None = None
    experts: ExpertsRead | None = None

    def weight_bytes_for(self, rows: int) -> int:
        """Bytes of weights that so many rows read."""
        chosen = 0.0 if self.experts is None else self.experts.bytes_for(rows)
        return self.weight_bytes + round(chosen) if rows else 0

    def at(self, batch: Batch, *, of_logits: bool) -> tuple[float, float]:
        """Bytes and operations in a step, where its rows are tokens or logit rows."""
        rows = len(batch.logit_rows) if of_logits else len(batch.token_ids)
        num_bytes = self.row_bytes * rows + self.weight_bytes_for(rows)
        operations = (2 * self.multiply_adds + self.row_operations) * rows
        if self.kv is not None:
            num_bytes += self.kv.key_bytes * keys_read(batch, self.kv.kv_group, self.kv.window)
            operations += 2 * self.kv.key_multiply_adds * keys_seen(batch, self.kv.window)
        return num_bytes, operations


@dataclass(frozen=True, slots=True)
class Op:
    """One op; both functions take the arguments of its call, in which arrays are `Value`s."""

    shapes: Callable[..., tuple[Shape, ...]]  # of what it gives
    cost: Callable[..., Cost]


def like_first(x: Value, *others: Any) -> tuple[Shape, ...]:
    """One result, of the first argument's shape."""
    return (x.shape,)


def rows_of(*linears: Linear) -> tuple[Shape, ...]:
    """A result for each projection."""
    return tuple((linear.rows,) for linear in linears)


def elementwise(arrays: int, operations: int) -> Callable[..., Cost]:
    """Float32 arrays that are read or written, and operations for each of their items."""
    return lambda x, *others: Cost(row_bytes=4 * arrays * x.width, row_operations=operations * x.width)


def products(*linears: Linear) -> Cost:
    """Matrix products of the same rows."""
    return Cost(
        weight_bytes=sum(linear.num_bytes for linear in linears),
        multiply_adds=sum(linear.rows * linear.matrix.columns for linear in linears),
    )


OPS: dict[str, Op] = {}
"""By the name of its method in `Ops`."""

_Method = TypeVar("_Method", bound=Callable[..., Any])


def op(shapes: Callable[..., tuple[Shape, ...]], cost: Callable[..., Cost]) -> Callable[[_Method], _Method]:
    """Put a method of `Ops` into the table; both functions take the arguments of its call."""

    def register(method: _Method) -> _Method:
        OPS[method.__name__] = Op(shapes, cost)
        return method

    return register


def _first_seen(batch: Batch, window: int | None) -> IntArray:
    first: IntArray = np.maximum(0, batch.kv_index.astype(np.int64) + 1 - (window or MAX_TOKENS))
    return first


def keys_seen(batch: Batch, window: int | None) -> int:
    """Keys that the tokens see, each token's for itself."""
    return int((batch.kv_bounds - _first_seen(batch, window)).sum())


def keys_read(batch: Batch, kv_group: int, window: int | None) -> int:
    """Keys that are read: once for the tokens of a sequence, and a segment once for neighbours in the same blocks."""
    if not len(batch.token_ids):
        return 0
    rows, first, bounds = batch.sequence_index, _first_seen(batch, window), batch.kv_bounds
    begins = np.flatnonzero(np.concatenate([[True], (rows[1:] != rows[:-1]) | (bounds[1:] != bounds[:-1] + 1)]))
    ends = np.append(begins[1:], len(rows)) - 1
    total = int((bounds[ends] - first[begins]).sum())
    lasts, nexts = ends[:-1], begins[1:]  # of runs one behind the other
    low = -(-np.maximum(first[lasts], first[nexts]) // _SEGMENT)
    high = np.minimum(bounds[lasts], bounds[nexts]) // _SEGMENT
    tables = batch.groups[kv_group].block_tables
    num_segments = tables.shape[1] // BLOCKS_PER_SUPERBLOCK
    same = tables[rows[lasts]] == tables[rows[nexts]]
    same = same[:, : num_segments * BLOCKS_PER_SUPERBLOCK]
    same = same.reshape(len(lasts), num_segments, BLOCKS_PER_SUPERBLOCK).all(axis=2)
    segments = np.arange(num_segments)
    return total - _SEGMENT * int((same & (segments >= low[:, None]) & (segments < high[:, None])).sum())


def add_up(costs: Iterable[tuple[Cost, bool]]) -> tuple[tuple[Cost, bool], ...]:
    """Costs of ops, each with whether its rows are logit rows: one for each kind of rows, attention, experts."""
    together: dict[tuple[bool, tuple[int, int | None] | None, tuple[int, int] | None], list[Cost]] = {}
    for cost, of_logits in costs:
        kv = None if cost.kv is None else (cost.kv.kv_group, cost.kv.window)
        experts = None if cost.experts is None else (cost.experts.num_experts, cost.experts.num_chosen)
        together.setdefault((of_logits, kv, experts), []).append(cost)
    return tuple((_sum_of(alike), of_logits) for (of_logits, *_), alike in together.items())


def _sum_of(costs: Sequence[Cost]) -> Cost:
    reads = [cost.kv for cost in costs if cost.kv is not None]
    kv = None
    if reads:
        key_bytes, multiply_adds = (sum(one.key_bytes for one in reads), sum(one.key_multiply_adds for one in reads))
        kv = replace(reads[0], key_bytes=key_bytes, key_multiply_adds=multiply_adds)
    chosen = [cost.experts for cost in costs if cost.experts is not None]
    experts = replace(chosen[0], expert_bytes=sum(one.expert_bytes for one in chosen)) if chosen else None
    return Cost(
        weight_bytes=sum(cost.weight_bytes for cost in costs),
        multiply_adds=sum(cost.multiply_adds for cost in costs),
        row_bytes=sum(cost.row_bytes for cost in costs),
        row_operations=sum(cost.row_operations for cost in costs),
        kv=kv,
        experts=experts,
    )
