"""Physical blocks: where the groups of layers have what the tokens of a block left behind, each block's *twins*.

A group that sees all tokens keeps the twin of a block for as long as the block lives, under the block's own number: it
needs no account of its own. A group that slides has a pool, and an account of which twins it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from kvik.cache.block_pool import BlockPool
from kvik.cache.radix import Match, MissReason, RadixTree
from kvik.cache.spec import BLOCKS_PER_SUPERBLOCK, KVCacheSpec, PoolSize
from kvik.cache.tables import BlockCopy, BlockTable, TwinTable


class TwinGroup:
    """Physical blocks of one group that slides.

    A table holds twins of its newest blocks only. The twin of a sealed block is *known*: it is found with the block for
    as long as it is not evicted. It may go long before the block does, but never stays behind it.
    """

    def __init__(self, spec: KVCacheSpec, index: int, num_blocks: int) -> None:
        self.index = index  # in the spec
        self.spec = spec.groups[index]
        self.block_bytes = spec.group_block_bytes[index]
        self.pool = BlockPool(num_blocks)
        self.num_evicted = 0
        self._block_size = spec.block_size
        self._twin_of: dict[int, int] = {}  # of each sealed block that has one
        self._block_of: dict[int, int] = {}  # the other way

    def first_block(self, num_tokens: int) -> int:
        """The first block of a sequence that the token behind `num_tokens` of them still sees."""
        return self.spec.first_token(num_tokens) // self._block_size

    def twin_of(self, block_id: int) -> int | None:
        """The known twin of a sealed block."""
        return self._twin_of.get(block_id)

    def block_of(self, twin: int) -> int | None:
        """The sealed block that a known twin belongs to."""
        return self._block_of.get(twin)

    def usable(self, block_ids: Sequence[int], num_tokens: int) -> int:
        """How many of these blocks a sequence of `num_tokens` tokens can go on from: all, or those before a gap.

        What it gives is not yet known to be usable itself: fewer tokens see further back.
        """
        for index in range(len(block_ids) - 1, self.first_block(num_tokens) - 1, -1):
            if block_ids[index] not in self._twin_of:
                return index
        head = block_ids[: self.spec.num_first_blocks]
        return next((index for index, each in enumerate(head) if each not in self._twin_of), len(block_ids))

    def adopt(self, block_ids: Sequence[int], num_tokens: int) -> TwinTable:
        """Hold the known twins that a sequence of so many tokens needs of these blocks."""
        first = min(self.first_block(num_tokens), len(block_ids))
        newest, head = block_ids[first:], block_ids[: min(first, self.spec.num_first_blocks)]
        table = TwinTable(first, [self._twin_of[each] for each in newest], [self._twin_of[each] for each in head])
        self.pool.hold(table.all_ids)
        return table

    def take(self, count: int, after: int | None) -> list[int] | None:
        """Free blocks, known ones that nobody holds evicted if need be; `None`: not now."""
        if count > self.pool.num_available:
            return None
        while self.pool.num_free < count:
            oldest = self.pool.oldest_reusable()
            assert oldest is not None
            del self._twin_of[self._block_of.pop(oldest)]
            self.pool.forget(oldest)
            self.num_evicted += 1
        return self.pool.allocate(count, after)

    def seal(self, table: TwinTable, index: int, block_id: int) -> None:
        """The table's block `index` is sealed as `block_id`: its twin becomes known, or gives way to the known one."""
        assert index >= table.first, "the twin of a block is gone before the block is full"
        mine = table.block_ids[index - table.first]
        known = self._twin_of.get(block_id)
        if known == mine:
            return
        if known is None:
            self._twin_of[block_id], self._block_of[mine] = mine, block_id
            self.pool.name(mine)
        else:
            self.pool.hold([known])
            self.pool.release([mine])
            table.block_ids[index - table.first] = known

    def forget(self, block_id: int) -> None:
        """The block is evicted; nobody can come to its twin any more."""
        twin = self._twin_of.pop(block_id, None)
        if twin is not None:
            del self._block_of[twin]
            self.pool.forget(twin)

    def slide(self, table: TwinTable, num_tokens: int) -> None:
        """Give back what the token behind `num_tokens` of them does not see."""
        count = min(self.first_block(num_tokens) - table.first, len(table.block_ids))
        if count > 0:
            num_first = min(count, max(0, self.spec.num_first_blocks - table.first))
            table.head += table.block_ids[:num_first]
            self.pool.release(table.block_ids[num_first:count])
            del table.block_ids[:count]
            table.first += count

    def cut(self, table: TwinTable, num_kept: int) -> None:
        """Give back the twins of blocks behind the first `num_kept`."""
        kept = max(0, num_kept - table.first)
        self.pool.release(table.block_ids[kept:])
        del table.block_ids[kept:]
        self.pool.release(table.head[num_kept:])
        del table.head[num_kept:]
        if not table.block_ids:
            table.first = min(table.first, num_kept)

    def hold(self, table: TwinTable, num_blocks: int) -> TwinTable:
        """The twins of a table's first `num_blocks` blocks once more."""
        kept = table.block_ids[: max(0, num_blocks - table.first)]
        head = table.head[:num_blocks]
        self.pool.hold(head + kept)
        return TwinTable(table.first, kept, head)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Prove that the pool, the known twins and these tables, which are all that live, agree."""
        self.pool.check(tables)
        assert {twin: block_id for block_id, twin in self._twin_of.items()} == self._block_of, "twins of two blocks"
        named = {twin for twin in range(self.pool.num_blocks) if self.pool.is_named(twin)}
        assert named == self._block_of.keys(), "the pool keeps other twins than those that are known"

    def check_table(self, table: BlockTable) -> None:
        """Prove that a table's twins end where its blocks do, and are those of these blocks."""
        twins = table.twins[self.index]
        if twins.block_ids:
            assert twins.first + len(twins.block_ids) == len(table.block_ids), "a window that ends elsewhere"
        num_first = min(twins.first, len(table.block_ids), self.spec.num_first_blocks)
        assert len(twins.head) == num_first, "other first blocks than are seen from everywhere"
        for block_id, twin in chain(
            zip(table.block_ids, twins.head, strict=False),
            zip(table.block_ids[twins.first :], twins.block_ids, strict=False),
        ):
            if self.pool.is_named(twin):
                assert self.twin_of(block_id) == twin, f"block {block_id} with the twin of another"

    @property
    def known_blocks(self) -> Iterable[int]:
        """Sealed blocks that have a twin."""
        return self._twin_of.keys()


class Twins:
    """The twins of all groups; `pool` has the logical blocks, whose numbers those of full groups have too."""

    def __init__(self, spec: KVCacheSpec, size: PoolSize, pool: BlockPool) -> None:
        self._spec = spec
        self._pool = pool
        self.groups = [TwinGroup(spec, index, size.group_blocks[index]) for index in spec.sliding_groups]

    def new(self) -> dict[int, TwinTable]:
        """Those of a table without blocks."""
        return {group.index: TwinTable() for group in self.groups}

    def usable(self, block_ids: Sequence[int], num_tokens: int) -> int:
        """How many of these blocks a sequence of `num_tokens` tokens can go on from as far as the groups can tell."""
        return min((group.usable(block_ids, num_tokens) for group in self.groups), default=len(block_ids))

    def within(self, match: Match) -> Match:
        """As much of the match as every group can go on from: those that slide need the twins that are seen from it."""
        if not self.groups:
            return match
        block_ids = match.held_ids
        if self.usable(block_ids, match.num_cached_tokens) == len(block_ids):
            return match
        block_ids = match.block_ids
        while (count := self.usable(block_ids, len(block_ids) * self._spec.block_size)) < len(block_ids):
            block_ids = block_ids[:count]
        # Who computes the next block again is not waited for: it is in the tree already.
        num_tokens = len(block_ids) * self._spec.block_size
        return Match(match.namespace, block_ids, MissReason.WINDOW, num_tokens, None, None)

    def adopt(self, table: BlockTable, num_tokens: int) -> None:
        """Hold what a sequence of so many tokens needs of the table's blocks."""
        table.twins = {group.index: group.adopt(table.block_ids, num_tokens) for group in self.groups}

    def has(self, count: int) -> bool:
        """Whether each group can give so many blocks now."""
        return all(group.pool.num_available >= count for group in self.groups)

    def extend(self, table: BlockTable, count: int) -> None:
        """Twins for the table's last `count` blocks; the groups have them."""
        for group in self.groups:
            twins = table.twins[group.index]
            if not twins.block_ids:
                twins.first = len(table.block_ids) - count
            taken = group.take(count, twins.block_ids[-1] if twins.block_ids else None)
            assert taken is not None
            twins.block_ids += taken

    def replace_last(self, table: BlockTable, source: int, taken: Sequence[int]) -> list[BlockCopy]:
        """Give a table whose last block `source` is now the first of `taken` twins of those; what is to be copied."""
        copies = [BlockCopy(source, taken[0], index) for index in self._spec.full_groups]
        for group in self.groups:
            block_ids = table.twins[group.index].block_ids
            twins = group.take(len(taken), block_ids[-2] if len(block_ids) > 1 else None)
            assert twins is not None
            copies.append(BlockCopy(block_ids[-1], twins[0], group.index))
            group.pool.release(block_ids[-1:])
            block_ids[-1:] = twins
        return copies

    def seal(self, table: BlockTable, index: int, block_id: int) -> None:
        """The table's block `index` is sealed as `block_id`."""
        for group in self.groups:
            group.seal(table.twins[group.index], index, block_id)

    def forget(self, block_id: int) -> None:
        """The block is evicted."""
        for group in self.groups:
            group.forget(block_id)

    def slide(self, table: BlockTable, num_tokens: int) -> None:
        """Give back what a table with so many tokens computed needs no more."""
        for group in self.groups:
            group.slide(table.twins[group.index], num_tokens)

    def reach(self, table: BlockTable, num_tokens: int) -> bool:
        """Whether the table still has what the token behind its first `num_tokens` sees in every group."""
        return all(table.twins[group.index].first <= group.first_block(num_tokens) for group in self.groups)

    def cut(self, table: BlockTable, num_kept: int) -> None:
        """Give back the twins of blocks behind the first `num_kept`."""
        for group in self.groups:
            group.cut(table.twins[group.index], num_kept)

    def hold(self, table: BlockTable, num_blocks: int) -> dict[int, TwinTable]:
        """The twins of a table's first `num_blocks` blocks once more."""
        return {group.index: group.hold(table.twins[group.index], num_blocks) for group in self.groups}

    def hold_sealed(self, table: BlockTable, block_ids: Sequence[int], num_tokens: int) -> dict[int, TwinTable]:
        """What goes on from the first blocks of a table, which are sealed: known twins, or those that the table has."""
        return {
            group.index: group.adopt(block_ids, num_tokens)
            if group.usable(block_ids, num_tokens) == len(block_ids)
            else group.hold(table.twins[group.index], num_tokens // self._spec.block_size)
            for group in self.groups
        }

    def places_of(self, block_id: int) -> list[tuple[int, int]] | None:
        """Where a sealed block is in each group of layers: (group, block); None where one has given its twin up."""
        places = [(group, block_id) for group in self._spec.full_groups]
        for sliding in self.groups:
            twin = sliding.twin_of(block_id)
            if twin is None:
                return None
            places.append((sliding.index, twin))
        return places

    def last_places(self, table: BlockTable) -> list[tuple[int, int]]:
        """The same of a table's last block."""
        places = [(group, table.block_ids[-1]) for group in self._spec.full_groups]
        return places + [(group, twins.block_ids[-1]) for group, twins in table.twins.items()]

    def held_bytes(self, table: BlockTable) -> int:
        """Bytes that a table holds in the groups that slide."""
        return sum(len(table.twins[group.index].all_ids) * group.block_bytes for group in self.groups)

    def max_blocks(self, num_blocks: int, tables: Sequence[BlockTable], step_tokens: int) -> int:
        """How many of so many blocks a sequence can come to hold beside what these tables hold."""
        for group in self.groups:
            held = set(chain.from_iterable(table.twins[group.index].all_ids for table in tables))
            left = group.pool.num_blocks - len(held)
            num_tokens = num_blocks * self._spec.block_size
            if left < self._spec.max_group_blocks(group.index, num_tokens, step_tokens):
                num_blocks = min(num_blocks, left)
        return num_blocks

    @property
    def pools(self) -> list[BlockPool]:
        """All accounts: that of the blocks, which full groups share, then that of each group that slides."""
        return [self._pool, *(group.pool for group in self.groups)]

    def pool_index(self, group: int) -> int:
        """Which of the pools has the physical blocks of a group."""
        return next((at for at, each in enumerate(self.groups, start=1) if each.index == group), 0)

    def block_of(self, pool: int, block_id: int) -> int | None:
        """The block that what a pool has under this number belongs to, if that is known."""
        return block_id if pool == 0 else self.groups[pool - 1].block_of(block_id)

    def of_table(self, table: BlockTable) -> list[TwinTable]:
        """What a table holds of each pool."""
        return [TwinTable(0, table.block_ids), *(table.twins[group.index] for group in self.groups)]

    def take_idle(self, age: int, max_kept: int | None) -> list[list[int]]:
        """Superblocks of each group that are idle for `age` calls, or more than `max_kept`: they can be given back."""
        taken = []
        for pool in self.pools:
            pool.tick()
            taken.append(pool.take_idle(age, max_kept))
        return self._by_group(taken)

    def all_superblocks(self) -> list[list[int]]:
        """Every superblock of each group."""
        return self._by_group([list(range(-(-pool.num_blocks // BLOCKS_PER_SUPERBLOCK))) for pool in self.pools])

    def _by_group(self, of_pools: list[list[int]]) -> list[list[int]]:
        return [of_pools[self.pool_index(group)] for group in range(len(self._spec.groups))]

    @property
    def committed_bytes(self) -> int:
        """Bytes of memory that all groups may be using."""
        sliding = sum(group.pool.num_committed * group.block_bytes for group in self.groups)
        return self._pool.num_committed * self._spec.block_bytes + sliding

    def check(self, tables: Sequence[BlockTable]) -> None:
        """Prove that the groups and these tables, which are all that live, agree."""
        for group in self.groups:
            group.check(table.twins[group.index].all_ids for table in tables)
            assert all(self._pool.is_named(block_id) for block_id in group.known_blocks), "a twin without its block"
            for table in tables:
                group.check_table(table)


def check_accounts(
    pool: BlockPool, tree: RadixTree, twins: Twins, tables: Sequence[BlockTable], copied: Sequence[BlockTable]
) -> None:
    """Prove that blocks, twins and tree agree with all tables that live, and with those that are being copied."""
    everyone = [*tables, *copied]
    pool.check(table.block_ids for table in everyone)
    tree.check()
    twins.check(everyone)
    named = sum(pool.is_named(block_id) for block_id in range(pool.num_blocks))
    assert named == len(tree), "the pool keeps other blocks than the tree names"
    for table in tables:
        assert all(pool.is_named(block_id) for block_id in table.block_ids[: table.num_sealed])
        for before, block_id in zip([None, *table.block_ids], table.block_ids, strict=False):
            if pool.is_named(block_id):
                assert tree.place_of(block_id) == (table.namespace, before), f"block {block_id} without its path"
