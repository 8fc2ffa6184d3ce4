"""Bytes of the KV cache: by formula, for models that people know, and as the arrays are allocated."""

from __future__ import annotations

from typing import get_args

import pytest

from kvik import _native
from kvik.cache import BLOCK_SIZE, KVCacheSpec, PoolSize
from kvik.config import KVDType
from kvik.errors import InvalidInput

pytestmark = pytest.mark.tiny

SMOLLM2 = KVCacheSpec.uniform(num_layers=30, num_kv_heads=3, head_dim=64, dtype="f16")
LLAMA_3_8B = KVCacheSpec.uniform(num_layers=32, num_kv_heads=8, head_dim=128, dtype="f16")


def test_bytes_of_known_models() -> None:
    assert SMOLLM2.token_bytes == 23_040
    assert SMOLLM2.block_bytes == 737_280
    assert LLAMA_3_8B.token_bytes == 128 * 1024
    assert LLAMA_3_8B.block_bytes == 4 * 1024**2


def test_float32_takes_twice_the_bytes_of_float16() -> None:
    wide = SMOLLM2.with_dtype("f32")
    assert wide.token_bytes == 2 * SMOLLM2.token_bytes
    assert wide.block_bytes == 2 * SMOLLM2.block_bytes


def test_int8_counts_its_scales() -> None:
    small = SMOLLM2.with_dtype("int8")
    assert small.token_bytes == 30 * 3 * 2 * (64 + 4)
    assert small.block_bytes == 32 * small.token_bytes


def test_int8_refuses_heads_whose_integer_scores_could_overflow() -> None:
    assert KVCacheSpec.uniform(1, 1, 512, "int8").token_bytes == 2 * 516
    with pytest.raises(InvalidInput, match="a head_dim up to 512, the model has 520"):
        KVCacheSpec.uniform(1, 1, 520, "int8")


@pytest.mark.parametrize(
    ("num_tokens", "blocks", "pool_blocks"),
    [(0, 0, 0), (1, 1, 8), (31, 1, 8), (32, 1, 8), (33, 2, 8), (256, 8, 8), (257, 9, 16), (8192, 256, 256)],
)
def test_blocks_for_a_number_of_tokens(num_tokens: int, blocks: int, pool_blocks: int) -> None:
    assert SMOLLM2.num_blocks_for(num_tokens) == blocks
    assert SMOLLM2.pool_blocks_for(num_tokens) == pool_blocks


@pytest.mark.parametrize(
    ("superblocks", "spare_bytes", "blocks"), [(0, 0, 0), (1, -1, 0), (1, 0, 8), (1, 1, 8), (2, -1, 8), (1000, 5, 8000)]
)
def test_blocks_within_a_number_of_bytes(superblocks: int, spare_bytes: int, blocks: int) -> None:
    num_bytes = superblocks * 8 * SMOLLM2.block_bytes + spare_bytes
    size = SMOLLM2.pool_size_within(num_bytes, context=2048, step_tokens=512, max_running=64)
    assert size == PoolSize(blocks, (blocks,))
    assert SMOLLM2.pool_bytes(size) <= num_bytes


def test_the_block_size_is_the_kernels_own() -> None:
    assert SMOLLM2.block_size == BLOCK_SIZE == _native.BLOCK_SIZE
    assert SMOLLM2.pool_blocks_for(1) * BLOCK_SIZE == _native.SEGMENT


@pytest.mark.parametrize("dtype", get_args(KVDType))
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 40), (30, 3, 64), (4, 8, 128)])
@pytest.mark.parametrize("num_tokens", [1, 256, 300, 2048])
def test_the_figure_is_what_the_engine_allocates(num_tokens: int, shape: tuple[int, int, int], dtype: KVDType) -> None:
    spec = KVCacheSpec.uniform(*shape, dtype)
    num_blocks = spec.pool_blocks_for(num_tokens)
    num_layers, num_kv_heads, head_dim = shape
    arrays = _native.KVArrays(num_layers, num_blocks, num_kv_heads, head_dim, dtype, dtype)
    assert arrays.num_bytes == num_blocks * spec.block_bytes
