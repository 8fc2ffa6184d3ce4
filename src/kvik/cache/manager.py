"""The only door to the cache's accounts: blocks for sequences, and what sequences share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from weakref import WeakSet

from kvik.cache.block_pool import BlockPool
from kvik.cache.claims import Claims
from kvik.cache.digest import Digest, Identity
from kvik.cache.radix import Match, MissReason, Namespace, RadixTree
from kvik.cache.spec import KVCacheSpec, PoolSize
from kvik.cache.tables import (
    BlockCopy,
    BlockEvents,
    BlockTable,
    CacheStats,
    HeldMatch,
    Hold,
    TwinTable,
    held_match,
    packed,
)
from kvik.cache.twins import Twins, check_accounts

IDLE_TICKS = 256
"""Steps after which memory that nobody uses goes back to the system."""


class CacheManager:
    """Blocks for sequences: found by their tokens, taken, copied before a shared one is written, sealed, given back.

    A block is *sealed* when all of its tokens are computed: from then on it is in the prefix tree, is never written
    again, and may be shared. Where two sequences compute the same block, both end up with the one sealed first. So
    whoever holds a block of the tree holds all blocks before it, and the block released longest ago is always the end
    of a branch: that one is evicted first. The block in which a sequence ends stands in the tree as well, *open*: who
    goes on from there copies it, and once that copy is sealed nobody needs the open one.
    """

    def __init__(
        self,
        spec: KVCacheSpec,
        size: PoolSize,
        *,
        prefix_cache: bool = True,
        step_tokens: int = 1,
        identity: Identity = Identity(),  # noqa: B008  # it is frozen
    ) -> None:
        self.spec = spec
        self.identity = identity
        self.step_tokens = step_tokens  # most that a step computes of one sequence
        self.prefix_cache = prefix_cache
        self.stats = CacheStats()
        self.events: BlockEvents | None = None  # noted where somebody watches
        self._tables: WeakSet[BlockTable] = WeakSet()  # of sequences and holds
        self.size = size
        self._begin_empty()

    def _begin_empty(self) -> None:
        self.pool = BlockPool(self.size.num_blocks)
        self.twins = Twins(self.spec, self.size, self.pool)
        self.tree = RadixTree(self.spec.block_size, self.identity)
        self.holds: dict[Hold, None] = {}  # the oldest first
        self._claims = Claims()
        # Sources, each at the end of its path: held until the copies are made.
        self._being_copied: list[BlockTable] = []
        self._pin_counts: Counter[int] = Counter()  # of each pinned block

    def reset(self) -> None:
        """Forget everything, whatever state an interruption has left it in: all tables are empty, all holds lost."""
        for hold in self.holds:
            hold.tokens, hold.is_over = b"", True
        for table in self._tables.copy():
            table.block_ids, table.num_sealed, table.claims = [], 0, []
            table.twins = self.twins.new()
        self._begin_empty()

    # A sequence's life, in order.

    def new_table(self, salt: str | None = None) -> BlockTable:
        """No blocks yet. Nothing is shared between tables of different salts."""
        return self._table(Namespace(self.spec.format, salt), [], 0, self.twins.new())

    def _table(
        self, namespace: Namespace, block_ids: list[int], num_sealed: int, twins: dict[int, TwinTable]
    ) -> BlockTable:
        table = BlockTable(namespace, block_ids, num_sealed, twins=twins)
        self._tables.add(table)
        return table

    def match(self, token_ids: Sequence[int], salt: str | None = None, hold: Hold | None = None) -> Match:
        """The cached beginning of the tokens but the last: its logits are wanted, so it is always computed.

        It is what the prefix tree has, or `hold` where that has more.
        """
        namespace = Namespace(self.spec.format, salt)
        tokens = packed(token_ids[:-1])
        found = Match(namespace, [], MissReason.OFF, 0, None, None)
        if self.prefix_cache:
            found = self.twins.within(self.tree.match(tokens, namespace))
        held = self._held_match(hold, tokens, namespace) if hold is not None else None
        if held is not None and held.num_cached_tokens > found.num_cached_tokens:
            return held
        return found

    def _held_match(self, hold: Hold, tokens: bytes, namespace: Namespace) -> HeldMatch | None:
        """What a hold has of the tokens, if they can be gone on from."""
        if hold not in self.holds or hold.table.namespace != namespace:
            return None
        found = held_match(hold, tokens, self.spec.block_size)
        return found if found is not None and self.can_go_back(hold.table, found.num_cached_tokens) else None

    def is_being_computed(self, match: Match) -> bool:
        """Whether a sequence is about to seal the very block at which the match stopped."""
        return match.next_digest in self._claims

    def adopt(self, table: BlockTable, token_ids: Sequence[int], match: Match) -> int:
        """Give an empty table the blocks of a match of just now; returns how many of the tokens need no computing.

        The tail counts too, though its block holds other tokens further on: `reserve` copies it before it is written.
        What the table will seal itself it claims, so that others may wait for it.
        """
        assert not table.block_ids
        assert not table.claims
        assert match.namespace == table.namespace, "a match in another namespace"
        if isinstance(match, HeldMatch):
            held = self.fork(match.hold.table, match.hold.num_tokens)
            self.release(held, match.num_cached_tokens)
            table.block_ids, table.num_sealed, table.twins = held.block_ids, held.num_sealed, held.twins
            held.block_ids, held.twins = [], self.twins.new()
            return match.num_cached_tokens
        table.block_ids = match.held_ids
        table.num_sealed = len(match.block_ids)
        self.pool.hold(table.block_ids)
        self.twins.adopt(table, match.num_cached_tokens)
        if self.prefix_cache:
            self._claims.make(table, token_ids, match, self.spec.block_size)
        return match.num_cached_tokens

    def num_missing(self, table: BlockTable, num_tokens: int) -> int:
        """Blocks that the table lacks for so many tokens."""
        return max(0, self.spec.num_blocks_for(num_tokens) - len(table.block_ids))

    def has_room(self, match: Match, num_tokens: int, num_promised: int) -> bool:
        """Whether `num_tokens` tokens that match so far find blocks, without taking those promised to others."""
        num_available = self.pool.num_available - sum(self.pool.ref_count(each) == 0 for each in match.block_ids)
        needed = self.spec.num_blocks_for(num_tokens) - len(match.block_ids)
        if match.tail and self.pool.ref_count(match.tail[0]) == 0 and num_promised:
            needed += 1  # it is copied, and stays; where nobody else needs a block it is written itself if need be
        return needed + num_promised <= num_available

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
        count = self.num_missing(table, num_tokens)
        if count == 0:
            return []
        taken = self._take(count, block_ids[-1] if block_ids else None) if self.twins.has(count) else None
        if taken is None:
            return None
        block_ids += taken
        self.twins.extend(table, count)
        return []

    def end_copies(self) -> None:
        """The copies that `reserve` asked for are made, or nobody wants them any more."""
        for held in self._being_copied:
            self.release(held)
        self._being_copied.clear()

    def seal(self, table: BlockTable, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Put blocks that have become full into the tree, or take over those that somebody else sealed before."""
        num_full = num_computed_tokens // self.spec.block_size
        while table.num_sealed < num_full and self.prefix_cache:
            index = table.num_sealed
            mine = table.block_ids[index]
            key = packed(token_ids[index * self.spec.block_size : (index + 1) * self.spec.block_size])
            previous = table.block_ids[index - 1] if index else None
            self._drop_open(table.namespace, previous, key)
            sealed = self.tree.append(table.namespace, previous, key, mine)
            if sealed == mine:
                self.pool.name(mine)
                if self.events is not None:
                    self.events.sealed.append(mine)
                    self.events.sealed_digests.append(self.tree.digest_of(mine))
            else:
                self.pool.hold([sealed])
                self.pool.release([mine])
                table.block_ids[index] = sealed
            self.twins.seal(table, index, sealed)
            table.num_sealed += 1
            self._claims.keep_next(table)

    def keep_end(self, table: BlockTable, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Put the block in which a sequence ends into the tree, where it is not full: the next turn begins there."""
        self.release(table, num_computed_tokens)
        index, offset = divmod(num_computed_tokens, self.spec.block_size)
        if not (self.prefix_cache and offset) or self.pool.is_named(block_id := table.block_ids[index]):
            return
        key = packed(token_ids[index * self.spec.block_size : num_computed_tokens])
        previous = table.block_ids[index - 1] if index else None
        self._drop_open(table.namespace, previous, key)
        if self.tree.append_open(table.namespace, previous, key, block_id):
            self.pool.name(block_id)
            self.twins.seal(table, index, block_id)

    def _drop_open(self, namespace: Namespace, previous: int | None, key: bytes) -> None:
        """Forget the open block that one with these tokens makes needless; who holds it keeps it."""
        block_id = self.tree.take_open(namespace, previous, key)
        if block_id is not None:
            self._forget(block_id)

    def slide(self, table: BlockTable, num_computed_tokens: int) -> None:
        """Give back what has left the windows of a table with so many tokens computed."""
        self.twins.slide(table, num_computed_tokens)

    def can_go_back(self, table: BlockTable, num_tokens: int) -> bool:
        """Whether the table still has what the token behind its first `num_tokens` sees in every window."""
        return self.twins.reach(table, num_tokens)

    def held_bytes(self, table: BlockTable) -> int:
        """Bytes of the blocks that a table names, in all layers."""
        return len(table.block_ids) * self.spec.block_bytes + self.twins.held_bytes(table)

    def places_of(self, block_id: int) -> list[tuple[int, int]] | None:
        """Where a sealed block is in each group of layers: (group, block); None where one has given its twin up."""
        return self.twins.places_of(block_id)

    def last_places(self, table: BlockTable) -> list[tuple[int, int]]:
        """The same of a table's last block."""
        return self.twins.last_places(table)

    def fork(self, table: BlockTable, num_computed_tokens: int) -> BlockTable:
        """Another table over the same blocks; whichever writes into the last one first gets a copy of it.

        The first table must have no room left behind its computed tokens (`release` takes it away).
        """
        assert len(table.block_ids) == self.spec.num_blocks_for(num_computed_tokens)
        self.pool.hold(table.block_ids)
        twins = self.twins.hold(table, len(table.block_ids))
        return self._table(table.namespace, list(table.block_ids), table.num_sealed, twins)

    def release(self, table: BlockTable, num_kept_tokens: int = 0) -> None:
        """Give back the blocks behind the first `num_kept_tokens` tokens; sealed ones stay in the tree for a while."""
        num_kept = self.spec.num_blocks_for(num_kept_tokens)
        self.pool.release(table.block_ids[num_kept:])
        del table.block_ids[num_kept:]
        self.twins.cut(table, num_kept)
        table.num_sealed = min(table.num_sealed, num_kept_tokens // self.spec.block_size)
        self.withdraw_claims(table)

    def withdraw_claims(self, table: BlockTable) -> None:
        """The table will not seal what it said it would."""
        self._claims.withdraw(table)

    # Beside sequences.

    def keep(
        self, table: BlockTable, tokens: bytes, *, is_pinned: bool = False, num_pinned_tokens: int | None = None
    ) -> Hold:
        """Hold what a table has of its computed tokens until `let_go` or `take_back`, whatever becomes of the table.

        A pinned hold is one of the full blocks alone, and `take_back` leaves it. With `num_pinned_tokens` it is one of
        the first so many tokens, and of the full blocks among them where there are windows: those of the last block
        may be gone.
        """
        if is_pinned:
            num_sealed, num_tokens = table.num_sealed, table.num_sealed * self.spec.block_size
            if num_pinned_tokens is not None:
                num_sealed = min(num_sealed, num_pinned_tokens // self.spec.block_size)
                num_tokens = num_sealed * self.spec.block_size if self.twins.groups else num_pinned_tokens
            block_ids = table.block_ids[: self.spec.num_blocks_for(num_tokens)]
            self.pool.hold(block_ids)
            self._pin_counts.update(block_ids)
            tokens = tokens[: 4 * num_tokens]
            twins = self.twins.hold_sealed(table, block_ids, num_tokens)
            kept = self._table(table.namespace, block_ids, num_sealed, twins)
        else:
            kept = self.fork(table, len(tokens) // 4)
        hold = Hold(kept, tokens, is_pinned)
        self.holds[hold] = None
        return hold

    def let_go(self, hold: Hold) -> None:
        """Give back the blocks of a hold; once more is no error."""
        if hold not in self.holds:
            return
        del self.holds[hold]
        if hold.is_pinned:
            self._pin_counts -= Counter(hold.table.block_ids)
        hold.tokens, hold.is_over = b"", True
        self.release(hold.table)

    def take_back(self, spared: Hold | None = None) -> bool:
        """Let the oldest hold go that is not pinned, `spared` only where it is the last; False where there is none."""
        holds = [hold for hold in self.holds if not hold.is_pinned]
        if not holds:
            return False
        self.let_go(next((hold for hold in holds if hold is not spared), holds[0]))
        return True

    @property
    def _pins(self) -> list[Hold]:
        return [hold for hold in self.holds if hold.is_pinned]

    @property
    def scope(self) -> Digest:
        """Names all blocks that this cache's could be exchanged with, of whatever salt."""
        return self.identity.scope(self.spec.format)

    def root(self, salt: str | None = None) -> Digest:
        """What the first blocks of a salt stand behind."""
        return self.tree.root_of(Namespace(self.spec.format, salt))

    @property
    def num_pinned(self) -> int:
        """Blocks that some pin holds."""
        return len(self._pin_counts)

    def num_blocks_within_reach(self, match: Match) -> int:
        """The most blocks that a sequence with this match could come to hold: all that are not pinned by others."""
        num_shared = sum(block_id in self._pin_counts for block_id in match.block_ids)
        num_blocks = self.pool.num_blocks - self.num_pinned + num_shared
        return self.twins.max_blocks(num_blocks, [pin.table for pin in self._pins], self.step_tokens)

    @property
    def num_reachable_blocks(self) -> int:
        """The most blocks that a sequence could come to hold while nothing is pinned."""
        return self.twins.max_blocks(self.pool.num_blocks, [], self.step_tokens)

    def clear(self) -> None:
        """Forget every block that nobody holds."""
        while (block_id := self.pool.oldest_reusable()) is not None:
            self._evict(block_id)

    def take_idle(self, max_kept: int | None = None) -> list[list[int]]:
        """Superblocks of each group to be given back: idle for `IDLE_TICKS` calls, or more than `max_kept`."""
        return self.twins.take_idle(IDLE_TICKS, max_kept)

    def all_superblocks(self) -> list[list[int]]:
        """Every superblock of each group."""
        return self.twins.all_superblocks()

    @property
    def committed_bytes(self) -> int:
        """Bytes of memory that the cache may be using."""
        return self.twins.committed_bytes

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Prove that pool, tree, holds and these tables, which are all that live, agree."""
        for hold in self.holds:
            assert len(hold.table.block_ids) == self.spec.num_blocks_for(hold.num_tokens), "a hold of other blocks"
            assert not hold.table.claims, "others wait for what nobody computes"
        live = [*tables, *(hold.table for hold in self.holds)]
        check_accounts(self.pool, self.tree, self.twins, live, self._being_copied)
        pinned = Counter(chain.from_iterable(pin.table.block_ids for pin in self._pins))
        assert self._pin_counts == pinned, "pins miscounted"
        self._claims.check(live)

    def _is_writable(self, block_id: int) -> bool:
        return self.pool.ref_count(block_id) == 1 and not self.pool.is_named(block_id)

    def _reserve_with_copy(self, table: BlockTable, num_tokens: int) -> list[BlockCopy] | None:
        """The same where the table's last block is to be written, and others need it as it is."""
        *path, source = table.block_ids
        num_more = self.num_missing(table, num_tokens)
        taken = self._take(1 + num_more, path[-1] if path else None) if self.twins.has(1 + num_more) else None
        if taken is not None:
            # The table may go before the copy is made, and none of these blocks may then be older than the source.
            self.pool.hold(path)
            twins = self.twins.hold(table, len(table.block_ids))
            self._being_copied.append(self._table(table.namespace, [*path, source], 0, twins))
            table.block_ids[-1:] = taken
            copies = self.twins.replace_last(table, source, taken)
            self.stats.num_copied_blocks += 1
            if self.events is not None:
                self.events.copied += copies
            return copies
        if self.pool.ref_count(source) > 1 or not self.twins.has(num_more):
            return None
        # Nobody but the tree needs it, and with the whole pool in use no copy may ever fit: then it leaves the tree.
        taken = self._take(num_more, source)
        if taken is None:
            return None
        while (last := self.tree.last_behind(source)) != source:  # nobody holds those either
            self._evict(last)
        self._evict(source)
        table.block_ids += taken
        self.twins.extend(table, num_more)
        return []

    def _take(self, count: int, after: int | None) -> list[int] | None:
        if count > self.pool.num_available:
            return None
        while self.pool.num_free < count:
            oldest = self.pool.oldest_reusable()
            assert oldest is not None
            self._evict(oldest)
        taken = self.pool.allocate(count, after)
        if self.events is not None and taken:
            self.events.taken += taken
        return taken

    def _evict(self, block_id: int) -> None:
        if self.events is not None:
            self.events.evicted_digests.append(self.tree.digest_of(block_id))
        self.tree.evict(block_id)
        self._forget(block_id)
        self.stats.num_evicted_blocks += 1
        if self.events is not None:
            self.events.evicted.append(block_id)

    def _forget(self, block_id: int) -> None:
        self.twins.forget(block_id)
        self.pool.forget(block_id)
