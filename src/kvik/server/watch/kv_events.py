"""KV events: which blocks this server holds, as routers index them; docs/scaling.md has the contract.

Source of the encoding: vLLM's `distributed/kv_events.py` (maps, hashes of 64 bits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from kvik.cache import Digest
from kvik.engine.engine import Engine
from kvik.engine.events import StepEvent
from kvik.server.watch.event_socket import EventSocket

MEDIUM = "CPU"

Event = dict[str, Any]
Publish = Callable[[list[Event]], bool]


class KVEvents:
    """An observer: tells what was stored and removed, of blocks that every request may share.

    Blocks of salted requests are never told. `publish` says whether it took the events; when it did not, and when the
    cache was reset, everything is told anew.
    """

    def __init__(self, engine: Engine, publish: Publish) -> None:
        self.num_events = 0
        self.num_dropped = 0  # batches that were not taken
        self._engine = engine
        self._publish = publish
        self._told: set[Digest] = set()
        self._pool = engine.cache.pool
        self._is_behind = True  # nobody knows yet what a server that ran here before has told
        engine.add_observer(self)

    def __call__(self, event: StepEvent) -> None:
        """Tell of one step."""
        cache = self._engine.cache
        if self._is_behind or cache.pool is not self._pool:
            self._pool = cache.pool
            self._told.clear()
            block_ids = [block_id for _, edge in cache.tree.edges() for block_id in edge.block_ids]
            events = [{"type": "AllBlocksCleared"}, *self._stored(block_ids)]
        else:
            gone = [each for each in event.blocks.evicted_digests if each is not None and each in self._told]
            self._told.difference_update(gone)
            events = [_removed(gone)] if gone else []
            events += self._stored(event.blocks.sealed)
        if not events:
            return
        self._is_behind = not self._publish(events)
        if self._is_behind:
            self.num_dropped += 1
        else:
            self.num_events += len(events)

    def _stored(self, block_ids: Iterable[int]) -> list[Event]:
        """One event for each run of blocks that follow each other; none for those that are gone already."""
        tree, block_size = self._engine.cache.tree, self._engine.cache.spec.block_size
        events: list[Event] = []
        last: Digest | None = None
        for block_id in block_ids:
            digest, found = tree.digest_of(block_id), tree.tokens_of(block_id)
            if digest is None or found is None or found[0].salt is not None or digest in self._told:
                continue
            _, previous = tree.place_of(block_id)
            parent = None if previous is None else tree.digest_of(previous)
            tokens = np.frombuffer(found[2], np.int32)
            if parent is None or parent != last:
                events.append(_stored_from(parent, block_size))
            events[-1]["block_hashes"].append(hash_of(digest))
            events[-1]["token_ids"] += tokens.tolist()
            self._told.add(digest)
            last = digest
        return events


class KVEventFeed:
    """What routers hear of one server: the socket, from its start, and the observer, once the model is loaded."""

    def __init__(self, events: EventSocket) -> None:
        self.socket = events
        self._told: KVEvents | None = None

    @property
    def num_events(self) -> int:
        """That were handed to the socket."""
        return 0 if self._told is None else self._told.num_events

    @property
    def num_dropped(self) -> int:
        """Batches that the socket did not take, after each of which everything was told anew."""
        return 0 if self._told is None else self._told.num_dropped

    def watch(self, engine: Engine) -> None:
        """Tell of this engine from now on."""
        self._told = KVEvents(engine, self.socket.put)

    def close(self) -> None:
        """Send what is queued, and end."""
        self.socket.close()


def hash_of(digest: Digest) -> int:
    """The 64 bits of a block's name by which it is told: consumers decode no others."""
    return int.from_bytes(digest[:8], "big")


def _stored_from(parent: Digest | None, block_size: int) -> Event:
    return {
        "type": "BlockStored",
        "block_hashes": [],
        "parent_block_hash": None if parent is None else hash_of(parent),
        "token_ids": [],
        "block_size": block_size,
        "lora_id": None,
        "medium": MEDIUM,
        "lora_name": None,
        "extra_keys": None,
    }


def _removed(digests: Iterable[Digest]) -> Event:
    return {"type": "BlockRemoved", "block_hashes": [hash_of(each) for each in digests], "medium": MEDIUM}
