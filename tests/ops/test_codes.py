"""Keys and values of 4.5 bits: what they are, who reads them, and that nothing but the position decides it."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest

from kvik import _native
from kvik.cache import KVCacheSpec
from kvik.errors import InvalidInput
from kvik.ops.base import AttentionRule, Batch, IntArray, KVIndex, LayerKV, Ops, slots_of
from kvik.ops.native import NativeOps
from kvik.ops.reference import ReferenceOps, hadamard, quantize_codes
from ops.arrangement import CODED_KV_DTYPES, FloatArray, Heads
from ops.sharing import filled, random_sharers
from ops.test_bits import same_bits

pytestmark = pytest.mark.sanitize

every_dtype = pytest.mark.parametrize("dtype", CODED_KV_DTYPES)
SEGMENT, NUM_BLOCKS = 256, 40


class Sequence:
    """One text's queries, keys and values; what is recent of it lies in other blocks than the rest."""

    def __init__(self, heads: Heads, length: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.heads, self.length = heads, length
        self.q = rng.normal(0, 2, (length, heads.num_heads, heads.head_dim)).astype(np.float32)
        self.k, self.v = (
            rng.normal(0, 1, (length, heads.num_kv_heads, heads.head_dim)).astype(np.float32) for _ in range(2)
        )

    def allocate(self, ops: Ops, dtype: str) -> LayerKV:
        heads = self.heads
        return ops.allocate_kv(KVCacheSpec.uniform(1, heads.num_kv_heads, heads.head_dim, dtype), NUM_BLOCKS)[0]

    def batch(self, tables: tuple[IntArray, IntArray], start: int, end: int) -> Batch:
        positions = np.arange(start, end, dtype=np.int32)
        groups = [KVIndex(table[positions // 32] * 32 + positions % 32, table[None]) for table in tables]
        zeros = np.zeros(len(positions), np.int32)
        return Batch.of_text(zeros, positions, zeros, groups, zeros[:0])

    def run(self, ops: Ops, dtype: str, chunk: int, seed: int = 0) -> FloatArray:
        """So many tokens at a time, each written before it looks back; what no token of a segment needs is spoiled."""
        kv, rng = self.allocate(ops, dtype), np.random.default_rng(seed)
        tables = tuple(rng.permutation(NUM_BLOCKS).astype(np.int32) for _ in range(2))
        outs = []
        for start in range(0, self.length, chunk):
            end = min(start + chunk, self.length)
            batch = self.batch(tables, start, end)  # type: ignore[arg-type]
            ops.write_kv(kv, self.k[start:end], self.v[start:end], *slots_of(kv, batch))
            outs.append(ops.to_numpy(ops.attend(self.q[start:end], kv, batch)))
            gone = np.arange(32, end // SEGMENT * SEGMENT, dtype=np.int32)  # of segments that are over
            if len(gone) and kv.recent_group is not None:
                nan = np.full((len(gone), self.heads.num_kv_heads, self.heads.head_dim), np.nan, np.float32)
                index = self.batch(tables, int(gone[0]), int(gone[-1]) + 1).groups  # type: ignore[arg-type]
                unused = np.full(len(gone), (NUM_BLOCKS - 1) * 32, np.int32) + gone % 32
                if (tables[0][: -(-self.length // 32)] != NUM_BLOCKS - 1).all():
                    ops.write_kv(kv, nan, nan, unused, index[1].slot_mapping)
        return np.concatenate(outs)


def test_the_transform_is_its_own_inverse_and_keeps_products() -> None:
    rng = np.random.default_rng(1)
    for size in (32, 64, 128, 256, 512):
        x, y = rng.normal(0, 1, (2, 7, size)).astype(np.float32)
        matrix = np.array([[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]) / np.sqrt(size)
        np.testing.assert_allclose(hadamard(x), x @ matrix, atol=1e-5)
        np.testing.assert_allclose(hadamard(hadamard(x)), x, atol=1e-5)
        np.testing.assert_allclose((hadamard(x) * hadamard(y)).sum(-1), (x * y).sum(-1), atol=1e-4)


def test_codes_are_whole_multiples_of_a_scale_that_the_largest_item_sets() -> None:
    x = np.zeros((1, 64), np.float32)
    x[0, :3] = 8.0, -3.4, 0.6
    x[0, 32:34] = -4.0, 4.0  # of equal ones the one above zero
    seen = quantize_codes(x)
    np.testing.assert_array_equal(seen[0, :4], [8, -3, 1, 0])
    np.testing.assert_array_equal(seen[0, 32:35], [-3.5, 4, 0])


@every_dtype
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_backends_agree(dtype: str, head_dim: int) -> None:
    text = Sequence(Heads(6, 2, head_dim), 600, head_dim)
    wanted = text.run(ReferenceOps(), dtype, 600)
    atol = 2e-3  # queries and weights are rounded too
    np.testing.assert_allclose(text.run(NativeOps(threads=2), dtype, 600), wanted, atol=atol)


def test_stored_codes_agree_to_the_bit() -> None:
    """The transform adds in one order everywhere, so that no item falls to another code."""
    rng, spec = np.random.default_rng(2), KVCacheSpec.uniform(1, 1, 64, "k=k4,v=f32")
    keys = (rng.normal(0, 1, (32, 1, 64)) * 10.0 ** rng.integers(-6, 4, (32, 1, 1))).astype(np.float32)
    slots, values = np.arange(32, dtype=np.int32), np.zeros((32, 1, 64), np.float32)
    native, reference = NativeOps(), ReferenceOps()
    kv, other = native.allocate_kv(spec, 8), reference.allocate_kv(spec, 8)
    native.write_kv(kv[0], keys, values, slots, slots)
    reference.write_kv(other[0], keys, values, slots, slots)
    tile = np.frombuffer(native.read_blocks(kv, [0]), np.uint8)
    codes = tile[: 32 * 32].reshape(8, 32, 4)  # [head_dim / 8][tokens][4], two to a byte
    scales = tile[32 * 32 : 36 * 32].view(np.float16).reshape(2, 32).T.astype(np.float32)
    items = np.stack([codes & 15, codes >> 4], axis=2).transpose(1, 0, 2, 3).reshape(32, 2, 32).astype(np.float32) - 8
    np.testing.assert_array_equal((items * scales[..., None]).reshape(32, 64), other[0].keys[0, :, 0])


@every_dtype
def test_chunks_threads_and_placement_do_not_show(dtype: str) -> None:
    text = Sequence(Heads(6, 2, 32), 790, 3)
    one_by_one = text.run(NativeOps(threads=1), dtype, 1)
    assert np.isfinite(one_by_one).all()
    for threads, chunk in ((1, 790), (2, 7), (2, 256), (3, 33), (3, 400)):
        same_bits(text.run(NativeOps(threads=threads), dtype, chunk, seed=chunk), one_by_one)


@every_dtype
@pytest.mark.parametrize("seed", range(4))
def test_sharing_does_not_show(dtype: str, seed: int) -> None:
    """A segment's last token reads it as it was written, beside others that read its codes."""
    rng = np.random.default_rng(seed)
    heads = Heads(int(rng.choice([1, 3, 8])) * 2, 2, int(rng.choice([32, 64])))
    sharers = random_sharers(heads, int(rng.integers(2, 9)), int(rng.choice([1, 4, 40])), rng)
    chunks = [
        (row, start, stop) if row % 2 else (row, (stop - 1) // SEGMENT * SEGMENT + SEGMENT - (stop - start), stop)
        for row, start, stop in sharers.chunks
    ]
    chunks = [(row, start, start + (stop - start)) for row, start, stop in chunks if start < stop]
    count = sum(stop - start for _, start, stop in chunks)
    q = rng.normal(0, 2, (count, heads.num_heads, heads.head_dim)).astype(np.float32)
    sharers = dataclasses.replace(sharers, chunks=chunks, q=q)
    alone = NativeOps(threads=1)
    kv = filled(alone, heads, dtype, sharers.num_blocks, rng)
    wanted = sharers.one_by_one(alone, kv)
    assert np.isfinite(wanted).all()
    for threads in (1, 3):
        same_bits(sharers.together(NativeOps(threads=threads), kv), wanted)


def test_queries_read_their_own_segment_and_the_first_block_as_written() -> None:
    text = Sequence(Heads(1, 1, 32), 600, 4)
    text.q[:] *= 8  # a token looks at few others
    text.q[256:272, 0], text.q[272:288, 0] = 4 * text.k[5:21, 0], 4 * text.k[100:116, 0]
    exact = text.run(NativeOps(), "f16", 600)
    difference = abs(text.run(NativeOps(), "k=f16,v=v4", 600) - exact).max(axis=(1, 2))
    assert difference[:256].max() < 5e-3
    assert np.median(difference[256:272]) < 5e-3
    assert np.median(difference[272:288]) > 2e-2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    text = Sequence(Heads(2, 1, 32), 600, 5)
    text.k[100, 0, 3] = bad
    outs = text.run(NativeOps(threads=2), "k4v4", 600)
    assert np.isfinite(outs[:100]).all()
    assert np.isnan(outs[100:]).all()


def test_bytes_are_as_planned() -> None:
    for dtype in CODED_KV_DTYPES:
        for head_dim in (32, 64, 128, 256, 512):
            spec = KVCacheSpec.uniform(3, 2, head_dim, dtype)
            kv = NativeOps().allocate_kv(spec, [16, 8])
            for arrays, size, count in zip(kv.arrays, spec.group_block_bytes, (16, 8), strict=True):
                assert (arrays.block_bytes, arrays.num_bytes) == (size, count * size)
    assert 8 * KVCacheSpec.uniform(1, 1, 64, "k4v4").group_block_bytes[0] / (32 * 2 * 64) == 4.5


def test_what_keeps_no_codes_is_refused() -> None:
    for head_dim in (16, 40, 80, 96, 1024):
        with pytest.raises(InvalidInput, match="k4 takes a head_dim of 32, 64, 128, 256, 512, the model has"):
            KVCacheSpec.uniform(1, 1, head_dim, "k4v4")
        with pytest.raises(ValueError, match="k4 and v4 take a head_dim"):
            _native.KVArrays(1, 8, 1, head_dim, "f16", "v4")
    with pytest.raises(InvalidInput, match="the model has none"):
        KVCacheSpec.uniform(2, 1, 64, "k4v4", layer_windows=(8, 16))
    kv: npt.NDArray[np.float32] = np.zeros((1, 1, 64), np.float32)
    slots, ops = np.zeros(1, np.int32), NativeOps()
    layer = ops.allocate_kv(KVCacheSpec.uniform(1, 1, 64, "k4v4"), 8)[0]
    with pytest.raises(ValueError, match="recent slots where codes are kept"):
        ops.write_kv(layer, kv, kv, slots)
    with pytest.raises(ValueError, match="a layer with a window keeps no codes"):
        ops.attend(
            kv, layer, Batch.in_blocks(slots, slots, slots, slots[None], slots, num_groups=2), AttentionRule(window=3)
        )
    with pytest.raises(ValueError, match="codes need what tokens of the same segment read"):
        ops.attend(
            kv,
            _native.KVArrays(1, 8, 1, 64, "k4", "v4").layer(0),
            Batch.in_blocks(slots, slots, slots, slots[None], slots),
        )


def test_block_tables_of_what_is_recent_are_checked() -> None:
    text = Sequence(Heads(2, 1, 32), 300, 6)
    ops = NativeOps()
    kv = text.allocate(ops, "k4v4")
    table = np.arange(NUM_BLOCKS, dtype=np.int32)
    for place, is_read in ((0, True), (1, False), (7, False), (8, True), (9, True), (10, False)):
        recent = table.copy()
        recent[place] = NUM_BLOCKS
        batch = text.batch((table, recent), 299, 300)
        if is_read:
            with pytest.raises(ValueError, match="is outside the cache"):
                ops.attend(text.q[299:], kv, batch)
        else:
            ops.attend(text.q[299:], kv, batch)
