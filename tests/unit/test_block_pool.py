"""The pool of blocks: its three states, its refusals, and any order of calls against a dict of states."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvik.cache import BlockPool


def test_all_blocks_are_free_at_first() -> None:
    pool = BlockPool(5)
    assert (pool.num_free, pool.num_held, pool.num_reusable) == (5, 0, 0)
    assert pool.oldest_reusable() is None
    pool.check([])


def test_a_sequence_gets_neighbours() -> None:
    pool = BlockPool(10)
    assert pool.allocate(4) == [0, 1, 2, 3]
    assert pool.allocate(2) == [4, 5]
    pool.release([0, 1, 2, 3])
    assert pool.allocate(4) == [0, 1, 2, 3]


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


class PoolMachine(RuleBasedStateMachine):
    """Sequences that take, share, name and give back blocks, and an owner of names that forgets some."""

    NUM_BLOCKS = 7

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.NUM_BLOCKS)
        self.tables: list[list[int]] = []
        self.named: set[int] = set()
        self.released: list[int] = []  # reusable blocks, oldest first

    def held(self) -> set[int]:
        return {block_id for table in self.tables for block_id in table}

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count: int) -> None:
        num_free = self.NUM_BLOCKS - len(self.held() | self.named)
        blocks = self.pool.allocate(count)
        if count > num_free:
            assert blocks is None
            return
        assert blocks is not None
        assert len(set(blocks)) == count
        assert not set(blocks) & (self.held() | self.named)
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


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase
