"""How many requests each block was read back for, counted from the server's start, whoever looks."""

from __future__ import annotations

from kvik.engine.engine import Engine
from kvik.engine.events import StepEvent


class BlockHits:
    """The observer: a number for each block that was read back, none for others. A block that is evicted has none."""

    def __init__(self, engine: Engine) -> None:
        self.counts: dict[int, int] = {}
        self.latest: dict[int, int] = {}  # those that the newest step changed
        self._engine = engine
        self._pool = engine.cache.pool
        engine.add_observer(self)

    def __call__(self, event: StepEvent) -> None:
        """Count one step."""
        self.latest = {}
        counts, latest, cache = self.counts, self.latest, self._engine.cache
        if cache.pool is not self._pool:  # the cache was reset, and its blocks are new ones
            self._pool = cache.pool
            latest |= dict.fromkeys(counts, 0)
            counts.clear()
        for block_id in event.blocks.evicted:
            if counts.pop(block_id, 0):
                latest[block_id] = 0
        for sequence in event.begun:
            num_found = 0 if sequence.branch else sequence.costs.num_cached_tokens // cache.spec.block_size
            for block_id in sequence.table.block_ids[:num_found]:
                latest[block_id] = counts[block_id] = counts.get(block_id, 0) + 1
