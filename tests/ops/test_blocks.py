"""Blocks as wholes: copied from one to another, and their memory given back."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from kvik.cache import BLOCK_SIZE, BLOCKS_PER_SUPERBLOCK, KVCacheSpec
from kvik.ops.base import Batch, LayerKV, Ops
from kvik.ops.native import NativeOps
from kvik.ops.reference import ReferenceOps
from looped import looped
from ops.arrangement import KV_DTYPES, FloatArray

LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 24

pytestmark = pytest.mark.sanitize

every_kv_type = looped("dtype", KV_DTYPES)


@pytest.fixture(params=["native", "reference"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return NativeOps(threads=2) if request.param == "native" else ReferenceOps()


def filled(ops: Ops, dtype: str, num_blocks: int) -> list[LayerKV]:
    """A cache whose every slot holds something of its own."""
    kv_cache = ops.allocate_kv(KVCacheSpec.uniform(LAYERS, KV_HEADS, HEAD_DIM, dtype), num_blocks)
    rng = np.random.default_rng(num_blocks)
    num_slots = num_blocks * BLOCK_SIZE
    for kv in kv_cache:
        k, v = (rng.normal(0, 1, (num_slots, KV_HEADS, HEAD_DIM)).astype(np.float32) for _ in range(2))
        ops.write_kv(kv, k, v, np.arange(num_slots, dtype=np.int32))
    return kv_cache  # type: ignore[return-value]


def content(ops: Ops, kv_cache: list[LayerKV], block: int) -> FloatArray:
    """What a query sees of one block, in every layer: a row for each of its tokens."""
    q = np.random.default_rng(1).normal(0, 1, (BLOCK_SIZE, KV_HEADS, HEAD_DIM)).astype(np.float32)
    positions = np.arange(BLOCK_SIZE, dtype=np.int32)
    zeros = np.zeros(BLOCK_SIZE, np.int32)
    batch = Batch.in_blocks(zeros, positions, zeros, np.array([[block]], np.int32), zeros[:0])
    return np.stack([ops.to_numpy(ops.attend(q, kv, batch)) for kv in kv_cache])


@pytest.mark.tiny
@every_kv_type
def test_copies_are_made_in_order_and_touch_nothing_else(ops: Ops, dtype: str) -> None:
    kv_cache = filled(ops, dtype, 19)
    before = [content(ops, kv_cache, block) for block in range(19)]
    copies = [(0, 18), (7, 8), (18, 5), (9, 0)]  # within a superblock, across, a copy of a copy, a source since copied
    ops.copy_blocks(kv_cache, copies)
    holds = list(range(19))
    for source, target in copies:
        holds[target] = holds[source]
    for block, held in enumerate(holds):
        np.testing.assert_array_equal(content(ops, kv_cache, block), before[held])


def test_no_copies_are_none(ops: Ops) -> None:
    kv_cache = filled(ops, "f16", 2)
    before = content(ops, kv_cache, 1)
    ops.copy_blocks(kv_cache, [])
    ops.discard_blocks(kv_cache, [])
    np.testing.assert_array_equal(content(ops, kv_cache, 1), before)


@looped("bad", [(0, 0), (-1, 0), (0, -1), (9, 0), (0, 9), (2**40, 0)])
def test_a_copy_that_cannot_be_is_refused_before_any(ops: Ops, bad: tuple[int, int]) -> None:
    kv_cache = filled(ops, "f32", 9)
    before = content(ops, kv_cache, 1)
    with pytest.raises(ValueError, match="block"):
        ops.copy_blocks(kv_cache, [(0, 1), bad])
    np.testing.assert_array_equal(content(ops, kv_cache, 1), before)


@looped("bad", [-1, 2, 2**40])
def test_a_superblock_that_is_not_there_is_refused(ops: Ops, bad: int) -> None:
    kv_cache = filled(ops, "f32", 9)  # a superblock and a part of one
    with pytest.raises(ValueError, match="outside the cache"):
        ops.discard_blocks(kv_cache, [bad])


@every_kv_type
def test_neighbours_of_a_discarded_superblock_keep_their_content(ops: Ops, dtype: str) -> None:
    """Superblocks here begin and end inside pages; the last one is not full."""
    kv_cache = filled(ops, dtype, 4 * BLOCKS_PER_SUPERBLOCK + 3)
    kept = [*range(8), *range(16, 32)]
    before = [content(ops, kv_cache, block) for block in kept]
    ops.discard_blocks(kv_cache, [1, 4])
    for block, wanted in zip(kept, before, strict=True):
        np.testing.assert_array_equal(content(ops, kv_cache, block), wanted)


@every_kv_type
def test_a_discarded_block_can_be_written_again(ops: Ops, dtype: str) -> None:
    kv_cache = filled(ops, dtype, 16)
    before = [content(ops, kv_cache, block) for block in (8, 9)]
    ops.copy_blocks(kv_cache, [(8, 0), (9, 1)])
    ops.discard_blocks(kv_cache, [1])
    ops.copy_blocks(kv_cache, [(0, 12), (1, 15)])
    for block, wanted in zip((12, 15), before, strict=True):
        np.testing.assert_array_equal(content(ops, kv_cache, block), wanted)


def test_the_reference_shows_who_reads_what_was_discarded() -> None:
    ops = ReferenceOps()
    kv_cache = filled(ops, "int8", 9)
    ops.discard_blocks(kv_cache, [1])
    assert np.isnan(content(ops, kv_cache, 8)).all()


def resident_bytes() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what is resident")
def test_discarded_memory_is_the_systems() -> None:
    ops = NativeOps(threads=1)
    spec = KVCacheSpec.uniform(32, 2, 64, "f32")
    kv_cache = ops.allocate_kv(spec, 24)
    slots = np.arange(24 * BLOCK_SIZE, dtype=np.int32)
    ones = np.ones((len(slots), 2, 64), np.float32)
    for kv in kv_cache:
        ops.write_kv(kv, ones, ones, slots)
    superblock_bytes = BLOCKS_PER_SUPERBLOCK * spec.block_bytes
    before = resident_bytes()
    ops.discard_blocks(kv_cache, [0, 2])
    assert before - resident_bytes() >= 0.95 * 2 * superblock_bytes
    ops.discard_blocks(kv_cache, [0, 2])  # once more is no error
    assert before - resident_bytes() <= 1.05 * 2 * superblock_bytes
