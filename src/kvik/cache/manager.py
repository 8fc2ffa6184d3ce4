"""The only door to the cache's accounts: blocks for sequences, and what sequences share."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from kvik.cache.block_pool import BlockPool
from kvik.cache.radix import Match, Namespace, RadixTree, Stop
from kvik.cache.spec import KVCacheSpec

IDLE_TICKS = 256
"""Steps after which memory that nobody uses goes back to the system."""


class BlockCopy(NamedTuple):
    """Keys and values to be copied before a step writes: a block that others keep as it is, and the writer's own."""

    source: int
    target: int


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one sequence, in the order of its tokens. It holds each of them once."""

    namespace: Namespace
    block_ids: list[int] = field(default_factory=list)
    num_sealed: int = 0  # blocks at the beginning that are full and in the prefix tree
    claims: list[int] = field(default_factory=list)  # hashes of the blocks it is about to seal, the next one last


@dataclass(slots=True)
class CacheStats:
    """What the prefix cache was asked and what it gave, since the engine began."""

    num_queries: int = 0
    num_queried_tokens: int = 0
    num_cached_tokens: int = 0  # of those, found
    num_evicted_blocks: int = 0
    num_copied_blocks: int = 0

    def note(self, num_asked: int, num_found: int) -> None:
        """One more query, for so many tokens."""
        self.num_queries += 1
        self.num_queried_tokens += num_asked
        self.num_cached_tokens += num_found

    @property
    def hit_rate(self) -> float:
        """Share of the tokens asked for that were found."""
        return self.num_cached_tokens / self.num_queried_tokens if self.num_queried_tokens else 0.0


class CacheManager:
    """Blocks for sequences: found by their tokens, taken, copied before a shared one is written, sealed, given back.

    A block is *sealed* when all of its tokens are computed: from then on it is in the prefix tree, is never written
    again, and may be shared. Where two sequences compute the same block, both end up with the one sealed first. So
    whoever holds a block of the tree holds all blocks before it, and the block released longest ago is always the end
    of a branch: that one is evicted first.
    """

    def __init__(self, spec: KVCacheSpec, num_blocks: int, *, prefix_cache: bool = True) -> None:
        self.spec = spec
        self.pool = BlockPool(num_blocks)
        self.tree = RadixTree(spec.block_size)
        self.prefix_cache = prefix_cache
        self.stats = CacheStats()
        self._claimed: dict[int, BlockTable] = {}
        self._being_copied: list[list[int]] = []  # sources, each at the end of its path: held until the copies are made
        self._pins: list[BlockTable] = []
        self._pin_counts: Counter[int] = Counter()  # of each pinned block

    # A sequence's life, in order.

    def new_table(self, salt: str | None = None) -> BlockTable:
        """No blocks yet. Nothing is shared between tables of different salts."""
        return BlockTable(Namespace(self.spec.dtype, salt))

    def match(self, token_ids: Sequence[int], salt: str | None = None) -> Match:
        """The cached beginning of the tokens but the last: its logits are wanted, so it is always computed."""
        namespace = Namespace(self.spec.dtype, salt)
        if not self.prefix_cache:
            return Match(namespace, [], Stop.OFF, 0, None, None)
        return self.tree.match(_packed(token_ids[:-1]), namespace)

    def is_being_computed(self, match: Match) -> bool:
        """Whether a sequence is about to seal the very block at which the match stopped."""
        return match.next_hash in self._claimed

    def adopt(self, table: BlockTable, token_ids: Sequence[int], match: Match) -> int:
        """Give an empty table the blocks of a match of just now; returns how many of the tokens need no computing.

        The tail counts too, though its block holds other tokens further on: `reserve` copies it before it is written.
        What the table will seal itself it claims, so that others may wait for it.
        """
        assert not table.block_ids
        assert not table.claims
        assert match.namespace == table.namespace, "a match in another namespace"
        self.stats.note(len(token_ids) - 1, match.num_cached_tokens)
        table.block_ids = list(match.block_ids)
        table.num_sealed = len(match.block_ids)
        if match.tail:
            table.block_ids.append(match.tail[0])
        self.pool.hold(table.block_ids)
        if self.prefix_cache:
            self._claim(table, token_ids, match)
        return match.num_cached_tokens

    def num_missing(self, table: BlockTable, num_tokens: int) -> int:
        """Blocks that the table lacks for so many tokens."""
        return max(0, self.spec.num_blocks_for(num_tokens) - len(table.block_ids))

    def has_room(self, match: Match, num_tokens: int, num_promised: int) -> bool:
        """Whether `num_tokens` tokens that match so far find blocks, without taking those promised to others."""
        wanted = [*match.block_ids, *([match.tail[0]] if match.tail else [])]
        num_available = self.pool.num_available - sum(self.pool.ref_count(block_id) == 0 for block_id in wanted)
        return self.spec.num_blocks_for(num_tokens) - len(match.block_ids) + num_promised <= num_available

    def reserve(self, table: BlockTable, num_tokens: int, num_computed_tokens: int) -> list[BlockCopy] | None:
        """Blocks for `num_tokens` tokens, of which those after the computed ones can be written; `None`: not now.

        Reusable blocks are evicted where free ones are too few. The copies must be made before the step; their sources
        stay held until `end_copies`. A table that goes back to fewer computed tokens tells so with `release`.
        """
        block_ids = table.block_ids
        index, offset = divmod(num_computed_tokens, self.spec.block_size)
        assert table.num_sealed <= index, "a sealed block is never written"
        if offset and not self._is_writable(block_ids[index]):
            assert len(block_ids) == index + 1, "blocks behind one that is shared"
            return self._reserve_with_copy(table, num_tokens)
        taken = self._take(self.num_missing(table, num_tokens), block_ids[-1] if block_ids else None)
        if taken is None:
            return None
        block_ids += taken
        return []

    def end_copies(self) -> None:
        """The copies that `reserve` asked for are made, or nobody wants them any more."""
        for path in self._being_copied:
            self.pool.release(path)
        self._being_copied.clear()

    def seal(self, table: BlockTable, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Put blocks that have become full into the tree, or take over those that somebody else sealed before."""
        num_full = num_computed_tokens // self.spec.block_size
        while table.num_sealed < num_full and self.prefix_cache:
            index = table.num_sealed
            mine = table.block_ids[index]
            key = _packed(token_ids[index * self.spec.block_size : (index + 1) * self.spec.block_size])
            previous = table.block_ids[index - 1] if index else None
            sealed = self.tree.append(table.namespace, previous, key, mine)
            if sealed == mine:
                self.pool.name(mine)
            else:
                self.pool.hold([sealed])
                self.pool.release([mine])
                table.block_ids[index] = sealed
            table.num_sealed += 1
            if table.claims:
                self._unclaim(table, table.claims.pop())

    def fork(self, table: BlockTable, num_computed_tokens: int) -> BlockTable:
        """Another table over the same blocks; whichever writes into the last one first gets a copy of it.

        The first table must have no room left behind its computed tokens (`release` takes it away).
        """
        assert len(table.block_ids) == self.spec.num_blocks_for(num_computed_tokens)
        self.pool.hold(table.block_ids)
        return BlockTable(table.namespace, list(table.block_ids), table.num_sealed)

    def release(self, table: BlockTable, num_kept_tokens: int = 0) -> None:
        """Give back the blocks behind the first `num_kept_tokens` tokens; sealed ones stay in the tree for a while."""
        num_kept = self.spec.num_blocks_for(num_kept_tokens)
        self.pool.release(table.block_ids[num_kept:])
        del table.block_ids[num_kept:]
        table.num_sealed = min(table.num_sealed, num_kept_tokens // self.spec.block_size)
        self.withdraw_claims(table)

    def withdraw_claims(self, table: BlockTable) -> None:
        """The table will not seal what it said it would."""
        while table.claims:
            self._unclaim(table, table.claims.pop())

    # Beside sequences.

    def pin(self, table: BlockTable) -> BlockTable:
        """Hold the table's sealed blocks until `unpin`, whatever becomes of the table."""
        self.pool.hold(table.block_ids[: table.num_sealed])
        self._pin_counts.update(table.block_ids[: table.num_sealed])
        pin = BlockTable(table.namespace, table.block_ids[: table.num_sealed], table.num_sealed)
        self._pins.append(pin)
        return pin

    def unpin(self, pin: BlockTable) -> None:
        """Let the blocks of a pin go."""
        self._pins.remove(pin)
        for block_id in pin.block_ids:
            self._pin_counts[block_id] -= 1
            if not self._pin_counts[block_id]:
                del self._pin_counts[block_id]
        self.release(pin)

    @property
    def num_pinned(self) -> int:
        """Blocks that some pin holds."""
        return len(self._pin_counts)

    def num_blocks_within_reach(self, match: Match) -> int:
        """The most blocks that a sequence with this match could come to hold: all that are not pinned by others."""
        num_shared = sum(block_id in self._pin_counts for block_id in match.block_ids)
        return self.pool.num_blocks - (self.num_pinned - num_shared)

    def clear(self) -> None:
        """Forget every block that nobody holds."""
        while (block_id := self.pool.oldest_reusable()) is not None:
            self._evict(block_id)

    def take_idle(self, most_kept: int | None = None) -> list[int]:
        """Superblocks whose memory can be given back now: idle for `IDLE_TICKS` calls, or more than `most_kept`."""
        self.pool.tick()
        return self.pool.take_idle(IDLE_TICKS, most_kept)

    @property
    def committed_bytes(self) -> int:
        """Bytes of memory that the cache may be using."""
        return self.pool.num_committed * self.spec.block_bytes

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Prove that pool, tree and these tables, which are all that live, agree."""
        tables = [*tables, *self._pins]
        self.pool.check(chain((table.block_ids for table in tables), self._being_copied))
        self.tree.check()
        named = [block_id for block_id in range(self.pool.num_blocks) if self.pool.is_named(block_id)]
        assert len(named) == len(self.tree), "the pool keeps other blocks than the tree names"
        for table in tables:
            assert all(self.pool.is_named(block_id) for block_id in table.block_ids[: table.num_sealed])
            for before, block_id in zip([None, *table.block_ids], table.block_ids, strict=False):
                if self.pool.is_named(block_id):
                    assert self.tree.place_of(block_id) == (table.namespace, before), (
                        f"block {block_id} without its path"
                    )
        assert self._pin_counts == Counter(chain.from_iterable(pin.block_ids for pin in self._pins)), "pins miscounted"
        claimed = {claim: table for table in tables for claim in table.claims if self._claimed.get(claim) is table}
        assert claimed.keys() == self._claimed.keys(), "a claim of a table that is gone"

    def _is_writable(self, block_id: int) -> bool:
        return self.pool.ref_count(block_id) == 1 and not self.pool.is_named(block_id)

    def _reserve_with_copy(self, table: BlockTable, num_tokens: int) -> list[BlockCopy] | None:
        """The same where the table's last block is to be written, and others need it as it is."""
        *path, source = table.block_ids
        num_more = self.num_missing(table, num_tokens)
        taken = self._take(1 + num_more, path[-1] if path else None)
        if taken is not None:
            table.block_ids[-1:] = taken
            # The table may go before the copy is made, and none of these blocks may then be older than the source.
            self.pool.hold(path)
            self._being_copied.append([*path, source])
            self.stats.num_copied_blocks += 1
            return [BlockCopy(source, taken[0])]
        if self.pool.ref_count(source) > 1:
            return None
        # Nobody but the tree needs it, and with the whole pool in use no copy may ever fit: then it leaves the tree.
        taken = self._take(num_more, source)
        if taken is None:
            return None
        self._evict(source)  # whatever was behind it was reusable, and is evicted by now
        table.block_ids += taken
        return []

    def _take(self, count: int, after: int | None) -> list[int] | None:
        if count > self.pool.num_available:
            return None
        while self.pool.num_free < count:
            oldest = self.pool.oldest_reusable()
            assert oldest is not None
            self._evict(oldest)
        return self.pool.allocate(count, after)

    def _evict(self, block_id: int) -> None:
        self.tree.evict(block_id)
        self.pool.forget(block_id)
        self.stats.num_evicted_blocks += 1

    def _claim(self, table: BlockTable, token_ids: Sequence[int], match: Match) -> None:
        size, name = self.spec.block_size, match.next_hash
        if name is None:
            return
        claims = [name]
        for start in range(match.num_tokens + size, len(token_ids) - size + 1, size):
            name = hash((name, _packed(token_ids[start : start + size])))
            claims.append(name)
        for claim in claims:
            self._claimed.setdefault(claim, table)
        table.claims = claims[::-1]

    def _unclaim(self, table: BlockTable, claim: int) -> None:
        if self._claimed.get(claim) is table:
            del self._claimed[claim]


def _packed(token_ids: Sequence[int]) -> bytes:
    return array("i", token_ids).tobytes()
