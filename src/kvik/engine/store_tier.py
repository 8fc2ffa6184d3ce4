"""Stored blocks as a second tier of the prefix cache: read where a match ends in them, written behind the engine."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Protocol
from weakref import finalize

from kvik.cache import BlockTable, CacheManager, Digest, HeldMatch, Match, packed
from kvik.cache.digest import chain
from kvik.config import StorePolicy
from kvik.engine.sequence import Sequence
from kvik.store import Fault, Store, StoredBlock
from kvik.store.background import BlockReader, BlockWriter, Load

log = logging.getLogger(__name__)

STEP_SHARE = 0.02
"""Of a step's time, what copying blocks and writing them may take: where threads compute on all processors, the
writer's time on one of them is time that all of them lose."""

MAX_SAVED_S = 0.02
"""Unused time for copies that is kept for later steps."""

PUBLISH_S = 0.003
"""What a step gives to blocks that were read, where sequences run."""

KEPT_WEIGHT = 0.8
"""Of what was known before, in a moving average."""

PROBE_EVERY = 16
"""Loads declined as slower than computing, after which one is made to see whether that is still so."""

RETRY_S = 5.0
"""After a block could not be stored, before others are copied for it."""

LOAD_SHARE = 0.5
"""Of the time that computing blocks would take, after which a store that is slow is not waited for any longer."""

MAX_KNOWN = 1 << 16
"""Blocks that are known to be stored, so that they are not copied again."""


class BlockBytes(Protocol):
    """The part of a runner that the tier needs."""

    def read_blocks(self, block_ids: SequenceOf[int], group: int) -> bytes:
        """The bytes of blocks of one group of layers."""

    def write_blocks(self, block_ids: SequenceOf[int], data: bytes | memoryview, group: int) -> None:
        """Put such bytes into blocks."""


@dataclass(slots=True, eq=False)
class Loading:
    """A path of stored blocks on its way into the cache, for a sequence that waits for it."""

    load: Load
    table: BlockTable  # what the match had, and behind it what has come
    digests: list[Digest]
    num_published: int
    started_s: float
    work_s: float = 0.0  # of the engine's thread


@dataclass(slots=True)
class TierStats:
    """What the tier did since the engine began."""

    num_loads: int = 0
    num_declined: int = 0  # loads that would have been slower than computing
    num_stored_tokens: int = 0  # that need not be computed, for they were read
    num_dropped_blocks: int = 0  # evicted before they were copied to be written


class StoreTier:
    """Between a cache and a store; every call but those of `wait` and `flush` needs the engine's lock.

    A load is what a sequence that computes would be: a table that claims blocks, so that others wait for it too, gets
    room, has its blocks filled, seals them. Where it fails, for whatever reason, the sequence computes.
    """

    def __init__(
        self,
        store: Store,
        cache: CacheManager,
        runner: BlockBytes,
        policy: StorePolicy,
    ) -> None:
        self.store = store
        self.stats = TierStats()
        self.newly_stored: deque[int] | None = None  # blocks that were written, where somebody wants to know
        self._cache = cache
        self._runner = runner
        self._policy = policy
        self._token_bytes = 4 * cache.spec.block_size
        self._block_bytes = payload_bytes(cache, runner)
        self._loads: dict[Sequence, Loading] = {}
        self._pending: dict[Digest, int] = {}  # blocks to be copied and written, the first first
        self._known: dict[Digest, None] = {}  # stored, as far as is known; the oldest first
        self._reader = BlockReader(store)
        self._writer = BlockWriter(store)
        finalize(self, _abandon, store, self._reader, self._writer).atexit = False
        self._saved_s = 0.0  # time for copies that steps have left
        self._work_s = 0.0  # of the writer, as far as it is accounted for
        self._was_idle = True  # since the last step
        self._retry_s = 0.0
        self._load_byte_s: float | None = None  # moving averages
        self._compute_token_s: float | None = None

    # Reading.

    @property
    def tables(self) -> Iterable[BlockTable]:
        """Of what is being loaded."""
        return (loading.table for loading in self._loads.values())

    @property
    def is_loading(self) -> bool:
        """Whether some sequence waits for stored blocks."""
        return bool(self._loads)

    def wait(self, seconds: float) -> None:
        """Until something was read; called without the lock."""
        progress: threading.Condition = self._reader.progress
        loads = [loading.load for loading in list(self._loads.values())]
        with progress:
            if loads and not any(load.is_ready for load in loads):
                progress.wait(seconds)

    def must_wait(self, sequence: Sequence, match: Match) -> bool:
        """Whether a waiting sequence with this match waits for stored blocks: a load is begun where that pays."""
        if sequence in self._loads:
            return True
        first = match.next_digest
        if first is None or first == sequence.looked_for or isinstance(match, HeldMatch) or not sequence.request.share:
            return False
        sequence.looked_for = first
        if not self.store.exists(first) or not self._is_worth_loading():
            return False
        rest = packed(sequence.token_ids[match.num_tokens + self._cache.spec.block_size : -1])
        table = self._cache.new_table(sequence.request.salt)
        self._cache.adopt(table, sequence.token_ids, replace(match, tail=None))
        digests = [first, *chain(first, rest, self._token_bytes)]
        token_s = self._compute_token_s
        max_s = None if token_s is None else LOAD_SHARE * token_s * len(digests) * self._cache.spec.block_size
        self._loads[sequence] = Loading(self._reader.load(digests, max_s), table, digests, 0, time.perf_counter())
        self.stats.num_loads += 1
        return True

    def publish(self, max_s: float) -> None:
        """Put what was read into the cache, and let those go on whose load is over."""
        end_s = time.perf_counter() + max_s
        for sequence, loading in list(self._loads.items()):
            started_s = time.perf_counter()
            while started_s < end_s and (block := loading.load.take()) is not None:
                is_published = self._publish(sequence, loading, block)
                now_s = time.perf_counter()
                loading.work_s += now_s - started_s
                started_s = now_s
                if not is_published:
                    self._end(sequence, loading)
                    break
            else:
                if loading.load.is_over:
                    self._end(sequence, loading)

    def give_up(self) -> bool:
        """Let the newest load go, with the blocks that it holds; False where there is none."""
        if not self._loads:
            return False
        self._end(*next(reversed(self._loads.items())))
        return True

    def leave(self, sequence: Sequence) -> None:
        """A sequence ends: its load too; and what it has sealed may be worth keeping."""
        loading = self._loads.get(sequence)
        if loading is not None:
            self._end(sequence, loading)
        if self._policy == "end" and sequence.request.use_cache and sequence.request.share:
            self.keep(sequence.table)

    def _publish(self, sequence: Sequence, loading: Loading, block: StoredBlock) -> bool:
        """Whether the block is in the cache now."""
        cache, table = self._cache, loading.table
        size = cache.spec.block_size
        num_tokens = len(table.block_ids) * size
        tokens = packed(sequence.token_ids[num_tokens : num_tokens + size])
        name = loading.digests[loading.num_published]
        if block.digest != name or block.tokens != tokens or len(block.payload) != sum(self._block_bytes.values()):
            loading.load.fault = Fault.FIELDS
            return False
        if cache.reserve(table, num_tokens + size, num_tokens) is None:
            return False
        payload, at = memoryview(block.payload), 0
        for group, block_id in cache.last_places(table):
            num_bytes = self._block_bytes[group]
            self._runner.write_blocks([block_id], payload[at : at + num_bytes], group)
            at += num_bytes
        cache.seal(table, sequence.token_ids, num_tokens + size)
        cache.slide(table, num_tokens + size)
        loading.num_published += 1
        self._known[block.digest] = None
        return True

    def _end(self, sequence: Sequence, loading: Loading) -> None:
        del self._loads[sequence]
        loading.load.cancel()
        self._cache.release(loading.table)
        count, load = loading.num_published, loading.load
        num_tokens = count * self._cache.spec.block_size
        self.stats.num_stored_tokens += num_tokens
        if load.num_bytes:
            self._load_byte_s = _averaged(self._load_byte_s, (load.read_s + loading.work_s) / load.num_bytes)
        self._writer.used(loading.digests[:count])
        costs = sequence.costs
        costs.num_stored_tokens += num_tokens
        costs.load_s += time.perf_counter() - loading.started_s
        if num_tokens and self._compute_token_s is not None:
            costs.saved_s = (costs.saved_s or 0.0) + num_tokens * self._compute_token_s
        if load.fault not in (None, Fault.MISSING):
            costs.stored_fault = load.fault

    def _is_worth_loading(self) -> bool:
        """Whether reading a block takes less time than computing it, as far as both are known."""
        if self._load_byte_s is None or self._compute_token_s is None:
            return True
        load_s = self._load_byte_s * sum(self._block_bytes.values())
        if load_s < self._compute_token_s * self._cache.spec.block_size:
            return True
        self.stats.num_declined += 1
        return self.stats.num_declined % PROBE_EVERY == 0

    # Writing.

    @property
    def has_pending(self) -> bool:
        """Whether blocks wait to be copied."""
        return bool(self._pending)

    def note_prefill(self, token_s: float) -> None:
        """A prompt token took so long."""
        self._compute_token_s = _averaged(self._compute_token_s, token_s)

    def note_match(self, match: Match) -> None:
        """A sequence begins with these blocks: it is their second use at least."""
        if self._policy == "reuse":
            self._keep_all(match.block_ids)

    def note_sealed(self, table: BlockTable, num_before: int) -> None:
        """A table has sealed more blocks. Where layers have windows, what they need of those will soon be gone."""
        if self._policy == "end" and self._cache.twins.groups:
            self._keep_all(table.block_ids[num_before : table.num_sealed])

    def keep(self, table: BlockTable) -> list[Digest]:
        """Have all that a table has sealed written, and noted as wanted; gives their names."""
        digests = self._keep_all(table.block_ids[: table.num_sealed])
        if digests:
            self._writer.used(digests)
        return digests

    def after_step(self, step_s: float, save_when_idle: Callable[[], bool] | None) -> None:
        """Copy as much as does not slow steps down; where no step follows, have the writer's thread ask for the rest.

        It holds `save_when_idle`, and with it the engine, until that is done.
        """
        work_s, self._work_s = self._writer.work_s - self._work_s, self._writer.work_s
        spent_s = 0.0 if self._was_idle else work_s
        self._was_idle = save_when_idle is not None
        self._saved_s = min(MAX_SAVED_S, self._saved_s + STEP_SHARE * step_s - spent_s)
        if not self._pending:
            return
        if save_when_idle is None:
            self._saved_s -= self.save(self._saved_s)
        else:
            self._writer.when_idle(save_when_idle)

    def save(self, max_s: float) -> float:
        """Copy blocks to be written for so long at most; the seconds that it took."""
        started_s = now_s = time.perf_counter()
        while self._pending and now_s - started_s < max_s and self._writer.has_room:
            digest = next(iter(self._pending))
            self._save(digest, self._pending.pop(digest))
            now_s = time.perf_counter()
        return now_s - started_s

    def flush(self, seconds: float) -> bool:
        """Wait until all that was copied is written; called without the lock."""
        return self._writer.flush(seconds)

    def is_stored(self, digest: Digest) -> bool:
        """Whether a block is known to be stored."""
        return digest in self._known

    def reset(self) -> None:
        """The cache has forgotten everything."""
        for loading in self._loads.values():
            loading.load.cancel()
        self._loads.clear()
        self._pending.clear()

    def close(self) -> None:
        """End the threads and the store; what is not written yet never will be."""
        for sequence, loading in list(self._loads.items()):
            self._end(sequence, loading)
        self._reader.close()
        self._writer.close()
        self.store.close()

    def _keep_all(self, block_ids: Iterable[int]) -> list[Digest]:
        while len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        digests = []
        for block_id in block_ids:
            digest = self._cache.tree.digest_of(block_id)
            if digest is not None:
                digests.append(digest)
                if digest not in self._known:
                    self._pending[digest] = block_id
        return digests

    def _save(self, digest: Digest, block_id: int) -> None:
        cache = self._cache
        # It may have been evicted meanwhile, and its memory used for something else.
        places = cache.places_of(block_id) if cache.tree.digest_of(block_id) == digest else None
        if places is None or time.monotonic() < self._retry_s:
            self.stats.num_dropped_blocks += 1
            return
        found = cache.tree.tokens_of(block_id)
        assert found is not None
        namespace, first_position, tokens = found
        _, previous = cache.tree.place_of(block_id)
        parent = cache.tree.root_of(namespace) if previous is None else cache.tree.digest_of(previous)
        assert parent is not None
        parts = [self._runner.read_blocks([each], group) for group, each in places]
        payload = parts[0] if len(parts) == 1 else b"".join(parts)

        def done(is_stored: bool) -> None:
            if is_stored:
                self._known[digest] = None
                if (asked := self.newly_stored) is not None:
                    asked.append(block_id)
            else:
                self._retry_s = time.monotonic() + RETRY_S

        self._writer.put(StoredBlock(digest, parent, first_position, tokens, payload), done)


def _abandon(store: Store, reader: BlockReader, writer: BlockWriter) -> None:
    """A tier that nobody closed is gone: its blocks are written, for they were never given up."""
    reader.close()
    writer.end()
    store.close()


def payload_bytes(cache: CacheManager, runner: BlockBytes) -> dict[int, int]:
    """Bytes of a stored block in each group of layers."""
    return {group: len(runner.read_blocks([0], group)) for group in range(len(cache.spec.groups))}


def _averaged(before: float | None, now: float) -> float:
    return now if before is None else KEPT_WEIGHT * before + (1 - KEPT_WEIGHT) * now
