"""The pool of blocks: states, refusals, neighbours, idle superblocks, and any order of calls against a plain model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvik.cache import BlockPool
from tiers import examples

pytestmark = pytest.mark.tiny


def test_all_blocks_are_free_at_first() -> None:
    pool = BlockPool(5)
    assert (pool.num_free, pool.num_held, pool.num_reusable) == (5, 0, 0)
    assert pool.oldest_reusable() is None
    pool.check([])


def test_an_empty_pool_has_nothing() -> None:
    pool = BlockPool(0)
    assert pool.allocate(0) == []
    assert pool.allocate(1) is None
    assert pool.take_idle(0) == []
    pool.check([])


def test_a_sequence_gets_neighbours_and_each_its_own_superblock() -> None:
    pool = BlockPool(24)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(2) == [8, 9]
    assert pool.allocate(2, after=2) == [3, 4]
    assert pool.allocate(5, after=4) == [5, 6, 7, 16, 17], "a superblock ends, another begins"
    assert pool.allocate(1, after=9) == [10]
    pool.check([[0, 1, 2, 3, 4, 5, 6, 7, 16, 17], [8, 9, 10]])


def test_a_neighbour_that_is_not_free_is_passed_over() -> None:
    pool = BlockPool(16)
    pool.allocate(3)
    pool.release([1])
    assert pool.allocate(1, after=1 - 1) == [1]
    assert pool.allocate(1, after=1) == [8], "block 2 is held"


def test_broken_superblocks_are_used_when_no_idle_one_is_left() -> None:
    pool = BlockPool(20)
    assert pool.allocate(20) == list(range(20))
    pool.release([1, 13, 18])
    taken = pool.allocate(3)
    assert taken is not None
    assert sorted(taken) == [1, 13, 18]
    pool.release(range(16, 20))
    pool.release([5])
    assert pool.allocate(5) == [16, 17, 18, 19, 5], "the last superblock is shorter, and idle all the same"
    pool.check([list(range(20))])


def test_the_newest_idle_superblock_is_used_first_and_an_untouched_one_last() -> None:
    pool = BlockPool(40)
    for superblock in range(4):
        assert pool.allocate(8) == list(range(8 * superblock, 8 * superblock + 8))
    pool.release(range(16, 24))
    pool.release(range(8))
    assert pool.allocate(1) == [0]
    assert pool.allocate(1) == [16]
    assert pool.allocate(1) == [32]
    assert pool.num_committed == 40


def test_memory_is_committed_when_taken_and_given_back_when_idle_for_long() -> None:
    pool = BlockPool(20)
    assert pool.num_committed == 0
    pool.allocate(1)
    assert pool.num_committed == 8
    pool.allocate(1, after=0)
    assert pool.num_committed == 8
    assert pool.allocate(12) == [*range(8, 16), *range(16, 20)]
    assert pool.num_committed == 20, "the last superblock has four blocks"
    pool.tick()
    pool.release(range(16, 20))
    pool.tick()
    pool.release(range(8, 15))
    assert pool.take_idle(2) == []
    assert pool.take_idle(1) == [2]
    assert pool.num_committed == 16
    assert pool.take_idle(0) == [], "one block of superblock 1 is still held"
    pool.release([15])
    assert pool.num_committed == 16
    pool.check([[0, 1]])
    assert pool.take_idle(1) == []
    assert pool.take_idle(0) == [1]
    assert pool.take_idle(0) == []
    assert pool.num_committed == 8
    pool.check([[0, 1]])
    assert pool.allocate(1) == [8]
    assert pool.num_committed == 16


def test_a_superblock_that_is_used_again_is_as_young_as_its_last_use() -> None:
    pool = BlockPool(16)
    pool.allocate(8)
    pool.allocate(8)
    pool.release(range(8))
    pool.tick()
    pool.release(range(8, 16))
    assert pool.allocate(1) == [8]
    pool.tick()
    pool.release([8])
    assert pool.take_idle(1) == [0]
    assert pool.take_idle(1) == []
    pool.tick()
    assert pool.take_idle(1) == [1]


def test_a_superblock_with_a_reusable_block_is_not_idle() -> None:
    pool = BlockPool(8)
    pool.allocate(2)
    pool.name(1)
    pool.release([0, 1])
    assert pool.take_idle(0) == []
    pool.forget(1)
    assert pool.take_idle(0) == [0]


def test_all_or_none() -> None:
    pool = BlockPool(3)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert pool.allocate(0) == []
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(1) is None
    pool.check([[0, 1, 2]])


def test_a_block_is_free_when_its_last_hold_goes() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    pool.hold([0])
    assert pool.ref_count(0) == 2
    pool.check([[0], [0]])
    pool.release([0])
    assert (pool.num_held, pool.ref_count(0)) == (1, 1)
    pool.release([0])
    assert pool.num_free == 2


def test_a_named_block_stays_reusable_until_it_is_forgotten() -> None:
    pool = BlockPool(2)
    pool.allocate(2)
    pool.name(0)
    pool.release([0, 1])
    assert (pool.num_free, pool.num_held, pool.num_reusable) == (1, 0, 1)
    assert pool.allocate(2) is None, "a reusable block is not given away"
    pool.hold([0])
    assert (pool.num_held, pool.num_reusable) == (1, 0)
    pool.release([0])
    pool.forget(0)
    assert pool.num_free == 2
    pool.check([])


def test_a_held_block_may_be_forgotten() -> None:
    pool = BlockPool(1)
    pool.allocate(1)
    pool.name(0)
    pool.forget(0)
    assert pool.num_held == 1
    pool.release([0])
    assert pool.num_free == 1


def test_the_oldest_reusable_block_was_released_first() -> None:
    pool = BlockPool(4)
    pool.allocate(4)
    for block_id in range(4):
        pool.name(block_id)
    pool.release([2])
    pool.release([0, 3])  # the end of a table first: what lies behind it is of no use without it
    assert pool.oldest_reusable() == 2
    pool.hold([2])
    assert pool.oldest_reusable() == 3
    pool.release([2])
    pool.forget(3)
    assert pool.oldest_reusable() == 0


def reusable(pool: BlockPool) -> None:
    pool.allocate(1)
    pool.name(0)
    pool.release([0])


@pytest.mark.parametrize(
    ("prepare", "act"),
    [
        (lambda pool: None, lambda pool: pool.release([0])),
        (lambda pool: None, lambda pool: pool.hold([0])),
        (lambda pool: None, lambda pool: pool.name(0)),
        (lambda pool: None, lambda pool: pool.forget(0)),
        (lambda pool: pool.allocate(1), lambda pool: pool.release([0, 0])),
        (lambda pool: pool.allocate(1), lambda pool: pool.hold([0, 1])),
        (lambda pool: pool.allocate(1), lambda pool: pool.forget(0)),
        (reusable, lambda pool: pool.release([0])),
        (reusable, lambda pool: pool.name(0)),
    ],
)
def test_misuse_is_an_assertion(prepare: Callable[[BlockPool], object], act: Callable[[BlockPool], object]) -> None:
    pool = BlockPool(2)
    prepare(pool)
    with pytest.raises(AssertionError, match="block"):
        act(pool)


@pytest.mark.parametrize("tables", [[], [[0]], [[0, 1], [1]], [[0, 0]], [[0, 2]], [[1], [2]]])
def test_check_refuses_tables_that_are_not_those_held(tables: list[list[int]]) -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    pool.check([[0, 1]])
    with pytest.raises(AssertionError):
        pool.check(tables)


HARM: list[Callable[[BlockPool], object]] = [
    lambda pool: pool._ref_counts.__setitem__(0, 2),
    lambda pool: pool._named.__setitem__(9, False),
    lambda pool: pool._reusable.update({3: None}),
    lambda pool: pool._reusable.pop(9),
    lambda pool: pool._is_free.__setitem__(0, True),
    lambda pool: pool._is_free.__setitem__(3, False),
    lambda pool: setattr(pool, "num_free", pool.num_free + 1),
    lambda pool: pool._free_counts.__setitem__(slice(0, 2), [5, 8]),
    lambda pool: pool._idle.pop(2),
    lambda pool: pool._idle.update({0: 0}),
    lambda pool: pool._idle.update({2: 9}),
    lambda pool: pool._untouched.update({2: None}),
    lambda pool: pool._untouched.popitem(),
    lambda pool: pool._broken.pop(0),
    lambda pool: pool._broken.update({2: None}),
    lambda pool: setattr(pool, "num_committed", 24),
]


@pytest.mark.parametrize("harm", HARM)
def test_check_finds_corruption(harm: Callable[[BlockPool], object]) -> None:
    """One superblock is in use, one has a reusable block, two are idle, one is untouched."""
    pool = BlockPool(40)
    table = pool.allocate(3)
    other = pool.allocate(2)
    assert table == [0, 1, 2]
    assert other == [8, 9]
    for superblock in (2, 3):
        assert pool.allocate(8) == list(range(8 * superblock, 8 * superblock + 8))
    pool.release(range(16, 24))
    pool.tick()
    pool.release(range(24, 32))
    pool.name(9)
    pool.release(other)
    pool.check([table])
    harm(pool)
    with pytest.raises(AssertionError):
        pool.check([table])


class PoolMachine(RuleBasedStateMachine):
    """Sequences that take, share, name and give back blocks, and an owner of names that forgets some."""

    NUM_BLOCKS = 19

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.NUM_BLOCKS)
        self.tables: list[list[int]] = []
        self.named: set[int] = set()
        self.released: list[int] = []  # reusable blocks, oldest first
        self.clock = 0
        self.idle_since: dict[int, int] = {}  # idle superblocks that are committed
        self.committed: set[int] = set()

    def held(self) -> set[int]:
        return {block_id for table in self.tables for block_id in table}

    @rule(count=st.integers(0, 6) | st.integers(0, NUM_BLOCKS + 1), data=st.data())
    def allocate(self, count: int, data: st.DataObject) -> None:
        num_free = self.NUM_BLOCKS - len(self.held() | self.named)
        after = data.draw(st.none() | st.sampled_from(sorted(self.held()))) if self.held() else None
        blocks = self.pool.allocate(count, after)
        if count > num_free:
            assert blocks is None
            return
        assert blocks is not None
        assert len(set(blocks)) == count
        assert not set(blocks) & (self.held() | self.named)
        if after is not None and blocks and (after + 1) % 8 and after + 1 not in {*self.held(), *self.named, 19}:
            assert blocks[0] == after + 1
        self.committed.update(block_id // 8 for block_id in blocks)
        self.tables.append(blocks)

    @precondition(lambda self: self.held() | self.named)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        """Another sequence with blocks that are held or reusable."""
        table = data.draw(st.lists(st.sampled_from(sorted(self.held() | self.named)), unique=True))
        self.pool.hold(table)
        self.tables.append(table)
        self.released = [block_id for block_id in self.released if block_id not in table]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """A sequence ends, or gives back the end of its table."""
        table = data.draw(st.sampled_from(self.tables))
        kept = data.draw(st.integers(0, len(table)))
        dropped = table[kept:]
        self.pool.release(dropped)
        del table[kept:]
        if not kept:
            self.tables = [other for other in self.tables if other is not table]
        self.released += [block for block in reversed(dropped) if block in self.named and block not in self.held()]

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def name(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.held())))
        self.pool.name(block_id)
        self.named.add(block_id)

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.named)))
        self.pool.forget(block_id)
        self.named.remove(block_id)
        self.released = [other for other in self.released if other != block_id]

    @rule()
    def tick(self) -> None:
        self.pool.tick()
        self.clock += 1

    @rule(age=st.integers(0, 3))
    def take_idle(self, age: int) -> None:
        old = {superblock for superblock, since in self.idle_since.items() if self.clock - since >= age}
        assert set(self.pool.take_idle(age)) == old
        self.committed -= old
        for superblock in old:
            del self.idle_since[superblock]

    @invariant()
    def idle_superblocks_are_known(self) -> None:
        for superblock in range(3):
            blocks = set(range(8 * superblock, min(8 * superblock + 8, self.NUM_BLOCKS)))
            if blocks & (self.held() | self.named):
                self.idle_since.pop(superblock, None)
            elif superblock in self.committed:
                self.idle_since.setdefault(superblock, self.clock)
        assert self.pool.num_committed == sum(3 if superblock == 2 else 8 for superblock in self.committed)

    @invariant()
    def agrees(self) -> None:
        self.pool.check(self.tables)
        held = self.held()
        assert self.pool.num_held == len(held)
        assert self.pool.num_reusable == len(self.named - held) == len(self.released)
        assert self.pool.num_free == self.NUM_BLOCKS - len(held | self.named)
        assert self.pool.oldest_reusable() == (self.released[0] if self.released else None)
        for block_id in range(self.NUM_BLOCKS):
            assert self.pool.ref_count(block_id) == sum(table.count(block_id) for table in self.tables)


PoolMachine.TestCase.settings = settings(max_examples=examples(100), stateful_step_count=40)
TestPool = PoolMachine.TestCase
