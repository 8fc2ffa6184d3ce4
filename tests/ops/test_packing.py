"""Weights enter the packed container without loss: what comes out is what the gguf library reads, exactly."""

from __future__ import annotations

import itertools
from hashlib import sha256

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from gguf_files import FLOAT16_OFFSETS, FLOAT_TYPES, WEIGHT_TYPES, random_blocks
from kvik import _native
from kvik.ops.reference import ReferenceOps
from looped import looped
from ops import one_op

ROWS = (1, 8, 15, 16, 17, 33)
PACKED_BYTES = {"Q4_K": 144 + 4, "Q5_K": 176 + 4, "IQ4_XS": 136 + 2}
"""Of a block of one row, where it is larger than in the file: 6-bit scales are kept as bytes."""

pytestmark = pytest.mark.sanitize

# Each format is unpacked by code of its own.
every_type = looped("kind", WEIGHT_TYPES, lambda kind: kind.name)
quantized_types = looped("kind", FLOAT16_OFFSETS, lambda kind: kind.name)


def unpacked(
    kind: GGMLQuantizationType, blocks: npt.NDArray[np.uint8], columns: int, *, threads: int = 1
) -> npt.NDArray[np.float32]:
    weight = _native.pack(
        kind.name, blocks.reshape(-1), len(blocks), columns, _native.WeightArena(), _native.ThreadPool(threads)
    )
    out = np.full((len(blocks), columns), np.nan, np.float32)
    one_op.embed_rows(weight, np.arange(len(blocks), dtype=np.int32), 1.0, out)
    return out


def expected(kind: GGMLQuantizationType, blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    with np.errstate(invalid="ignore", over="ignore"):
        values: npt.NDArray[np.float32] = dequantize(blocks, kind)
    if kind is GGMLQuantizationType.MXFP4:  # a subnormal scale counts as zero, as all subnormal numbers do
        tiny = blocks.reshape(-1, 17)[:, 0] < 2
        values.reshape(-1, 32)[tiny] = 0
    return values


@every_type
@pytest.mark.parametrize("rows", ROWS)
def test_every_row_comes_out_as_the_gguf_library_reads_it(kind: GGMLQuantizationType, rows: int) -> None:
    columns = 512
    blocks = random_blocks(kind, rows, columns, np.random.default_rng(rows))
    np.testing.assert_array_equal(unpacked(kind, blocks, columns), expected(kind, blocks))


@every_type
def test_the_narrowest_matrix(kind: GGMLQuantizationType) -> None:
    columns = GGML_QUANT_SIZES[kind][0]
    blocks = random_blocks(kind, 9, columns, np.random.default_rng(1))
    np.testing.assert_array_equal(unpacked(kind, blocks, columns), expected(kind, blocks))


@pytest.mark.tiny
@every_type
def test_rows_come_in_the_order_asked_for_and_as_often(kind: GGMLQuantizationType) -> None:
    columns = 256
    blocks = random_blocks(kind, 33, columns, np.random.default_rng(2))
    weight = _native.pack(kind.name, blocks.reshape(-1), 33, columns, _native.WeightArena(), _native.ThreadPool(1))
    row_ids = np.asarray([32, 0, 8, 8, 31, 7, 32], np.int32)
    out = np.empty((len(row_ids), columns), np.float32)
    one_op.embed_rows(weight, row_ids, 1.0, out)
    np.testing.assert_array_equal(out, expected(kind, blocks)[row_ids])


@every_type
@pytest.mark.parametrize("threads", [2, 3])
def test_packing_with_several_threads_gives_the_same_values(kind: GGMLQuantizationType, threads: int) -> None:
    blocks = random_blocks(kind, 70, 256, np.random.default_rng(3))
    np.testing.assert_array_equal(unpacked(kind, blocks, 256, threads=threads), expected(kind, blocks))


@quantized_types
@looped("byte", [0x00, 0x01, 0x7F, 0x80, 0xFF], hex)
def test_blocks_of_one_byte_all_over(kind: GGMLQuantizationType, byte: int) -> None:
    """Every code at its end: -128 in Q8_0, the largest nibble, the most negative 6-bit scale."""
    columns = 256
    _, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = np.full((9 * columns // GGML_QUANT_SIZES[kind][0], block_bytes), byte, np.uint8)
    for offset in FLOAT16_OFFSETS[kind]:
        blocks[:, offset : offset + 2] = np.asarray([1.5], np.float16).view(np.uint8)
    blocks = blocks.reshape(9, -1)
    np.testing.assert_array_equal(unpacked(kind, blocks, columns), expected(kind, blocks))


@quantized_types
@looped("scale", [65504.0, -65504.0, 2.0**-24, -(2.0**-24), 6.1e-5, 0.0, -0.0])
def test_scales_at_the_ends_of_float16(kind: GGMLQuantizationType, scale: float) -> None:
    """The largest number, the smallest, and a subnormal one."""
    columns = 256
    blocks = random_blocks(kind, 9, columns, np.random.default_rng(4)).reshape(-1, GGML_QUANT_SIZES[kind][1])
    for offset in FLOAT16_OFFSETS[kind]:
        blocks[:, offset : offset + 2] = np.asarray([scale], np.float16).view(np.uint8)
    blocks = blocks.reshape(9, -1)
    np.testing.assert_array_equal(unpacked(kind, blocks, columns), expected(kind, blocks))


@quantized_types
def test_random_bytes_infinite_scales_among_them(kind: GGMLQuantizationType) -> None:
    """A damaged file may hold any bits. An infinite scale need not give the same NaNs, but never a finite number."""
    columns = 512
    shape = (33, columns // GGML_QUANT_SIZES[kind][0] * GGML_QUANT_SIZES[kind][1])
    blocks = np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)
    blocks[0] = 0xFF
    values, wanted = unpacked(kind, blocks, columns), expected(kind, blocks)
    finite = np.isfinite(wanted)
    assert not finite.all()
    np.testing.assert_array_equal(np.isfinite(values), finite)
    np.testing.assert_array_equal(values[finite], wanted[finite])


@looped("kind", FLOAT_TYPES, lambda kind: kind.name)
def test_floats_of_any_bits(kind: GGMLQuantizationType) -> None:
    """Infinities, NaNs, subnormals and both zeros pass through a float format."""
    columns = 64
    blocks = np.random.default_rng(6).integers(0, 256, (9, columns * GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    blocks[0] = 0xFF
    blocks[1] = 0
    np.testing.assert_array_equal(unpacked(kind, blocks, columns), expected(kind, blocks))


@every_type
@pytest.mark.parametrize("rows", ROWS)
def test_bytes_are_those_of_the_format_for_whole_row_blocks(kind: GGMLQuantizationType, rows: int) -> None:
    columns = 256
    blocks = random_blocks(kind, rows, columns, np.random.default_rng(7))
    weight = _native.pack(kind.name, blocks.reshape(-1), rows, columns, _native.WeightArena(), _native.ThreadPool(1))
    assert (weight.rows, weight.columns) == (rows, columns)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    packed_bytes = PACKED_BYTES.get(kind.name, block_bytes)
    assert weight.num_bytes == -(-rows // 16) * 16 * columns // block * packed_bytes
    assert packed_bytes <= 1.03 * block_bytes


@looped("kind", [kind for kind in GGMLQuantizationType if kind not in WEIGHT_TYPES], lambda kind: kind.name)
def test_a_type_without_a_packed_format_is_refused(kind: GGMLQuantizationType) -> None:
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    with pytest.raises(ValueError, match=kind.name):
        _native.pack(
            kind.name, np.zeros(block_bytes, np.uint8), 1, block_size, _native.WeightArena(), _native.ThreadPool(1)
        )


@every_type
@pytest.mark.parametrize("cuts", [(37,), (16, 37), (16, 32, 37), (0, 16, 16, 37, 37)])
def test_rows_may_come_in_pieces(kind: GGMLQuantizationType, cuts: tuple[int, ...]) -> None:
    columns = 256
    blocks = random_blocks(kind, 37, columns, np.random.default_rng(12))
    packer, pool = _native.WeightPacker(kind.name, 37, columns, _native.WeightArena()), _native.ThreadPool(2)
    for start, stop in itertools.pairwise((0, *cuts)):
        piece = blocks[start:stop].reshape(-1).copy()
        packer.add(piece, pool)
        piece[:] = 0xFF
    out = np.full((37, columns), np.nan, np.float32)
    one_op.embed_rows(packer.finish(), np.arange(37, dtype=np.int32), 1.0, out)
    np.testing.assert_array_equal(out, expected(kind, blocks))


def test_a_matrix_without_all_of_its_rows_is_not_given_out() -> None:
    packer = _native.WeightPacker("F32", 17, 32, _native.WeightArena())
    with pytest.raises(ValueError, match="rows are missing"):
        packer.finish()
    packer.add(np.zeros(16 * 32 * 4, np.uint8), _native.ThreadPool(1))
    with pytest.raises(ValueError, match="rows are missing"):
        packer.finish()
    with pytest.raises(ValueError, match="0 of 9 rows came"):
        ReferenceOps().load_rows("F32", (), 9, 32)


def test_matrices_outlive_their_arena_and_each_other() -> None:
    """Laid out one after the other, each stays what it was when the others and the arena are gone."""
    rng = np.random.default_rng(31)
    arena, pool = _native.WeightArena(), _native.ThreadPool(1)
    blocks = [random_blocks(GGMLQuantizationType.Q8_0, 9, 64, rng) for _ in range(5)]
    weights = [_native.pack("Q8_0", block.reshape(-1), 9, 64, arena, pool) for block in blocks]
    del arena
    kept, wanted = weights[2], dequantize(blocks[2], GGMLQuantizationType.Q8_0)
    weights.clear()
    out = np.empty((9, 64), np.float32)
    one_op.embed_rows(kept, np.arange(9, dtype=np.int32), 1.0, out)
    np.testing.assert_array_equal(out, wanted.reshape(9, 64))


LAYOUT = "bb87b029237f4177886346716e926438d9abf021eb4fff3c5154fed2805fd0b4"
"""Of all types' packed bytes, in version 1 of the layout."""


def test_packed_bytes_are_those_of_their_version() -> None:
    """Where this fails, raise kPackedVersion (native/packed_file.h): files of packed weights outlive the process."""
    digest = sha256()
    for kind in WEIGHT_TYPES:
        block_columns, block_bytes = GGML_QUANT_SIZES[kind]
        source = np.random.default_rng(5).integers(0, 256, 17 * 512 // block_columns * block_bytes, np.uint8)
        weight = _native.pack(kind.name, source, 17, 512, _native.WeightArena(), _native.ThreadPool(2))
        assert weight.num_bytes == len(weight.data) == _native.packed_bytes(kind.name, 17, 512)
        digest.update(weight.data.data)
    assert (_native.PACKED_VERSION, digest.hexdigest()) == (1, LAYOUT)


def test_checksums_are_of_regions_and_know_their_bytes() -> None:
    pool, arena = _native.ThreadPool(2), _native.WeightArena()
    rows = 3 * _native.PACKED_REGION_BYTES // 2 // 64 // 16 * 16
    values = np.random.default_rng(3).integers(0, 256, rows * 64, np.uint8)
    sums = _native.pack("F32", values, rows, 16, arena, pool).checksums(pool)
    assert len(set(sums)) == len(sums) == 2
    assert sums == _native.pack("F32", values, rows, 16, arena, _native.ThreadPool(1)).checksums(pool)
    for bit in (0, 7, 64 * 8, values.size * 8 - 1):
        changed = values.copy()
        changed[bit // 8] ^= 1 << bit % 8
        others = _native.pack("F32", changed, rows, 16, arena, pool).checksums(pool)
        assert sum(a != b for a, b in zip(sums, others, strict=True)) == 1
