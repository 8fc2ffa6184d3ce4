"""Ops that pass each call on to others and note what came back: how a step is watched without a word in the decoder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from kvik.cache import KVCacheSpec
from kvik.models.decoder import Decoder
from kvik.ops.base import (
    PLAIN,
    Array,
    AttentionRule,
    Batch,
    IntArray,
    LayerKV,
    Linear,
    Nonlinearity,
    Norm,
    Ops,
    QKVWeights,
    RopeTable,
    Weight,
)

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class OpCall:
    """One op that ran."""

    name: str  # as in `Ops`
    place: str  # "embedding", "layer 0", ..., "head"
    weights: str  # names of the matrices or of the norm, where it has some
    started_s: float  # by time.perf_counter
    seconds: float
    shapes: tuple[tuple[int, ...], ...]  # of its results
    bits: str  # names the last row of its results: rows with the same one are the same to the last bit; "" without one


class TracingOps(Ops):
    """Runs one forward pass on `inner`, small op by small op, and keeps what passes by.

    A fused op is its default, a composition of small ones: the same bits, with everything between them to be seen.
    """

    name = "tracing"

    def __init__(self, inner: Ops, weight_names: Mapping[int, str]) -> None:
        self._inner = inner
        self._weight_names = weight_names
        self._place = "embedding"
        self.calls: list[OpCall] = []
        # By layer: (T, heads, head_dim) each.
        self.queries: list[FloatArray] = []
        self.keys: list[FloatArray] = []  # as they are computed, before the cache rounds them
        self.values: list[FloatArray] = []
        self.attended: list[FloatArray] = []
        self.hidden: FloatArray | None = None  # (T, hidden_size) behind the last layer

    def _pass_on(self, name: str, *arguments: Any, weights: Iterable[object] = ()) -> Any:
        started_s = time.perf_counter()
        result = getattr(self._inner, name)(*arguments)
        seconds = time.perf_counter() - started_s
        parts = result if isinstance(result, tuple) else () if result is None else (result,)
        arrays = [self._inner.to_numpy(part) for part in parts]
        names = ", ".join(self._weight_names[id(weight)] for weight in weights)
        shapes = tuple(array.shape for array in arrays)
        self.calls.append(OpCall(name, self._place, names, started_s, seconds, shapes, _bits_of_last_row(arrays)))
        return result

    def load_rows(self, type_name: str, parts: Iterable[npt.NDArray[np.uint8]], rows: int, columns: int) -> NoReturn:
        raise AssertionError("weights are loaded before a step is watched")

    def allocate_kv(self, spec: KVCacheSpec, num_blocks: int, window_blocks: Sequence[int] | None = None) -> NoReturn:
        raise AssertionError("KV arrays are allocated before a step is watched")

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

    def embed(self, table: Weight, token_ids: IntArray, scale: float = 1.0) -> Array:
        return self._pass_on("embed", table, token_ids, scale, weights=(table,))

    def norm(self, x: Array, norm: Norm) -> Array:
        return self._pass_on("norm", x, norm, weights=(norm,))

    def project(self, x: Array, linears: Sequence[Linear]) -> tuple[Array, ...]:
        results: tuple[Array, ...] = self._pass_on("project", x, linears, weights=linears)
        return results

    def split_heads(self, x: Array, head_dim: int) -> Array:
        return self._inner.split_heads(x, head_dim)

    def merge_heads(self, x: Array) -> Array:
        return self._inner.merge_heads(x)

    def rope(self, x: Array, positions: IntArray, table: RopeTable) -> Array:
        return self._pass_on("rope", x, positions, table)

    def write_kv(self, kv: LayerKV, k: Array, v: Array, slot_mapping: IntArray) -> None:
        self.keys.append(self._inner.to_numpy(k))
        self.values.append(self._inner.to_numpy(v))
        self._pass_on("write_kv", kv, k, v, slot_mapping)

    def attend(self, q: Array, kv: LayerKV, batch: Batch, rule: AttentionRule = PLAIN) -> Array:
        attended = self._pass_on("attend", q, kv, batch, rule)
        self.queries.append(self._inner.to_numpy(q))
        self.attended.append(self._inner.to_numpy(attended))
        return attended

    def activate(self, x: Array, activation: Nonlinearity, up: Array | None = None) -> Array:
        return self._pass_on("activate", x, activation, up)

    def soft_cap(self, x: Array, cap: float) -> Array:
        return self._pass_on("soft_cap", x, cap)

    def norm_qkv(
        self, x: Array, norm: Norm | None, weights: QKVWeights, rope: RopeTable | None, kv: LayerKV, batch: Batch
    ) -> Array:
        self._place = f"layer {len(self.queries)}"
        return super().norm_qkv(x, norm, weights, rope, kv, batch)

    def add(self, x: Array, y: Array) -> Array:
        return self._pass_on("add", x, y)

    def take_rows(self, x: Array, rows: IntArray) -> Array:
        self._place = "head"
        self.hidden = self._inner.to_numpy(x)
        return self._pass_on("take_rows", x, rows)

    def to_numpy(self, x: Array) -> FloatArray:
        return self._inner.to_numpy(x)


def weight_names(decoder: Decoder) -> dict[int, str]:
    """What each matrix and norm that ops are called with goes by, by `id`."""
    weights = decoder.weights
    # A tied head multiplies with the embedding's matrix, but in a projection of its own.
    named: list[tuple[object, str]] = [(weights.embedding, "embedding"), (weights.positions, "positions")]
    named += [(weights.norm, "norm"), (weights.lm_head, "lm_head")]
    for layer in weights.layers:
        qkv = layer.qkv
        named += [(qkv.query, "q_proj"), (qkv.key, "k_proj"), (qkv.value, "v_proj")]
        named += [(qkv.query_norm, "query_norm"), (qkv.key_norm, "key_norm")]
        named += [(getattr(layer, field.name), field.name) for field in fields(layer) if field.name != "qkv"]
    return {id(weight): name for weight, name in named if weight is not None}


def _bits_of_last_row(arrays: Sequence[FloatArray]) -> str:
    """A short hash: 64 bits, enough to tell the rows of a trace apart."""
    if not arrays:
        return ""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(array[-1:].tobytes())
    return digest.hexdigest()
