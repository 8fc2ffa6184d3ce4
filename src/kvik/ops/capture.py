"""Which ops a forward pass calls, in order and with what: found by running it once on values that have no content."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn, cast

import numpy as np
import numpy.typing as npt

from kvik.cache import KVCacheSpec
from kvik.ops.base import Array, Batch, Forward, IntArray, KVIndex, LayerKV, Ops, WeightPlace
from kvik.ops.fusion import Call, fuse
from kvik.ops.table import OPS, Value


@dataclass(frozen=True, slots=True)
class Field:
    """An array of the batch, known when a step runs."""

    name: str
    kv_group: int | None = None  # whose it is; None: of all


_MAX_KV_GROUPS = 64


def _index_of(kv_group: int) -> KVIndex:
    return KVIndex(*(cast(IntArray, Field(field.name, kv_group)) for field in fields(KVIndex)))


STEP = Batch(
    **{field.name: cast(Any, Field(field.name)) for field in fields(Batch) if field.name != "groups"},
    groups=tuple(map(_index_of, range(_MAX_KV_GROUPS))),
)
"""Stands for the batch of the step while its ops are captured."""


def record(forward: Forward) -> tuple[list[Call], Value, Value | None]:
    """The calls of a forward pass, the value that it returns, and the one whose `hidden_rows` it returns beside it."""
    recording = _Recording()
    result = forward(recording, STEP)
    output, hidden = result if isinstance(result, tuple) else (result, None)
    assert isinstance(output, Value)
    assert hidden is None or isinstance(hidden, Value)
    return recording.calls, output, hidden


def capture(forward: Forward) -> tuple[list[Call], Value, Value | None]:
    """The same with calls fused."""
    calls, output, hidden = record(forward)
    return fuse(calls, STEP, [output] if hidden is None else [output, hidden]), output, hidden


class _Recording(Ops):
    """Notes each call as it comes."""

    name = "recording"

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._num_values = 0

    def run(self, name: str, *arguments: Any) -> Any:
        if name == "take_rows" and arguments[1] is STEP.hidden_rows:
            return arguments[0]  # no op of the step: who wants them reads them behind it
        of_logits = name == "take_rows" or any(isinstance(one, Value) and one.of_logits for one in arguments)
        shapes = OPS[name].shapes(*arguments)
        results = tuple(Value(self._num_values + at, shape, of_logits) for at, shape in enumerate(shapes))
        self._num_values += len(shapes)
        self.calls.append(Call(name, arguments, results))
        return results if name == "project" else results[0] if results else None

    def split_heads(self, x: Value, head_dim: int) -> Value:
        return Value(x.id, (x.width // head_dim, head_dim), x.of_logits)

    def merge_heads(self, x: Value) -> Value:
        return Value(x.id, (x.width,), x.of_logits)

    def load_rows(
        self,
        type_name: str,
        parts: Iterable[npt.NDArray[np.uint8]],
        rows: int,
        columns: int,
        place: WeightPlace | None = None,
    ) -> NoReturn:
        raise AssertionError("weights are loaded before a step is captured")

    def map_rows(self, type_name: str, data: npt.NDArray[np.uint8], rows: int, columns: int) -> NoReturn:
        raise AssertionError("tables are mapped before a step is captured")

    def allocate_kv(self, spec: KVCacheSpec, group_blocks: int | Sequence[int]) -> NoReturn:
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

    def to_numpy(self, x: Array) -> NoReturn:
        raise AssertionError("a captured value has no content")
