"""Say who holds each block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """The accounting of `num_blocks` blocks. Holds no arrays.

    Every block is in exactly one state:
        free      nobody holds it, nothing in it is worth keeping
        held      ref_count > 0
        reusable  ref_count == 0, but someone named it: its content may be wanted again
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._named = [False] * num_blocks
        # A stack whose top is the lowest id at first, so that a sequence gets neighbours.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._reusable: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks in state free."""
        return len(self._free)

    @property
    def num_reusable(self) -> int:
        """Blocks in state reusable."""
        return len(self._reusable)

    @property
    def num_held(self) -> int:
        """Blocks in state held."""
        return self.num_blocks - len(self._free) - len(self._reusable)

    def ref_count(self, block_id: int) -> int:
        """How many hold the block."""
        return self._ref_counts[block_id]

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` free blocks, or none at all: `None` means "not now"."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        for block_id in taken:
            self._ref_counts[block_id] = 1
        return taken

    def hold(self, block_ids: Sequence[int]) -> None:
        """Add one hold on each; a reusable block becomes held. Holding a free block is a bug, and asserts."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                assert block_id in self._reusable, f"block {block_id} is free: its content is gone"
                del self._reusable[block_id]
            self._ref_counts[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one hold on each. Releasing an unheld block is a bug, and asserts."""
        for block_id in reversed(block_ids):
            assert self._ref_counts[block_id] > 0, f"block {block_id} is not held"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] > 0:
                continue
            if self._named[block_id]:
                self._reusable[block_id] = None
            else:
                self._free.append(block_id)

    def name(self, block_id: int) -> None:
        """Keep the block's content when its last hold goes. Naming an unheld block is a bug, and asserts."""
        assert self._ref_counts[block_id] > 0, f"block {block_id} is not held"
        self._named[block_id] = True

    def forget(self, block_id: int) -> None:
        """Undo `name`; a reusable block becomes free."""
        assert self._named[block_id], f"block {block_id} has no name"
        self._named[block_id] = False
        if block_id in self._reusable:
            del self._reusable[block_id]
            self._free.append(block_id)

    def oldest_reusable(self) -> int | None:
        """The reusable block that was released longest ago, if any."""
        return next(iter(self._reusable), None)

    def check(self, live_tables: Iterable[Sequence[int]]) -> None:
        """Prove that the three states partition the pool and that the holds are those of the live tables."""
        holds = [0] * self.num_blocks
        for table in live_tables:
            assert len(set(table)) == len(table), f"a table names a block twice: {table}"
            for block_id in table:
                holds[block_id] += 1
        free, reusable = set(self._free), set(self._reusable)
        assert len(free) == len(self._free), "a block is free twice"
        for block_id in range(self.num_blocks):
            count = self._ref_counts[block_id]
            assert count == holds[block_id], f"block {block_id}: ref_count {count}, {holds[block_id]} live tables"
            states = (block_id in free) + (block_id in reusable) + (count > 0)
            assert states == 1, f"block {block_id} is in {states} states"
            assert (block_id in reusable) == (count == 0 and self._named[block_id]), f"block {block_id}: wrong state"
