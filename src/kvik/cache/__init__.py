"""Who owns which block, and how large a block is. No arrays here."""

from kvik.cache.block_pool import BlockPool
from kvik.cache.spec import BLOCK_SIZE, KVCacheSpec

__all__ = ["BLOCK_SIZE", "BlockPool", "KVCacheSpec"]
