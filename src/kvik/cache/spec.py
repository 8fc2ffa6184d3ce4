"""The shape of everything attention must remember, and its price in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from kvik.config import KVDType
from kvik.errors import InvalidInput

BLOCK_SIZE = 32
"""Tokens of a block."""

BLOCKS_PER_SUPERBLOCK = 8
"""Blocks whose keys and values lie together, so arrays grow by this many."""

_ITEM_BYTES: dict[KVDType, int] = {"f32": 4, "f16": 2, "int8": 1}
_SCALE_BYTES: dict[KVDType, int] = {"f32": 0, "f16": 0, "int8": 4}  # of each key and each value of a head

MOST_INT8_HEAD_DIM = 512
"""Above it the integer sums of a score could pass 32 bits."""


def vector_bytes(num_items: int, dtype: KVDType) -> int:
    """Bytes of one stored vector, its scale included where it has one."""
    return num_items * _ITEM_BYTES[dtype] + _SCALE_BYTES[dtype]


def whole_superblocks(num_blocks: int) -> int:
    """So many blocks or more: what arrays have that hold them."""
    return -(-num_blocks // BLOCKS_PER_SUPERBLOCK) * BLOCKS_PER_SUPERBLOCK


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """Keys and values of every layer: the one source of every memory figure."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: KVDType
    block_size: int = BLOCK_SIZE

    def __post_init__(self) -> None:
        if self.dtype == "int8" and self.head_dim > MOST_INT8_HEAD_DIM:
            raise InvalidInput(
                f"an int8 cache takes a head_dim up to {MOST_INT8_HEAD_DIM}, the model has {self.head_dim}",
                hint="choose f16 for the keys and values",
            )

    @property
    def token_bytes(self) -> int:
        """Bytes one token occupies across all layers, key and value together."""
        return 2 * self.num_layers * self.num_kv_heads * vector_bytes(self.head_dim, self.dtype)

    @property
    def block_bytes(self) -> int:
        """Bytes one block occupies across all layers, keys and values together."""
        return self.token_bytes * self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def pool_blocks_for(self, num_tokens: int) -> int:
        """Blocks to allocate so that one sequence of `num_tokens` fits: whole superblocks."""
        return whole_superblocks(self.num_blocks_for(num_tokens))

    def num_blocks_within(self, num_bytes: int) -> int:
        """Blocks that fit into so many bytes: whole superblocks."""
        return num_bytes // (self.block_bytes * BLOCKS_PER_SUPERBLOCK) * BLOCKS_PER_SUPERBLOCK
