"""How many blocks a cache gets: of a size that was asked for, or of one that suits the machine."""

from __future__ import annotations

from kvik.cache.spec import BLOCKS_PER_SUPERBLOCK, KVCacheSpec, PoolSize
from kvik.errors import InvalidInput, NotEnoughMemory
from kvik.machine import available_memory_bytes
from kvik.units import amount

AUTO_CONTEXTS = 16
"""Whole contexts that a cache of automatic size holds, memory permitting."""


def choose_pool_size(
    spec: KVCacheSpec, context: int, kv_memory: int | str, *, token_budget: int, max_running: int
) -> PoolSize:
    """The size of a cache of `kv_memory` bytes, or of "auto": some whole contexts, in half of the memory that is free.

    Raises `NotEnoughMemory` where one context does not fit ("auto") or the machine has less than was asked for.
    """
    load = {"context": context, "step_tokens": token_budget, "max_running": max_running}
    available = available_memory_bytes()
    one_context = spec.pool_blocks_for(context)
    min_bytes = spec.pool_bytes(spec.pool_size(BLOCKS_PER_SUPERBLOCK, **load))
    min_mib = -(-min_bytes // 2**20)
    if isinstance(kv_memory, int):
        size = spec.pool_size_within(kv_memory, **load)
        if size.num_blocks == 0:
            raise InvalidInput(
                f"kv_memory is {kv_memory:,} bytes, less than the least of {min_bytes:,}",
                hint=f"set it to {min_mib:,} MiB or more",
            )
    else:
        max_blocks = spec.pool_size_within(available // 2, **load).num_blocks
        size = spec.pool_size(max(one_context, min(AUTO_CONTEXTS * one_context, max_blocks)), **load)
    num_bytes = spec.pool_bytes(size)
    if num_bytes > available:
        fits = max(available * 3 // 4, min_bytes)
        fits_mib = max(fits // 2**20, min_mib)
        advice = []
        if kv_memory == "auto" and fits <= available:
            context = spec.pool_size_within(fits, **load).num_blocks * spec.block_size
            advice.append(f"the context to {context} or less (`--context`)")
        if fits_mib * 2**20 <= available:
            advice.append(f"kv_memory to {fits_mib:,} MiB or less")
        raise NotEnoughMemory(
            f"a cache of {size.num_blocks:,} blocks takes {amount(num_bytes)},"
            f" the machine has {amount(available)} available",
            hint=f"set {', or '.join(advice)}" if advice else f"free some: the least cache takes {min_mib:,} MiB",
        )
    return size
