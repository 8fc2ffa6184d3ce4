"""Which ops a forward pass calls, in order and with what: found by running it once on values that have no content."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn, cast

import numpy as np
import numpy.typing as npt

from kvik.cache import KVCacheSpec
from kvik.ops.base import (
    PLAIN,
    Array,
    AttentionRule,
    Batch,
    Forward,
    IntArray,
    KVIndex,
    LayerKV,
    Linear,
    Nonlinearity,
    Norm,
    Ops,
    QKVWeights,
    RopeTable,
    Weight,
)


@dataclass(frozen=True, slots=True)
class Value:
    """An array that some op of the step computes: a row for each token, or for each logit row."""

    id: int
    shape: tuple[int, ...]  # behind the first axis


@dataclass(frozen=True, slots=True)
class Field:
    """An array of the batch, known when a step runs."""

    name: str
    kv_group: int = 0  # whose places it is one of


_MAX_KV_GROUPS = 64


def _places(kv_group: int) -> KVIndex:
    return KVIndex(*(cast(IntArray, Field(field.name, kv_group)) for field in fields(KVIndex)))


STEP = Batch(
    **{field.name: cast(Any, Field(field.name)) for field in fields(Batch) if field.name != "windows"},
    windows=tuple(map(_places, range(1, _MAX_KV_GROUPS))),
)
"""Stands for the batch of the step while its ops are captured."""


@dataclass(frozen=True, slots=True)
class Call:
    """One op: its name in `Ops`, the arguments it was called with, the values it gave."""

    name: str
    arguments: tuple[Any, ...]  # `Value`s, `Field`s and `STEP` among what is the same in each step
    results: tuple[Value, ...]


def capture(forward: Forward) -> tuple[list[Call], Value, Value | None]:
    """The calls of a forward pass, the value that it returns, and the one whose `hidden_rows` it returns beside it."""
    capturing = _CapturingOps()
    result = forward(capturing, STEP)
    output, hidden = result if isinstance(result, tuple) else (result, None)
    assert isinstance(output, Value)
    assert hidden is None or isinstance(hidden, Value)
    return capturing.calls, output, hidden


class _CapturingOps(Ops):
    """Notes each call as it comes, fused ones whole."""

    name = "capture"

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._num_values = 0

    def _note(self, name: str, arguments: tuple[Any, ...], *shapes: tuple[int, ...]) -> tuple[Value, ...]:
        results = tuple(Value(self._num_values + index, shape) for index, shape in enumerate(shapes))
        self._num_values += len(shapes)
        self.calls.append(Call(name, arguments, results))
        return results

    def _one(self, name: str, arguments: tuple[Any, ...], shape: tuple[int, ...]) -> Value:
        return self._note(name, arguments, shape)[0]

    def load_rows(self, type_name: str, parts: Iterable[npt.NDArray[np.uint8]], rows: int, columns: int) -> NoReturn:
        raise AssertionError("weights are loaded before a step is captured")

    def allocate_kv(self, spec: KVCacheSpec, num_blocks: int, window_blocks: Sequence[int] | None = None) -> NoReturn:
        raise AssertionError("KV arrays are allocated before a step is captured")

    def copy_blocks(
        self, kv_cache: Sequence[LayerKV], copies: Sequence[tuple[int, int]], kv_group: int = 0
    ) -> NoReturn:
        raise AssertionError("blocks are copied before a step, not in it")

    def discard_blocks(self, kv_cache: Sequence[LayerKV], superblocks: Sequence[int], kv_group: int = 0) -> NoReturn:
        raise AssertionError("memory is given back between steps, not in one")

    def read_blocks(self, kv_cache: Sequence[LayerKV], block_ids: Sequence[int], kv_group: int = 0) -> NoReturn:
        raise AssertionError("blocks are read between steps, not in one")

    def write_blocks(
        self, kv_cache: Sequence[LayerKV], block_ids: Sequence[int], data: memoryview | bytes, kv_group: int = 0
    ) -> NoReturn:
        raise AssertionError("blocks are written back between steps, not in one")

    def embed(self, table: Weight, token_ids: IntArray, scale: float = 1.0) -> Value:
        return self._one("embed", (table, token_ids, scale), (table.columns,))

    def norm(self, x: Value, norm: Norm) -> Value:
        return self._one("norm", (x, norm), x.shape)

    def project(self, x: Value, linears: Sequence[Linear]) -> tuple[Value, ...]:
        return self._note("project", (x, tuple(linears)), *((linear.rows,) for linear in linears))

    def linear(self, x: Value, linear: Linear, residual: Value | None = None) -> Value:
        return self._one("linear", (x, linear, residual), (linear.rows,))

    def split_heads(self, x: Value, head_dim: int) -> Value:
        return Value(x.id, (x.shape[0] // head_dim, head_dim))

    def merge_heads(self, x: Value) -> Value:
        return Value(x.id, (x.shape[0] * x.shape[1],))

    def rope(self, x: Value, positions: IntArray, table: RopeTable) -> Value:
        return self._one("rope", (x, positions, table), x.shape)

    def write_kv(self, kv: LayerKV, k: Value, v: Value, slot_mapping: IntArray) -> None:
        self._note("write_kv", (kv, k, v, slot_mapping))

    def attend(self, q: Value, kv: LayerKV, batch: Batch, rule: AttentionRule = PLAIN) -> Value:
        return self._one("attend", (q, kv, batch, rule), q.shape)

    def activate(self, x: Value, activation: Nonlinearity, up: Value | None = None) -> Value:
        return self._one("activate", (x, activation, up), x.shape)

    def soft_cap(self, x: Value, cap: float) -> Value:
        return self._one("soft_cap", (x, cap), x.shape)

    def norm_qkv(
        self, x: Value, norm: Norm | None, weights: QKVWeights, rope: RopeTable | None, kv: LayerKV, batch: Batch
    ) -> Value:
        shape = (weights.query.rows // weights.head_dim, weights.head_dim)
        return self._one("norm_qkv", (x, norm, weights, rope, kv, batch), shape)

    def norm_gated(self, x: Value, norm: Norm | None, gate: Linear, up: Linear, activation: Nonlinearity) -> Value:
        return self._one("norm_gated", (x, norm, gate, up, activation), (gate.rows,))

    def norm_linear(self, x: Value, norm: Norm | None, linear: Linear) -> Value:
        return self._one("norm_linear", (x, norm, linear), (linear.rows,))

    def add(self, x: Value, y: Value) -> Value:
        return self._one("add", (x, y), x.shape)

    def take_rows(self, x: Value, rows: IntArray) -> Value:
        if rows is STEP.hidden_rows:
            return x  # no op of the step: who wants them reads them behind it
        return self._one("take_rows", (x, rows), x.shape)

    def to_numpy(self, x: Array) -> NoReturn:
        raise AssertionError("a captured value has no content")
