"""The C++ core behind the ops' protocol: allocates outputs, and calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvik import _native
from kvik.cache import GroupSpec, KVCacheSpec
from kvik.config import ActivationDType
from kvik.machine import available_threads
from kvik.ops.base import Forward, Ops, Weight
from kvik.ops.layers import blocks_of_groups, by_layer
from kvik.ops.program import CapturedStep, MachineLimits, run_once

FloatArray = npt.NDArray[np.float32]

PACKED_VERSION = _native.PACKED_VERSION
"""Of the layout of packed weights: those of another one are of no use."""

PACKED_ALIGNMENT = _native.PACKED_ALIGNMENT
"""Bytes that a packed matrix begins at a multiple of."""


def packed_data(weight: Weight) -> memoryview:
    """The packed bytes, not copied."""
    assert isinstance(weight, _native.PackedWeight)
    return weight.data.data


class NativeKVCache(list[_native.LayerKV]):
    """The layers of one allocation, and the arrays that they are parts of, by group."""

    def __init__(self, spec: KVCacheSpec, group_blocks: int | Sequence[int]) -> None:
        counts = blocks_of_groups(spec, group_blocks)
        self.arrays = [_kv_arrays(group, index, counts[index]) for index, group in enumerate(spec.groups)]

        def layer(index: int, at: int) -> _native.LayerKV:
            kv, recent = self.arrays[index].layer(at), spec.recent_of.get(index)
            return kv if recent is None else kv.with_recent(self.arrays[recent].layer(at))

        super().__init__(by_layer(spec, layer))


def _kv_arrays(group: GroupSpec, index: int, num_blocks: int) -> _native.KVArrays:
    assert group.value is not None, f"no keys and values in a group of kind {group.kind}"
    dtypes = group.key.dtype, group.value.dtype
    return _native.KVArrays(group.num_layers, num_blocks, group.num_kv_heads, group.key.num_items, *dtypes, index)


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

    def places_together(self, kinds: Sequence[tuple[str, int, int]]) -> list[_native.WeightPlace]:
        return self._arena.places_together([self.packed_bytes(*kind) for kind in kinds])

    def load_rows(
        self,
        type_name: str,
        parts: Iterable[npt.NDArray[np.uint8]],
        rows: int,
        columns: int,
        place: _native.WeightPlace | None = None,
    ) -> _native.PackedWeight:
        packer = _native.WeightPacker(type_name, rows, columns, self._arena, place)
        for part in parts:
            packer.add(part, self._pool)
        return packer.finish()

    def map_rows(self, type_name: str, data: npt.NDArray[np.uint8], rows: int, columns: int) -> _native.MappedTable:
        return _native.MappedTable(type_name, data, rows, columns)

    def packed_bytes(self, type_name: str, rows: int, columns: int) -> int:
        """What such a matrix packs to."""
        return _native.packed_bytes(type_name, rows, columns)

    def checksums(self, weight: Weight) -> list[int]:
        """One for each 256 KiB of the packed bytes; they tell accidents, not forgeries."""
        assert isinstance(weight, _native.PackedWeight)
        return weight.checksums(self._pool)

    def map_packed(self, file: int, num_bytes: int, *, on_demand: bool = False) -> _native.PackedFile:
        """A file of so many bytes with packed matrices in it; its descriptor may be closed.

        With `on_demand`, of which memory cannot hold all: the system is asked for experts as they are chosen.
        """
        return _native.PackedFile(file, num_bytes, on_demand)

    def allocate_kv(self, spec: KVCacheSpec, group_blocks: int | Sequence[int]) -> NativeKVCache:
        assert spec.block_size == _native.BLOCK_SIZE
        return NativeKVCache(spec, group_blocks)

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

    def run(self, name: str, *arguments: Any) -> Any:
        if name == "take_rows":
            return arguments[0][arguments[1]]
        return run_once(self._pool, name, arguments, int16_activations=self._int16_activations)

    def split_heads(self, x: FloatArray, head_dim: int) -> FloatArray:
        return x.reshape(len(x), x.shape[1] // head_dim, head_dim)

    def merge_heads(self, x: FloatArray) -> FloatArray:
        return x.reshape(len(x), x.shape[1] * x.shape[2])

    def capture(self, forward: Forward) -> CapturedStep:
        return CapturedStep(forward, self._pool, int16_activations=self._int16_activations)

    def row_sampler(self) -> _native.Sampler:
        return _native.Sampler(self._pool)

    def to_numpy(self, x: FloatArray) -> FloatArray:
        return x


def _arrays_of(kv_cache: Sequence[_native.LayerKV], kv_group: int) -> _native.KVArrays:
    assert isinstance(kv_cache, NativeKVCache)
    return kv_cache.arrays[kv_group]
