"""What a model's counters were in the last 15 minutes, from the server's start on: numbers alone, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from kvik.cache import MissReason
from kvik.engine.store_tier import StoreTier
from kvik.server.sse import encode
from kvik.store import StoreStats

if TYPE_CHECKING:
    from kvik.server.served import ServedModel

SAMPLE_S = 1.0
"""Between two samples."""

MAX_SAMPLES = 900
"""Those of 15 minutes."""


def counters_of(served: ServedModel) -> Mapping[str, int | float]:
    """The same figures that `/metrics` and `/v1/cache` tell, now."""
    engine, meter = served.llm.engine, served.meter
    stats, scheduler, pool = engine.cache.stats, engine.scheduler, engine.cache.pool
    return {
        "steps": meter.num_steps,
        "cached_tokens": meter.num_cached_tokens,
        "computed_tokens": meter.num_computed_tokens,
        "generated_tokens": meter.num_generated_tokens,
        "queried_tokens": stats.num_queried_tokens,
        "found_tokens": stats.num_cached_tokens,
        "evicted_blocks": stats.num_evicted_blocks,
        "copied_blocks": stats.num_copied_blocks,
        "preemptions": scheduler.num_preemptions,
        "aborted": meter.num_aborted,
        "running": len(scheduler.running),
        "waiting": len(scheduler.waiting),
        "held_blocks": pool.num_held,
        "reusable_blocks": pool.num_reusable,
        "free_blocks": pool.num_free,
        "pinned_blocks": engine.cache.num_pinned,
        "committed_bytes": engine.cache.committed_bytes,
        **_store_counters(engine.tier),
        **{f"miss_{reason.name.lower()}": meter.misses[reason.name.lower()] for reason in MissReason},
        **{f"{part}_s": round(seconds, 6) for part, seconds in meter.step_s.items()},
    }


def _store_counters(tier: StoreTier | None) -> dict[str, int]:
    """Of stored blocks: all 0 where nothing is stored, those on disk also before they were counted."""
    stats = StoreStats() if tier is None else tier.store.stats
    return {
        "stored_tokens": 0 if tier is None else tier.stats.num_stored_tokens,
        "store_read_bytes": stats.read_bytes,
        "store_written_bytes": stats.written_bytes,
        "disk_blocks": stats.num_kept or 0,
        "disk_bytes": stats.kept_bytes or 0,
    }


class History:
    """The newest samples, each as the JSON that it is told in: a newcomer costs no more than joining them."""

    def __init__(self) -> None:
        self._rows: deque[bytes] = deque(maxlen=MAX_SAMPLES)

    def add(self, at_s: float, counters: Mapping[str, int | float]) -> None:
        """A sample; the oldest goes for it where there are as many as are kept."""
        self._rows.append(encode([round(at_s, 3), *counters.values()]))

    def told(self) -> msgspec.Raw:
        """All of them, a row each."""
        return msgspec.Raw(b"[" + b",".join(self._rows) + b"]")
