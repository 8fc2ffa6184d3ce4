"""Who owns which block, how large a block is, and which blocks hold what others need. No arrays here."""

from kvik.cache.block_pool import BlockPool
from kvik.cache.manager import CacheManager
from kvik.cache.radix import Match, MissReason, Namespace, RadixTree
from kvik.cache.spec import BLOCK_SIZE, BLOCKS_PER_SUPERBLOCK, GroupSpec, KVCacheSpec, PoolSize, VectorFormat
from kvik.cache.tables import BlockCopy, BlockEvents, BlockTable, CacheStats, HeldMatch, Hold, TwinTable, packed
from kvik.cache.twins import TwinGroup, Twins

__all__ = [
    "BLOCKS_PER_SUPERBLOCK",
    "BLOCK_SIZE",
    "BlockCopy",
    "BlockEvents",
    "BlockPool",
    "BlockTable",
    "CacheManager",
    "CacheStats",
    "GroupSpec",
    "HeldMatch",
    "Hold",
    "KVCacheSpec",
    "Match",
    "MissReason",
    "Namespace",
    "PoolSize",
    "RadixTree",
    "TwinGroup",
    "TwinTable",
    "Twins",
    "VectorFormat",
    "packed",
]
