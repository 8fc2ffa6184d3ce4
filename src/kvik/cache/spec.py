"""The shape of everything attention must remember, and its price in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from kvik.config import KVDType

BLOCK_SIZE = 32
"""Tokens of a block."""

BLOCKS_PER_SUPERBLOCK = 8
"""Blocks whose keys and values lie together, so arrays grow by this many."""

_ITEM_BYTES: dict[KVDType, int] = {"f32": 4, "f16": 2}


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """Keys and values of every layer: the one source of every memory figure."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: KVDType
    block_size: int = BLOCK_SIZE

    @property
    def token_bytes(self) -> int:
        """Bytes one token occupies across all layers, key and value together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * _ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes one block occupies across all layers, keys and values together."""
        return self.token_bytes * self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def pool_blocks_for(self, num_tokens: int) -> int:
        """Blocks to allocate so that one sequence of `num_tokens` fits: whole superblocks."""
        return -(-self.num_blocks_for(num_tokens) // BLOCKS_PER_SUPERBLOCK) * BLOCKS_PER_SUPERBLOCK
