"""The C++ core behind the ops' protocol: allocates outputs, and calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from kvik import _native
from kvik.cache import KVCacheSpec
from kvik.config import ActivationDType
from kvik.machine import available_threads
from kvik.ops.base import (
    PLAIN,
    AttentionRule,
    Batch,
    Forward,
    IntArray,
    Linear,
    Nonlinearity,
    Norm,
    Ops,
    RopeTable,
    Weight,
)
from kvik.ops.program import CapturedStep, MachineLimits, native_linear, native_norm

FloatArray = npt.NDArray[np.float32]


class NativeKVCache(list[_native.LayerKV]):
    """The layers of one allocation, and the arrays that they are parts of, by KV group."""

    def __init__(self, spec: KVCacheSpec, counts: Sequence[int]) -> None:
        kv_groups = spec.groups
        self.arrays = {
            kv_group: _native.KVArrays(
                kv_groups.count(kv_group),
                counts[kv_group],
                spec.num_kv_heads,
                spec.head_dim,
                spec.dtype,
                kv_group,
            )
            for kv_group in sorted(set(kv_groups))
        }
        super().__init__(
            self.arrays[kv_group].layer(kv_groups[:index].count(kv_group)) for index, kv_group in enumerate(kv_groups)
        )


class NativeOps(Ops):
    """Packed weights, integer kernels, own threads: the same bits for any chunks, batches, threads, instruction set."""

    name = "native"

    def __init__(self, activations: ActivationDType = "int8", threads: int | None = None) -> None:
        self.activations: ActivationDType = activations
        self._int16_activations = activations == "int16"
        self._pool = _native.ThreadPool(threads or available_threads())
        self._arena = _native.WeightArena()

    @property
    def num_threads(self) -> int:
        """Threads that share each op."""
        return self._pool.num_threads

    def limits(self, num_bytes: int) -> MachineLimits:
        """What the machine can do with these threads, measured now (about a second); reading from `num_bytes`."""
        return MachineLimits(
            bytes_per_s=_native.read_bandwidth(self._pool, num_bytes),
            integer_operations_per_s=2 * _native.integer_throughput(self._pool),
            float_operations_per_s=2 * _native.float_throughput(self._pool),
        )

    def load_weight(self, type_name: str, data: npt.NDArray[np.uint8], rows: int, columns: int) -> _native.PackedWeight:
        return _native.pack(type_name, data, rows, columns, self._arena, self._pool)

    def load_rows(
        self, type_name: str, parts: Iterable[npt.NDArray[np.uint8]], rows: int, columns: int
    ) -> _native.PackedWeight:
        packer = _native.WeightPacker(type_name, rows, columns, self._arena)
        for part in parts:
            packer.add(part, self._pool)
        return packer.finish()

    def allocate_kv(
        self, spec: KVCacheSpec, num_blocks: int, window_blocks: Sequence[int] | None = None
    ) -> NativeKVCache:
        assert spec.block_size == _native.BLOCK_SIZE
        return NativeKVCache(spec, (num_blocks, *(window_blocks or (num_blocks,) * len(spec.windows))))

    def copy_blocks(
        self, kv_cache: Sequence[_native.LayerKV], copies: Sequence[tuple[int, int]], kv_group: int = 0
    ) -> None:
        _native.copy_blocks(self._pool, _arrays_of(kv_cache, kv_group), copies)

    def discard_blocks(
        self, kv_cache: Sequence[_native.LayerKV], superblocks: Sequence[int], kv_group: int = 0
    ) -> None:
        _native.discard_superblocks(_arrays_of(kv_cache, kv_group), superblocks)

    def read_blocks(self, kv_cache: Sequence[_native.LayerKV], block_ids: Sequence[int], kv_group: int = 0) -> bytes:
        return _native.read_blocks(_arrays_of(kv_cache, kv_group), block_ids)

    def write_blocks(
        self, kv_cache: Sequence[_native.LayerKV], block_ids: Sequence[int], data: memoryview | bytes, kv_group: int = 0
    ) -> None:
        _native.write_blocks(_arrays_of(kv_cache, kv_group), block_ids, np.frombuffer(data, np.uint8))

    def embed(self, table: Weight, token_ids: IntArray, scale: float = 1.0) -> FloatArray:
        out = np.empty((len(token_ids), table.columns), np.float32)
        _native.embed_rows(_packed(table), token_ids, scale, out)
        return out

    def norm(self, x: FloatArray, norm: Norm) -> FloatArray:
        out = np.empty_like(x)
        width = len(norm.weight)
        _native.norm(self._pool, x.reshape(-1, width), native_norm(norm), out.reshape(-1, width))
        return out

    def project(self, x: FloatArray, linears: Sequence[Linear]) -> tuple[FloatArray, ...]:
        outs = [np.empty((len(x), linear.rows), np.float32) for linear in linears]
        _native.project(self._pool, x, [native_linear(linear) for linear in linears], outs, self._int16_activations)
        return tuple(outs)

    def split_heads(self, x: FloatArray, head_dim: int) -> FloatArray:
        return x.reshape(len(x), x.shape[1] // head_dim, head_dim)

    def merge_heads(self, x: FloatArray) -> FloatArray:
        return x.reshape(len(x), x.shape[1] * x.shape[2])

    def rope(self, x: FloatArray, positions: IntArray, table: RopeTable) -> FloatArray:
        out = np.empty_like(x)
        _native.rope(self._pool, x, positions, table.cos_sin, table.adjacent_pairs, out)
        return out

    def write_kv(self, kv: _native.LayerKV, k: FloatArray, v: FloatArray, slot_mapping: IntArray) -> None:
        _native.write_kv(self._pool, kv, k, v, slot_mapping)

    def attend(self, q: FloatArray, kv: _native.LayerKV, batch: Batch, rule: AttentionRule = PLAIN) -> FloatArray:
        out = np.empty_like(q)
        scale, cap = rule.scale_for(q.shape[2]), rule.soft_cap or 0.0
        places = (batch.places(kv.kv_group).block_tables, batch.sequence_index, batch.positions)
        _native.attend(self._pool, q, kv, *places, scale, cap, out, rule.window)
        return out

    def activate(self, x: FloatArray, activation: Nonlinearity, up: FloatArray | None = None) -> FloatArray:
        out = np.empty_like(x)
        _native.activate(self._pool, activation, x, up, out)
        return out

    def soft_cap(self, x: FloatArray, cap: float) -> FloatArray:
        out = np.empty_like(x)
        _native.soft_cap(self._pool, x, cap, out)
        return out

    def add(self, x: FloatArray, y: FloatArray) -> FloatArray:
        out = np.empty_like(x)
        _native.add(self._pool, x, y, out)
        return out

    def take_rows(self, x: FloatArray, rows: IntArray) -> FloatArray:
        return x[rows]

    def capture(self, forward: Forward) -> CapturedStep:
        return CapturedStep(forward, self._pool, int16_activations=self._int16_activations)

    def row_sampler(self) -> _native.Sampler:
        return _native.Sampler(self._pool)

    def to_numpy(self, x: FloatArray) -> FloatArray:
        return x


def _packed(weight: Weight) -> _native.PackedWeight:
    assert isinstance(weight, _native.PackedWeight)
    return weight


def _arrays_of(kv_cache: Sequence[_native.LayerKV], kv_group: int) -> _native.KVArrays:
    assert isinstance(kv_cache, NativeKVCache)
    return kv_cache.arrays[kv_group]
