"""What each op means, in plain NumPy: slow, and the judge of every other backend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import erf
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from kvik.cache import BLOCKS_PER_SUPERBLOCK, GroupSpec, KVCacheSpec
from kvik.cache.spec import SEGMENT_SIZE
from kvik.config import ActivationDType, StoredDType
from kvik.ops.base import (
    PLAIN,
    XIELU,
    AttentionRule,
    Batch,
    ExpertsWeights,
    IntArray,
    Linear,
    Nonlinearity,
    Norm,
    Ops,
    PositionScales,
    RopeTable,
    Weight,
    WeightPlace,
)
from kvik.ops.layers import blocks_of_groups, by_layer

FloatArray = npt.NDArray[np.float32]

SCALE_GROUP = 32
"""Columns whose activations share a scale."""

CODE_GROUP = 32
"""Items of a k4 key or a v4 value that share a scale."""

_erf = np.vectorize(erf, otypes=[np.float64])

_LEVELS: dict[ActivationDType, float] = {"int8": 127.0, "int16": 32384.0}


@dataclass(frozen=True, slots=True)
class ReferenceWeight:
    """A matrix dequantised to float32, and whether its type asks for quantised activations."""

    values: FloatArray  # (rows, columns)
    quantized: bool

    @property
    def rows(self) -> int:
        return int(self.values.shape[0])

    @property
    def columns(self) -> int:
        return int(self.values.shape[1])

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes


@dataclass(frozen=True, slots=True)
class ReferenceTable:
    """Rows of a GGUF tensor, dequantised as they are looked up."""

    type_name: str
    data: npt.NDArray[np.uint8]  # (rows, bytes of one)
    columns: int

    @property
    def rows(self) -> int:
        return len(self.data)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    def read(self, row_ids: IntArray) -> FloatArray:
        """The values of these rows."""
        if not len(row_ids):  # of which the library makes nothing
            return np.empty((0, self.columns), np.float32)
        return _row_values(self.type_name, self.data[row_ids])


def _row_values(type_name: str, raw: npt.NDArray[np.uint8]) -> FloatArray:
    """Float32 values of rows that are given as bytes."""
    plain = {"F32": np.float32, "F16": np.float16}.get(type_name)
    values = raw.view(plain) if plain else dequantize(raw, GGMLQuantizationType[type_name])
    return np.asarray(values, np.float32)


@dataclass(frozen=True, slots=True)
class ReferenceKV:
    """One layer's keys and values, each (num_blocks, block_size, num_kv_heads, head_dim)."""

    keys: npt.NDArray[np.floating]
    values: npt.NDArray[np.floating]
    dtypes: tuple[StoredDType, StoredDType]  # of keys and of values; of float32 arrays what the numbers stand for
    kv_group: int
    recent: ReferenceKV | None = None  # with k4 or v4

    @property
    def recent_group(self) -> int | None:
        """Whose block tables name the blocks of `recent`."""
        return None if self.recent is None else self.recent.kv_group

    @property
    def token_bytes(self) -> int:
        """Bytes that one token's key and value take."""
        return (self.keys[0, 0].nbytes + self.values[0, 0].nbytes) if len(self.keys) else 0


def _row_bytes(type_name: str, columns: int) -> int:
    block_columns, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return columns // block_columns * block_bytes


def quantize_activations(x: FloatArray, activations: ActivationDType) -> FloatArray:
    """x as the integer kernels see it: whole multiples of max|scale group| / 127 (int8) or / 32384 (int16)."""
    scale_groups = x.reshape(*x.shape[:-1], x.shape[-1] // SCALE_GROUP, SCALE_GROUP)
    return _whole_multiples(scale_groups, _LEVELS[activations]).reshape(x.shape)


def quantize_kv(x: FloatArray) -> FloatArray:
    """Keys or values (..., head_dim) as an int8 cache keeps them: whole multiples of max|row| / 127."""
    seen = _whole_multiples(x, 127.0)
    seen[~np.isfinite(x).all(axis=-1)] = np.nan
    return seen


def hadamard(x: FloatArray) -> FloatArray:
    """The Hadamard transform of the last axis, orthonormal, in the order of additions that all backends have."""
    size, out = x.shape[-1], x.astype(np.float32)
    half = 1
    while half < size:
        first, second = np.moveaxis(out.reshape(*x.shape[:-1], size // (2 * half), 2, half), -2, 0)
        out = np.stack([first + second, first - second], axis=-2).reshape(x.shape)
        half *= 2
    return np.asarray(out * (np.float32(1) / np.sqrt(np.float32(size))), np.float32)


def quantize_codes(x: FloatArray) -> FloatArray:
    """Transformed keys or values (..., head_dim) as k4 and v4 keep them; see `Ops.write_kv`."""
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // CODE_GROUP, CODE_GROUP)
    above, below = groups.max(axis=-1, keepdims=True), (-groups).max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        scale = (np.where(above >= below, above, -below) / np.float32(-8)).astype(np.float16).astype(np.float32)
        inverse = np.where(scale != 0, np.float32(1) / scale, np.float32(0))
        seen = np.clip(np.rint(groups * inverse), -8, 7).astype(np.float32) * scale
    seen[~np.isfinite(groups).all(axis=-1)] = np.nan
    return np.asarray(seen.reshape(x.shape), np.float32)


def _whole_multiples(rows: FloatArray, max_level: float) -> FloatArray:
    levels = np.float32(max_level)
    largest = np.abs(rows).max(axis=-1, keepdims=True)
    usable = ~(largest <= 1e-30)  # NaN is not too small
    # The quotient first, then the product: which way a value near the middle of two levels goes is part of the meaning.
    inverse = np.divide(levels, largest, out=np.zeros_like(largest), where=usable)
    with np.errstate(invalid="ignore"):  # infinity times its inverse
        quants = np.clip(np.rint(rows * inverse), -levels, levels)
        seen: FloatArray = (quants * np.where(usable, largest / levels, 0)).astype(np.float32)
    return seen


class ReferenceOps(Ops):
    """The oracle. Sums run in float64 and are rounded to float32 once."""

    name = "reference"

    def __init__(self, activations: ActivationDType = "int8") -> None:
        self.activations: ActivationDType = activations

    def load_rows(
        self,
        type_name: str,
        parts: Iterable[npt.NDArray[np.uint8]],
        rows: int,
        columns: int,
        place: WeightPlace | None = None,
    ) -> ReferenceWeight:
        values, num_filled = np.empty((rows, columns), np.float32), 0
        for part in parts:
            raw = part.reshape(-1, _row_bytes(type_name, columns))
            values[num_filled : num_filled + len(raw)] = _row_values(type_name, raw)
            num_filled += len(raw)
        if num_filled != rows:
            raise ValueError(f"{num_filled} of {rows} rows came")
        return ReferenceWeight(values, quantized=type_name not in ("F32", "F16", "BF16"))

    def map_rows(self, type_name: str, data: npt.NDArray[np.uint8], rows: int, columns: int) -> ReferenceTable:
        return ReferenceTable(type_name, data.reshape(rows, _row_bytes(type_name, columns)), columns)

    def allocate_kv(self, spec: KVCacheSpec, group_blocks: int | Sequence[int]) -> Sequence[ReferenceKV]:
        def layer(index: int, group: GroupSpec, num_blocks: int) -> ReferenceKV:
            assert group.value is not None, f"no keys and values in a group of kind {group.kind}"
            shape = (num_blocks, spec.block_size, group.num_kv_heads)
            keys, values = (
                np.zeros((*shape, vector.num_items), np.float16 if vector.dtype == "f16" else np.float32)
                for vector in (group.key, group.value)
            )
            return ReferenceKV(keys, values, (group.key.dtype, group.value.dtype), index)

        counts = blocks_of_groups(spec, group_blocks)

        def with_recent(index: int, _: int) -> ReferenceKV:
            kv, recent = layer(index, spec.groups[index], counts[index]), spec.recent_of.get(index)
            return kv if recent is None else replace(kv, recent=layer(recent, spec.groups[recent], counts[recent]))

        return by_layer(spec, with_recent)

    def copy_blocks(
        self, kv_cache: Sequence[ReferenceKV], copies: Sequence[tuple[int, int]], kv_group: int = 0
    ) -> None:
        layers = _layers_of(kv_cache, kv_group)
        for source, target in copies:
            _require_ids("block", (source, target), len(layers[0].keys) if layers else 0)
            if source == target:
                raise ValueError("a block cannot be copied to itself")
        for kv in layers:
            for source, target in copies:
                kv.keys[target], kv.values[target] = kv.keys[source], kv.values[source]

    def discard_blocks(self, kv_cache: Sequence[ReferenceKV], superblocks: Sequence[int], kv_group: int = 0) -> None:
        layers = _layers_of(kv_cache, kv_group)
        count = len(layers[0].keys) if layers else 0
        _require_ids("superblock", superblocks, -(-count // BLOCKS_PER_SUPERBLOCK))
        for kv in layers:
            for superblock in superblocks:
                blocks = slice(superblock * BLOCKS_PER_SUPERBLOCK, (superblock + 1) * BLOCKS_PER_SUPERBLOCK)
                kv.keys[blocks] = kv.values[blocks] = np.nan  # whoever reads them is found out

    def read_blocks(self, kv_cache: Sequence[ReferenceKV], block_ids: Sequence[int], kv_group: int = 0) -> bytes:
        tiles = _tiles(kv_cache, block_ids, kv_group)
        return b"".join(tile.tobytes() for tile in tiles)

    def write_blocks(
        self, kv_cache: Sequence[ReferenceKV], block_ids: Sequence[int], data: memoryview | bytes, kv_group: int = 0
    ) -> None:
        tiles, at = _tiles(kv_cache, block_ids, kv_group), 0
        if len(data) != sum(tile.nbytes for tile in tiles):
            raise ValueError("the data are not as long as the blocks")
        for tile in tiles:
            tile[...] = np.frombuffer(data, tile.dtype, tile.size, at).reshape(tile.shape)
            at += tile.nbytes

    def run(self, name: str, *arguments: Any) -> Any:
        return getattr(self, name)(*arguments)

    def embed(self, table: Weight, token_ids: IntArray, scale: float = 1.0) -> FloatArray:
        rows = table.read(token_ids) if isinstance(table, ReferenceTable) else _values(table)[token_ids]
        return rows * np.float32(scale)

    def norm(self, x: FloatArray, norm: Norm) -> FloatArray:
        wide = x.astype(np.float64).reshape(*x.shape[:-1], x.shape[-1] // len(norm.weight), len(norm.weight))
        if norm.kind == "layer":
            wide = wide - wide.mean(axis=-1, keepdims=True)
        normed = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + norm.eps) * norm.weight
        if norm.bias is not None:
            normed = normed + norm.bias
        return np.asarray(normed.reshape(x.shape), np.float32)

    def project(self, x: FloatArray, linears: Sequence[Linear]) -> tuple[FloatArray, ...]:
        results = []
        for linear in linears:
            weight = linear.matrix
            assert isinstance(weight, ReferenceWeight)
            seen = quantize_activations(x, self.activations) if weight.quantized else x
            product = seen.astype(np.float64) @ weight.values.T.astype(np.float64)
            if linear.bias is not None:
                product += linear.bias
            results.append((product * linear.scale).astype(np.float32))
        return tuple(results)

    def split_heads(self, x: FloatArray, head_dim: int) -> FloatArray:
        return x.reshape(len(x), x.shape[1] // head_dim, head_dim)

    def merge_heads(self, x: FloatArray) -> FloatArray:
        return x.reshape(len(x), x.shape[1] * x.shape[2])

    def rope(self, x: FloatArray, positions: IntArray, table: RopeTable) -> FloatArray:
        cos_sin = table.cos_sin[positions][:, None]  # (T, 1, pairs, 2)
        cosine, sine = cos_sin[..., 0], cos_sin[..., 1]
        pairs, half = cosine.shape[-1], table.half
        first = slice(0, pairs) if half else slice(0, 2 * pairs, 2)
        second = slice(half, half + pairs) if half else slice(1, 2 * pairs, 2)
        out = x.copy()
        out[..., first] = x[..., first] * cosine - x[..., second] * sine
        out[..., second] = x[..., first] * sine + x[..., second] * cosine
        return out

    def scale_by_position(self, x: FloatArray, positions: IntArray, scales: PositionScales) -> FloatArray:
        return x * scales.factors[positions][:, None, None]

    def write_kv(
        self,
        kv: ReferenceKV,
        k: FloatArray,
        v: FloatArray,
        slot_mapping: IntArray,
        recent_slots: IntArray | None = None,
    ) -> None:
        k, v = (
            hadamard(rows) if dtype in ("k4", "v4") else rows for rows, dtype in zip((k, v), kv.dtypes, strict=True)
        )
        for part, slots in ((kv, slot_mapping), (kv.recent, recent_slots)):
            if part is None or slots is None:
                assert part is None, "what is recent needs its slots"
                assert slots is None, "recent slots where no codes are kept"
                continue
            blocks, offsets = np.divmod(slots, part.keys.shape[1])
            for stored, rows, dtype in zip((part.keys, part.values), (k, v), part.dtypes, strict=True):
                kept = quantize_kv(rows) if dtype == "int8" else rows
                stored[blocks, offsets] = quantize_codes(rows) if dtype in ("k4", "v4") else kept

    def attend(self, q: FloatArray, kv: ReferenceKV, batch: Batch, rule: AttentionRule = PLAIN) -> FloatArray:
        num_heads, head_dim = q.shape[1:]
        block_size, queries_per_kv = kv.keys.shape[1], num_heads // kv.keys.shape[2]
        out = np.empty_like(q)
        if kv.dtypes[0] == "k4":
            q = hadamard(q)
        for token, sequence in enumerate(batch.sequence_index):
            first = 0 if rule.window is None else max(0, batch.kv_index[token] + 1 - rule.window)
            seen = np.arange(first, batch.kv_bounds[token])
            is_recent = (seen < block_size) | (seen // SEGMENT_SIZE == (batch.kv_bounds[token] - 1) // SEGMENT_SIZE)
            keys, values = np.empty((2, len(seen), *kv.keys.shape[2:]), np.float64)
            for part, those in ((kv, ~is_recent), (kv.recent or kv, is_recent)):
                table, places = batch.groups[part.kv_group].block_tables[sequence], seen[those]
                where = table[places // block_size], places % block_size
                keys[those], values[those] = part.keys[where], part.values[where]
            keys, values = (each.repeat(queries_per_kv, axis=1) for each in (keys, values))
            # (tokens seen, num_heads, head_dim)
            scores = np.einsum("hd,thd->ht", q[token].astype(np.float64), keys) * rule.scale_for(head_dim)
            if rule.soft_cap is not None:
                scores = rule.soft_cap * np.tanh(scores / rule.soft_cap)
            if rule.sinks is not None:
                scores = np.column_stack([scores, rule.sinks])
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[token] = np.einsum("ht,thd->hd", weights[:, : len(seen)], values)
        return hadamard(out) if kv.dtypes[1] == "v4" else out

    def activate(self, x: FloatArray, activation: Nonlinearity, up: FloatArray | None = None) -> FloatArray:
        wide = x.astype(np.float64)
        with np.errstate(over="ignore"):  # exp(-x) may reach infinity: the quotient is then the right zero
            match activation:
                case "silu":
                    wide = wide / (1 + np.exp(-wide))
                case "gelu":
                    wide = wide * (1 + _erf(wide / np.sqrt(2))) / 2
                case "gelu_tanh":
                    wide = wide / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
                case "relu":
                    wide = np.maximum(wide, 0)
                case "relu2":
                    wide = np.square(np.maximum(wide, 0))
                case "clamped_silu":
                    wide = np.minimum(wide, 7)
                    wide = wide / (1 + np.exp(-1.702 * wide))
                    up = None if up is None else np.clip(up, -7, 7) + np.float32(1)
        return np.asarray(wide if up is None else wide * up, np.float32)

    def experts(
        self, x: FloatArray, logits: FloatArray, weights: ExpertsWeights, activation: Nonlinearity
    ) -> FloatArray:
        out = np.zeros(x.shape, np.float64)
        for token, (row, row_logits) in enumerate(zip(x, logits, strict=True)):
            for expert_id, weight in sorted(choose_experts(row_logits, weights).items()):
                expert = weights.experts[expert_id]
                hidden = self.linear(row[None], expert.up)
                if expert.gate is None:
                    hidden = self.activate(hidden, activation)
                else:
                    hidden = self.activate(self.linear(row[None], expert.gate), activation, hidden)
                out[token] += np.float64(weight) * self.linear(hidden, expert.down)[0]
        return out.astype(np.float32)

    def gate(self, x: FloatArray, gates: FloatArray) -> FloatArray:
        with np.errstate(over="ignore"):
            return np.asarray(x / (1 + np.exp(-gates.astype(np.float64))), np.float32)

    def xielu(self, x: FloatArray, curve: XIELU) -> FloatArray:
        wide = x.astype(np.float64)
        above = curve.alpha_p * np.square(wide)
        below = curve.alpha_n * (np.expm1(np.minimum(wide, curve.eps)) - wide)
        return np.asarray(np.where(wide > 0, above, below) + curve.beta * wide, np.float32)

    def soft_cap(self, x: FloatArray, cap: float) -> FloatArray:
        return np.asarray(cap * np.tanh(x.astype(np.float64) / cap), np.float32)

    def add(self, x: FloatArray, y: FloatArray, scale: float = 1.0) -> FloatArray:
        return (x + y) * np.float32(scale)

    def take_columns(self, x: FloatArray, start: int, count: int) -> FloatArray:
        return x[:, start : start + count].copy()

    def take_rows(self, x: FloatArray, rows: IntArray) -> FloatArray:
        return x[rows]

    def to_numpy(self, x: FloatArray) -> FloatArray:
        return x


def choose_experts(logits: FloatArray, weights: ExpertsWeights) -> dict[int, np.float32]:
    """The experts that a token's logits (num_experts,) choose, and their weights; see `Routing`."""
    routing, wide = weights.routing, logits.astype(np.float64)
    with np.errstate(over="ignore"):
        scores = {"softmax": _softmax(wide), "sigmoid": 1 / (1 + np.exp(-wide)), "logits": wide}[routing.scores]
    scores = scores.astype(np.float32)
    to_choose_by = scores if weights.choice_bias is None else scores + weights.choice_bias
    if routing.num_groups > 1:
        groups = to_choose_by.reshape(routing.num_groups, -1)
        best = np.sort(groups, axis=1)[:, -2:].sum(axis=1)
        is_left_out = np.ones(routing.num_groups, bool)
        is_left_out[np.argsort(-best, kind="stable")[: routing.num_chosen_groups]] = False
        to_choose_by = np.where(is_left_out[:, None], -np.inf, groups).reshape(-1)
    chosen = np.argsort(-to_choose_by, kind="stable")[: routing.num_chosen]
    values = scores[chosen].astype(np.float64)
    if routing.scores == "logits":
        values = _softmax(values)
    if routing.renormalize:
        values = values / (values.sum() + routing.min_sum)
    values = values * routing.scale
    if weights.scales is not None:
        values = values * weights.scales[chosen]
    return dict(zip(chosen.tolist(), values.astype(np.float32), strict=True))


def _softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    exponentials = np.exp(x - x.max())
    return np.asarray(exponentials / exponentials.sum())


def _values(weight: Weight) -> FloatArray:
    assert isinstance(weight, ReferenceWeight)
    return weight.values


def _layers_of(kv_cache: Sequence[ReferenceKV], kv_group: int) -> list[ReferenceKV]:
    """What the layers of a group keep there."""
    parts = [part for kv in kv_cache for part in (kv, kv.recent) if part is not None]
    return [part for part in parts if part.kv_group == kv_group]


def _tiles(kv_cache: Sequence[ReferenceKV], block_ids: Sequence[int], kv_group: int) -> list[npt.NDArray[Any]]:
    """Keys and values of whole blocks, layer after layer."""
    layers = _layers_of(kv_cache, kv_group)
    _require_ids("block", block_ids, len(layers[0].keys) if layers else 0)
    return [stored[block_id] for block_id in block_ids for kv in layers for stored in (kv.keys, kv.values)]


def _require_ids(kind: str, ids: Sequence[int], count: int) -> None:
    for number in ids:
        if not 0 <= number < count:
            raise ValueError(f"{kind} {number} is outside the cache, which has {count}")
