"""Say who holds each block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvik.cache.spec import BLOCKS_PER_SUPERBLOCK


class BlockPool:
    """The accounting of `num_blocks` blocks. Holds no arrays; every call costs O(1) a block.

    Every block is in exactly one state:
        free      nobody holds it, nothing in it is worth keeping
        held      ref_count > 0
        reusable  ref_count == 0, but someone named it: its content may be wanted again

    A superblock, 8 blocks that lie together in memory, is *idle* when all of its blocks are free: its memory can be
    given back. The pool counts as committed every superblock that was allocated from since it was last given back.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._named = [False] * num_blocks
        self._reusable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._is_free = [True] * num_blocks
        self.num_free = num_blocks
        starts = range(0, num_blocks, BLOCKS_PER_SUPERBLOCK)
        self._sizes = [min(BLOCKS_PER_SUPERBLOCK, num_blocks - start) for start in starts]
        self._free_counts = list(self._sizes)  # free blocks of each superblock
        # Idle and not committed, at first the lowest on top.
        self._untouched: dict[int, None] = dict.fromkeys(reversed(range(len(self._sizes))))
        self._idle: OrderedDict[int, int] = OrderedDict()  # idle and committed: the clock when it became so
        self._broken: dict[int, None] = {}  # some blocks free, others not
        self._clock = 0
        self.num_committed = 0  # blocks whose memory may have been written since it was last given back
        self.changed: set[int] | None = None  # whose holds or state have changed, noted where somebody watches

    @property
    def num_reusable(self) -> int:
        """Blocks in state reusable."""
        return len(self._reusable)

    @property
    def num_held(self) -> int:
        """Blocks in state held."""
        return self.num_blocks - self.num_free - len(self._reusable)

    @property
    def num_available(self) -> int:
        """Blocks that can be had: the free ones, and the reusable ones once their content is given up."""
        return self.num_free + len(self._reusable)

    def ref_count(self, block_id: int) -> int:
        """How many hold the block."""
        return self._ref_counts[block_id]

    def is_named(self, block_id: int) -> bool:
        """Whether the block's content is to be kept when nobody holds it."""
        return self._named[block_id]

    def is_free(self, block_id: int) -> bool:
        """Whether nobody holds the block and nothing in it is worth keeping."""
        return self._is_free[block_id]

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """Take `count` free blocks, or none at all: `None` means "not now".

        They are neighbours where that can be, the first one the neighbour of `after`, a held block.
        """
        if count > self.num_free:
            return None
        taken: list[int] = []
        for _ in range(count):
            after = self.next_free(after)
            self._take(after)
            taken.append(after)
        self._note(taken)
        return taken

    def hold(self, block_ids: Sequence[int]) -> None:
        """Add one hold on each; a reusable block becomes held. Holding a free block is a bug, and asserts."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                assert block_id in self._reusable, f"block {block_id} is free: its content is gone"
                del self._reusable[block_id]
            self._ref_counts[block_id] += 1
        self._note(block_ids)

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one hold on each, the last one first. Releasing an unheld block is a bug, and asserts.

        So the end of a sequence is older than its beginning, which others may share.
        """
        for block_id in reversed(block_ids):
            assert self._ref_counts[block_id] > 0, f"block {block_id} is not held"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] > 0:
                continue
            if self._named[block_id]:
                self._reusable[block_id] = None
            else:
                self._put_back(block_id)
        self._note(block_ids)

    def name(self, block_id: int) -> None:
        """Keep the block's content when its last hold goes. Naming an unheld block is a bug, and asserts."""
        assert self._ref_counts[block_id] > 0, f"block {block_id} is not held"
        self._named[block_id] = True
        self._note((block_id,))

    def forget(self, block_id: int) -> None:
        """Undo `name`; a reusable block becomes free."""
        assert self._named[block_id], f"block {block_id} has no name"
        self._named[block_id] = False
        if block_id in self._reusable:
            del self._reusable[block_id]
            self._put_back(block_id)
        self._note((block_id,))

    def oldest_reusable(self) -> int | None:
        """The reusable block that was released longest ago, if any."""
        return next(iter(self._reusable), None)

    def num_evicted_before(self, block_id: int) -> int:
        """Reusable blocks that were released before this reusable one; it takes time for each of them."""
        return next(at for at, other in enumerate(self._reusable) if other == block_id)

    def tick(self) -> None:
        """Let time pass, for `take_idle`."""
        self._clock += 1

    def take_idle(self, age: int, max_kept: int | None = None) -> list[int]:
        """Committed superblocks that have been idle for `age` ticks, and the oldest of those above `max_kept`.

        From now on they count as not committed.
        """
        taken = []
        while self._idle:
            superblock, since = next(iter(self._idle.items()))
            if self._clock - since < age and (max_kept is None or len(self._idle) <= max_kept):
                break
            del self._idle[superblock]
            self._untouched[superblock] = None
            self.num_committed -= self._sizes[superblock]
            taken.append(superblock)
        return taken

    def check(self, live_tables: Iterable[Sequence[int]]) -> None:
        """Prove that the three states partition the pool and that the holds are those of the live tables."""
        holds = [0] * self.num_blocks
        for table in live_tables:
            assert len(set(table)) == len(table), f"a table names a block twice: {table}"
            for block_id in table:
                holds[block_id] += 1
        reusable = set(self._reusable)
        for block_id in range(self.num_blocks):
            count = self._ref_counts[block_id]
            assert count == holds[block_id], f"block {block_id}: ref_count {count}, {holds[block_id]} live tables"
            states = self._is_free[block_id] + (block_id in reusable) + (count > 0)
            assert states == 1, f"block {block_id} is in {states} states"
            assert (block_id in reusable) == (count == 0 and self._named[block_id]), f"block {block_id}: wrong state"
        assert self.num_free == sum(self._is_free) == sum(self._free_counts), "free blocks are miscounted"
        self._check_superblocks()

    def _check_superblocks(self) -> None:
        since = list(self._idle.values())
        assert since == sorted(since), "idle superblocks are out of order"
        for superblock, size in enumerate(self._sizes):
            start, count = superblock * BLOCKS_PER_SUPERBLOCK, self._free_counts[superblock]
            assert count == sum(self._is_free[start : start + size]), f"superblock {superblock} is miscounted"
            idle = (superblock in self._idle) + (superblock in self._untouched)
            assert idle == (count == size), f"superblock {superblock} of {count} free blocks is idle {idle} times"
            assert (superblock in self._broken) == (0 < count < size), f"superblock {superblock}: wrong list"
        committed = self.num_blocks - sum(self._sizes[superblock] for superblock in self._untouched)
        assert self.num_committed == committed, "committed blocks are miscounted"

    def next_free(self, after: int | None) -> int:
        """The free block to take next; there is one."""
        if after is not None:
            neighbour = after + 1
            if neighbour % BLOCKS_PER_SUPERBLOCK and neighbour < self.num_blocks and self._is_free[neighbour]:
                return neighbour
        if self._idle:  # the newest: the likeliest to lie in the processor's caches
            return next(reversed(self._idle)) * BLOCKS_PER_SUPERBLOCK
        if self._untouched:
            return next(reversed(self._untouched)) * BLOCKS_PER_SUPERBLOCK
        superblock = next(reversed(self._broken))
        return self._is_free.index(True, superblock * BLOCKS_PER_SUPERBLOCK)

    def _note(self, block_ids: Sequence[int]) -> None:
        if self.changed is not None:
            self.changed.update(block_ids)

    def _take(self, block_id: int) -> None:
        superblock = block_id // BLOCKS_PER_SUPERBLOCK
        if self._free_counts[superblock] == self._sizes[superblock]:
            if superblock in self._idle:
                del self._idle[superblock]
            else:
                del self._untouched[superblock]
                self.num_committed += self._sizes[superblock]
            self._broken[superblock] = None
        self._free_counts[superblock] -= 1
        if self._free_counts[superblock] == 0:
            del self._broken[superblock]
        self._is_free[block_id] = False
        self._ref_counts[block_id] = 1
        self.num_free -= 1

    def _put_back(self, block_id: int) -> None:
        superblock = block_id // BLOCKS_PER_SUPERBLOCK
        self._is_free[block_id] = True
        self.num_free += 1
        self._free_counts[superblock] += 1
        if self._free_counts[superblock] == self._sizes[superblock]:
            self._broken.pop(superblock, None)
            self._idle[superblock] = self._clock
        else:
            self._broken[superblock] = None
