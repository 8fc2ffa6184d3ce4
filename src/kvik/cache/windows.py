"""The blocks of layers that see only a window of the newest tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvik.cache.block_pool import BlockPool
from kvik.cache.spec import WindowSpec


@dataclass(slots=True, eq=False)
class WindowTable:
    """The twins that one sequence holds: of its blocks from `first` on, without a gap."""

    first: int = 0
    block_ids: list[int] = field(default_factory=list)

    def places(self, length: int) -> list[int]:
        """A block table of that length; what lies before the window or is not there holds 0."""
        return [0] * self.first + self.block_ids + [0] * (length - self.first - len(self.block_ids))


class WindowGroup:
    """Blocks for the layers of one window, each the *twin* of a block that all tokens have.

    The twin of a block holds the same tokens' keys and values in these layers. A table holds twins of its newest blocks
    only. The twin of a sealed block is *known*: it is found with the block, for as long as it is not evicted; it may go
    long before the block does, but never stays behind it.
    """

    def __init__(self, spec: WindowSpec, num_blocks: int) -> None:
        self.spec = spec
        self.pool = BlockPool(num_blocks)
        self.num_evicted = 0
        self._twin_of: dict[int, int] = {}  # of each sealed block that has one
        self._block_of: dict[int, int] = {}  # the other way

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
        for index in range(len(block_ids) - 1, self.spec.first_block(num_tokens) - 1, -1):
            if block_ids[index] not in self._twin_of:
                return index
        return len(block_ids)

    def adopt(self, block_ids: Sequence[int], num_tokens: int) -> WindowTable:
        """Hold the known twins that a sequence of so many tokens needs of these blocks."""
        first = min(self.spec.first_block(num_tokens), len(block_ids))
        table = WindowTable(first, [self._twin_of[block_id] for block_id in block_ids[first:]])
        self.pool.hold(table.block_ids)
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

    def seal(self, table: WindowTable, index: int, block_id: int) -> None:
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

    def slide(self, table: WindowTable, num_tokens: int) -> None:
        """Give back what lies before the window of the token behind `num_tokens` of them."""
        count = min(self.spec.first_block(num_tokens) - table.first, len(table.block_ids))
        if count > 0:
            self.pool.release(table.block_ids[:count])
            del table.block_ids[:count]
            table.first += count

    def cut(self, table: WindowTable, num_kept: int) -> None:
        """Give back the twins of blocks behind the first `num_kept`."""
        kept = max(0, num_kept - table.first)
        self.pool.release(table.block_ids[kept:])
        del table.block_ids[kept:]
        if not table.block_ids:
            table.first = min(table.first, num_kept)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Prove that the pool, the known twins and these tables, which are all that live, agree."""
        self.pool.check(tables)
        assert {twin: block_id for block_id, twin in self._twin_of.items()} == self._block_of, "twins of two blocks"
        named = {twin for twin in range(self.pool.num_blocks) if self.pool.is_named(twin)}
        assert named == self._block_of.keys(), "the pool keeps other twins than those that are known"

    @property
    def known_blocks(self) -> Iterable[int]:
        """Sealed blocks that have a twin."""
        return self._twin_of.keys()
