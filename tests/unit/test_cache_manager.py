"""Blocks of sequences through their life: found, copied before they are written, sealed, shared, evicted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvik.cache import BlockCopy, BlockTable, CacheManager, KVCacheSpec, MissReason, packed

pytestmark = pytest.mark.tiny

SIZE = 4


def manager(num_blocks: int, *, prefix_cache: bool = True) -> CacheManager:
    spec = KVCacheSpec.uniform(num_layers=2, num_kv_heads=1, head_dim=8, dtype="f16", block_size=SIZE)
    return CacheManager(spec, spec.pool_size_for(num_blocks, 1, 1), prefix_cache=prefix_cache)


def run(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def compute(cache: CacheManager, table: BlockTable, tokens: Sequence[int], num_computed: int) -> list[BlockCopy]:
    """A step over all tokens that are not computed."""
    copies = cache.reserve(table, len(tokens), num_computed)
    assert copies is not None
    cache.end_copies()
    cache.seal(table, tokens, len(tokens))
    return copies


def start(cache: CacheManager, tokens: Sequence[int], salt: str | None = None) -> BlockTable:
    """A sequence that is found as far as may be, and computed to its end."""
    table = cache.new_table(salt)
    compute(cache, table, tokens, cache.adopt(table, tokens, cache.match(tokens, salt)))
    return table


def fill(cache: CacheManager, tokens: Sequence[int], salt: str | None = None) -> None:
    """Leave the tokens' whole blocks in the tree, with nobody who holds them."""
    cache.release(start(cache, tokens, salt))


def num_cached(cache: CacheManager, tokens: Sequence[int], salt: str | None = None) -> int:
    return cache.match(tokens, salt).num_cached_tokens


def test_a_sequence_from_its_first_token_to_its_last() -> None:
    cache = manager(8)
    tokens = run(0, 10)
    table = cache.new_table()
    assert cache.adopt(table, tokens, cache.match(tokens)) == 0
    assert cache.num_missing(table, 10) == 3
    assert cache.reserve(table, 6, 0) == []
    assert (len(table.block_ids), table.num_sealed, cache.num_missing(table, 10)) == (2, 0, 1)
    cache.seal(table, tokens, 6)
    assert (table.num_sealed, len(cache.tree)) == (1, 1)
    assert cache.reserve(table, 10, 6) == []
    cache.seal(table, tokens, 10)
    assert (table.num_sealed, len(cache.tree)) == (2, 2)
    assert cache.reserve(table, 10, 10) == [], "nothing is missing"
    assert table.block_ids == [0, 1, 2]
    cache.check([table])
    cache.release(table)
    assert (table.block_ids, table.num_sealed) == ([], 0)
    assert (cache.pool.num_held, cache.pool.num_reusable) == (0, 2)
    cache.check([])


def end(cache: CacheManager, table: BlockTable, tokens: Sequence[int]) -> None:
    """The sequence is over."""
    cache.keep_end(table, tokens, len(tokens))
    cache.release(table)


def test_the_block_in_which_a_sequence_ended_is_found() -> None:
    cache = manager(8)
    end(cache, start(cache, run(0, 6)), run(0, 6))
    assert (cache.pool.num_held, cache.pool.num_reusable, len(cache.tree)) == (0, 2, 2)
    tokens = run(0, 9)
    table = cache.new_table()
    assert cache.adopt(table, tokens, cache.match(tokens)) == 6
    assert cache.reserve(table, 9, 6) == [BlockCopy(1, 2)], "who goes on writes into a copy"
    cache.check([table])
    cache.end_copies()
    cache.seal(table, tokens, 9)
    assert (cache.pool.num_free, len(cache.tree)) == (5, 2), "nobody needs the open block any more"
    cache.check([table])
    end(cache, table, tokens)
    assert num_cached(cache, run(0, 20)) == 9
    assert cache.stats.num_evicted_blocks == 0
    cache.check([])


def test_of_ends_behind_the_same_path_the_longest_is_kept() -> None:
    cache = manager(16)
    for length, num_reusable in ((5, 2), (7, 2), (6, 2), (8, 2), (7, 2)):
        table = start(cache, run(0, length))
        end(cache, table, run(0, length))
        assert (cache.pool.num_held, cache.pool.num_reusable) == (0, num_reusable), length
        cache.check([])
    end(cache, start(cache, [0, 1, 2, 3, 9]), [0, 1, 2, 3, 9])
    assert cache.pool.num_reusable == 3
    assert [num_cached(cache, [*run(0, 4), *rest]) for rest in ([9, 9], [4, 9], [8, 8])] == [5, 5, 4]


def test_an_end_that_others_hold_is_theirs_when_it_is_needless() -> None:
    cache = manager(8)
    first = start(cache, run(0, 6))
    hold = cache.keep(first, packed(run(0, 6)))
    end(cache, first, run(0, 6))
    assert hold.table.block_ids == [0, 1]
    assert cache.pool.is_named(1)
    second = start(cache, run(0, 8))
    assert not cache.pool.is_named(1)
    cache.check([second])
    cache.let_go(hold)
    assert cache.pool.is_free(1)
    cache.check([second])


def test_an_end_is_evicted_before_the_path_to_it() -> None:
    cache = manager(3)
    end(cache, start(cache, run(0, 6)), run(0, 6))
    table = start(cache, run(50, 8))
    assert num_cached(cache, run(0, 9)) == 4
    cache.check([table])


def test_the_end_of_nothing_is_nothing() -> None:
    cache = manager(8)
    end(cache, cache.new_table(), [])
    with_room = start(cache, run(0, 8))
    assert cache.reserve(with_room, 11, 8) == []
    end(cache, with_room, run(0, 8))
    assert (cache.pool.num_reusable, cache.pool.num_held) == (2, 0), "room that nothing was written to is given back"
    off = manager(8, prefix_cache=False)
    end(off, start(off, run(0, 6)), run(0, 6))
    assert off.pool.num_free == 8


def test_the_last_token_is_always_computed() -> None:
    cache = manager(8)
    fill(cache, run(0, 8))
    found = cache.match(run(0, 8))
    assert (found.num_tokens, found.num_cached_tokens, found.miss_reason) == (4, 7, MissReason.ALL)
    assert num_cached(cache, run(0, 9)) == 8
    assert num_cached(cache, [0]) == 0
    assert num_cached(cache, []) == 0


def test_what_is_found_is_shared() -> None:
    cache = manager(16)
    first = start(cache, run(0, 12))
    tokens = run(0, 8) + run(50, 6)
    second = start(cache, tokens)
    assert second.block_ids[:2] == first.block_ids[:2]
    assert [cache.pool.ref_count(block_id) for block_id in first.block_ids] == [2, 2, 1]
    assert second.block_ids[2] != first.block_ids[2]
    cache.check([first, second])


def test_a_tail_is_copied_before_it_is_written() -> None:
    cache = manager(8)
    fill(cache, run(0, 8))
    tokens = [*run(0, 6), 99, 98]
    table = cache.new_table()
    assert cache.adopt(table, tokens, cache.match(tokens)) == 6
    assert (table.block_ids, table.num_sealed) == ([0, 1], 1)
    copies = cache.reserve(table, 8, 6)
    assert copies == [BlockCopy(1, 2)]
    assert table.block_ids == [0, 2]
    assert cache.pool.ref_count(1) == 1, "held until it is copied"
    cache.check([table])
    cache.end_copies()
    assert cache.pool.ref_count(1) == 0
    cache.end_copies()
    cache.seal(table, tokens, 8)
    assert num_cached(cache, [*tokens, 1]) == num_cached(cache, run(0, 9)) == 8
    assert cache.stats.num_copied_blocks == 1
    cache.check([table])


def test_a_tail_may_be_copied_and_more_be_taken_at_once() -> None:
    cache = manager(8)
    fill(cache, run(0, 4))
    tokens = [0, 1, *run(50, 9)]
    table = cache.new_table()
    cache.adopt(table, tokens, cache.match(tokens))
    assert cache.reserve(table, 11, 2) == [BlockCopy(0, 1)]
    assert table.block_ids == [1, 2, 3]
    cache.check([table])


def test_one_who_leaves_before_the_copy_is_made_leaves_the_tree_in_order() -> None:
    """The source is held on until the copy is made; so are the blocks before it, or one of them would be older."""
    cache = manager(5)
    fill(cache, run(0, 12))
    tokens = [*run(0, 10), 99]
    table = cache.new_table()
    cache.adopt(table, tokens, cache.match(tokens))
    assert cache.reserve(table, 11, 10) == [BlockCopy(2, 3)]
    cache.release(table)
    cache.check([])
    other = cache.new_table()
    assert cache.reserve(other, 3 * SIZE, 0) is None, "three blocks are held for the copy"
    cache.end_copies()
    assert cache.reserve(other, 4 * SIZE, 0) == []
    assert num_cached(cache, run(0, 12)) == 4
    cache.check([other])


def test_where_no_copy_fits_the_block_itself_leaves_the_tree() -> None:
    cache = manager(3)
    fill(cache, run(0, 12))
    tokens = [*run(0, 2), *run(50, 10)]
    table = cache.new_table()
    assert cache.num_blocks_within_reach(cache.match(tokens)) == 3
    assert cache.adopt(table, tokens, cache.match(tokens)) == 2
    assert cache.reserve(table, 12, 2) == [], "the first block is written where it lies"
    assert table.block_ids[0] == 0
    assert len(cache.tree) == 0
    assert cache.match(run(0, 5)).miss_reason is MissReason.EVICTED
    cache.check([table])
    cache.seal(table, tokens, 12)
    assert num_cached(cache, [*tokens, 1]) == 12


def test_where_no_copy_fits_and_others_hold_the_block_it_is_shortage() -> None:
    cache = manager(3)
    first = start(cache, run(0, 4))
    tokens = [*run(0, 2), *run(50, 10)]
    table = cache.new_table()
    cache.adopt(table, tokens, cache.match(tokens))
    assert cache.reserve(table, 12, 2) is None
    assert table.block_ids == [0]
    assert cache.reserve(table, 8, 2) == [BlockCopy(0, 1)]
    cache.check([first, table])


def test_shortage_is_none_and_changes_nothing() -> None:
    cache = manager(4)
    fill(cache, run(0, 8))
    table = start(cache, run(20, 5))
    before = (list(table.block_ids), cache.pool.num_free, cache.pool.num_reusable, len(cache.tree), cache.stats)
    assert cache.reserve(table, 17, 5) is None
    assert (list(table.block_ids), cache.pool.num_free, cache.pool.num_reusable, len(cache.tree), cache.stats) == before
    cache.check([table])
    assert cache.reserve(table, 16, 5) == []
    assert cache.stats.num_evicted_blocks == 2
    cache.check([table])


def test_two_that_compute_the_same_block_end_up_with_one() -> None:
    cache = manager(8)
    tokens = run(0, 9)
    first, second = cache.new_table(), cache.new_table()
    for table in (first, second):
        cache.adopt(table, tokens, cache.match(tokens))
        assert cache.reserve(table, 9, 0) == []
    assert not set(first.block_ids) & set(second.block_ids)
    own = second.block_ids[2]
    cache.seal(first, tokens, 9)
    cache.seal(second, tokens, 9)
    assert second.block_ids == [*first.block_ids[:2], own]
    assert cache.pool.num_held == 4
    assert len(cache.tree) == 2
    cache.check([first, second])


def test_one_may_go_on_from_a_block_that_it_took_over() -> None:
    cache = manager(8)
    first, second = cache.new_table(), cache.new_table()
    theirs, mine = run(0, 8), run(0, 4) + run(50, 4)
    for table in (first, second):
        cache.reserve(table, 8, 0)
    cache.seal(first, theirs, 8)
    cache.seal(second, mine, 8)
    assert second.block_ids[0] == first.block_ids[0]
    assert second.block_ids[1] != first.block_ids[1]
    assert num_cached(cache, [*mine, 1]) == num_cached(cache, [*theirs, 1]) == 8
    cache.check([first, second])


def test_the_end_of_what_was_used_longest_ago_is_evicted_first() -> None:
    cache = manager(6)
    fill(cache, run(0, 12))
    fill(cache, run(100, 12))
    fill(cache, run(0, 8))  # uses the first two blocks again
    found = []
    table = cache.new_table()
    for num_blocks in range(1, 7):
        assert cache.reserve(table, num_blocks * SIZE, 0) == []
        found.append((num_cached(cache, run(0, 13)), num_cached(cache, run(100, 13))))
        cache.check([table])
    assert found == [(8, 12), (8, 8), (8, 4), (8, 0), (4, 0), (0, 0)]
    assert cache.stats.num_evicted_blocks == 6
    assert cache.match(run(0, 13)).miss_reason is MissReason.EVICTED


def test_a_held_path_is_never_evicted() -> None:
    cache = manager(4)
    holder = start(cache, run(0, 8))
    fill(cache, run(0, 12))
    table = cache.new_table()
    assert cache.reserve(table, 3 * SIZE, 0) is None
    assert cache.reserve(table, 2 * SIZE, 0) == []
    assert num_cached(cache, run(0, 13)) == 8
    cache.check([holder, table])


def test_nothing_is_shared_between_salts() -> None:
    cache = manager(16)
    tokens = run(0, 9)
    tables = [start(cache, tokens, salt) for salt in (None, "a", "b")]
    assert len({block_id for table in tables for block_id in table.block_ids}) == 9
    assert cache.match(tokens, "c").miss_reason is MissReason.OTHER_SALT
    assert num_cached(cache, tokens, "a") == 8
    cache.check(tables)
    with pytest.raises(AssertionError, match="another namespace"):
        cache.adopt(cache.new_table("a"), tokens, cache.match(tokens, "b"))


@pytest.mark.parametrize("writes_first", [0, 1])
def test_of_a_fork_whoever_writes_first_gets_a_copy(writes_first: int) -> None:
    cache = manager(8)
    tokens = run(0, 6)
    parent = start(cache, tokens)
    child = cache.fork(parent, 6)
    assert child.block_ids == parent.block_ids
    assert child.num_sealed == 1
    cache.check([parent, child])
    one, two = [(parent, child), (child, parent)][writes_first]
    assert compute(cache, one, [*tokens, 50], 6) == [BlockCopy(1, 2)]
    assert compute(cache, two, [*tokens, 60], 6) == [], "it is its own by now"
    assert (one.block_ids, two.block_ids) == ([0, 2], [0, 1])
    cache.check([parent, child])


def test_forks_that_write_in_one_step_all_leave_the_block_as_it_is() -> None:
    cache = manager(8)
    parent = start(cache, run(0, 2))
    child = cache.fork(parent, 2)
    assert cache.reserve(parent, 3, 2) == [BlockCopy(0, 1)]
    assert cache.reserve(child, 3, 2) == [BlockCopy(0, 2)]
    cache.check([parent, child])
    cache.end_copies()
    assert cache.pool.num_free == 6
    cache.check([parent, child])


def test_a_fork_at_a_block_s_end_needs_no_copy() -> None:
    cache = manager(8)
    tokens = run(0, 8)
    parent = start(cache, tokens)
    child = cache.fork(parent, 8)
    for table, token in ((parent, 50), (child, 60)):
        assert compute(cache, table, [*tokens, token], 8) == []
    assert parent.block_ids[:2] == child.block_ids[:2]
    assert parent.block_ids[2] != child.block_ids[2]
    with pytest.raises(AssertionError):
        cache.fork(parent, 8)
    cache.check([parent, child])


def test_back_to_fewer_tokens() -> None:
    cache = manager(8)
    table = start(cache, run(0, 15))
    cache.release(table, 10)
    assert (len(table.block_ids), table.num_sealed) == (3, 2)
    assert compute(cache, table, [*run(0, 10), 99], 10) == [BlockCopy(2, 3)], "the tree names the third block"
    cache.check([table])
    cache.release(table, 8)
    assert (len(table.block_ids), table.num_sealed) == (2, 2)
    assert compute(cache, table, run(0, 9), 8) == []
    cache.check([table])


def test_a_sealed_block_is_never_written() -> None:
    cache = manager(8)
    table = start(cache, run(0, 9))
    with pytest.raises(AssertionError, match="never written"):
        cache.reserve(table, 9, 3)
    cache.check([table])


def test_a_claim_tells_that_somebody_is_about_to_seal_the_block() -> None:
    cache = manager(16)
    tokens = run(0, 13)
    first = cache.new_table()
    assert not cache.is_being_computed(cache.match(tokens))
    cache.adopt(first, tokens, cache.match(tokens))
    longer = [*tokens, *run(50, 9)]
    for others in (tokens, longer, run(0, 8)):
        assert cache.is_being_computed(cache.match(others))
    assert not cache.is_being_computed(cache.match(run(1, 13)))
    assert not cache.is_being_computed(cache.match(tokens, "a"))
    cache.check([first])
    for num_computed, waits in [(5, True), (9, True), (12, False)]:
        cache.reserve(first, num_computed, 0 if num_computed == 5 else num_computed - 4)
        cache.seal(first, tokens, num_computed)
        assert cache.is_being_computed(cache.match(longer)) == waits
        assert num_cached(cache, longer) == num_computed // SIZE * SIZE
        cache.check([first])


@pytest.mark.parametrize("end", ["release", "withdraw_claims"])
def test_a_claim_ends_with_its_table(end: str) -> None:
    cache = manager(16)
    tokens = run(0, 13)
    table = cache.new_table()
    cache.adopt(table, tokens, cache.match(tokens))
    cache.reserve(table, 5, 0)
    cache.seal(table, tokens, 5)
    getattr(cache, end)(table)
    assert not cache.is_being_computed(cache.match(tokens))
    cache.check([table])


def test_a_claim_begins_behind_what_is_cached() -> None:
    cache = manager(16)
    fill(cache, run(0, 8))
    tokens = [*run(0, 6), *run(50, 7)]
    table = cache.new_table()
    cache.adopt(table, tokens, cache.match(tokens))
    assert len(table.claims) == 2
    assert cache.is_being_computed(cache.match(tokens))
    assert not cache.is_being_computed(cache.match(run(0, 13)))
    compute(cache, table, tokens, 6)
    assert table.claims == []
    cache.check([table])


def test_the_claim_of_another_is_left_alone() -> None:
    cache = manager(16)
    tokens = run(0, 9)
    first, second = cache.new_table(), cache.new_table()
    for table in (first, second):
        cache.adopt(table, tokens, cache.match(tokens))
    cache.release(second)
    assert cache.is_being_computed(cache.match(tokens))
    cache.check([first, second])
    cache.release(first)
    assert not cache.is_being_computed(cache.match(tokens))


def test_a_pin_of_so_many_tokens_holds_the_block_that_they_end_in() -> None:
    cache = manager(6)
    table = start(cache, run(0, 10))
    pins = [cache.keep(table, packed(run(0, 10)), is_pinned=True, num_pinned_tokens=count) for count in (6, 9, 3)]
    assert [pin.num_tokens for pin in pins] == [6, 9, 3]
    cache.release(table)
    cache.check([])
    assert (cache.num_pinned, cache.pool.num_held) == (3, 3)
    cache.clear()
    assert cache.match(run(0, 12)).num_cached_tokens == 8
    match = cache.match(run(0, 12), hold=pins[1])
    assert match.num_cached_tokens == 9
    other = cache.new_table()
    assert cache.adopt(other, run(0, 12), match) == 9
    copies = cache.reserve(other, 12, 9)
    assert copies is not None
    (copy,) = copies
    assert copy.source == pins[1].table.block_ids[2]
    cache.end_copies()
    cache.check([other])
    cache.release(other)
    for pin in pins:
        cache.let_go(pin)
    cache.check([])
    assert (cache.num_pinned, cache.pool.num_held) == (0, 0)


def test_a_pin_holds_what_is_sealed() -> None:
    cache = manager(4)
    table = start(cache, run(0, 10))
    pin, again = (cache.keep(table, packed(run(0, 10)), is_pinned=True) for _ in range(2))
    cache.release(table)
    cache.check([])
    assert (cache.num_pinned, cache.pool.num_held) == (2, 2)
    assert cache.num_blocks_within_reach(cache.match(run(50, 5))) == 2
    assert cache.num_blocks_within_reach(cache.match(run(0, 5))) == 3
    assert cache.num_blocks_within_reach(cache.match(run(0, 9))) == 4
    cache.clear()
    other = cache.new_table()
    assert cache.reserve(other, 3 * SIZE, 0) is None
    assert num_cached(cache, run(0, 9)) == 8
    cache.let_go(pin)
    assert cache.num_pinned == 2
    cache.let_go(again)
    assert cache.num_pinned == 0
    assert cache.reserve(other, 3 * SIZE, 0) == []
    cache.check([other])
    cache.let_go(pin)  # nothing is left to let go
    cache.check([other])


def test_clear_forgets_what_nobody_holds() -> None:
    cache = manager(16)
    fill(cache, run(100, 12))
    table = start(cache, run(0, 8))
    fill(cache, run(0, 12))
    cache.clear()
    assert (cache.pool.num_reusable, len(cache.tree)) == (0, 2)
    assert cache.match(run(100, 13)).miss_reason is MissReason.EVICTED
    assert num_cached(cache, run(0, 13)) == 8
    cache.check([table])


def test_without_prefix_cache_nothing_is_found_nor_kept() -> None:
    cache = manager(8, prefix_cache=False)
    first = start(cache, run(0, 9))
    found = cache.match(run(0, 9))
    assert (found.block_ids, found.num_cached_tokens, found.miss_reason) == ([], 0, MissReason.OFF)
    assert not cache.is_being_computed(found)
    second = start(cache, run(0, 9))
    assert not set(first.block_ids) & set(second.block_ids)
    child = cache.fork(first, 9)
    assert len(compute(cache, child, run(0, 10), 9)) == 1
    cache.release(child, 6)
    assert len(compute(cache, child, run(0, 8), 6)) == 1, "a whole block, which the fork shares"
    cache.check([first, second, child])
    for table in (first, second, child):
        cache.release(table)
    assert cache.pool.num_free == 8


def test_memory_goes_back_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvik.cache.manager.IDLE_TICKS", 2)
    cache = manager(24)
    fill(cache, run(0, 12))
    table = start(cache, run(50, 40))
    assert cache.committed_bytes == 24 * cache.spec.block_bytes
    cache.release(table)
    assert cache.take_idle(max_kept=0) == [[]]
    cache.clear()
    assert cache.take_idle() == [[]]
    assert [sorted(taken) for taken in cache.take_idle()] == [[0, 1, 2]]
    assert cache.committed_bytes == 0
    fill(cache, run(0, 3))
    assert [len(taken) for taken in cache.take_idle(max_kept=0)] == [1]
    cache.check([])


def test_check_finds_a_table_without_the_path_to_its_blocks() -> None:
    cache = manager(8)
    table = start(cache, run(0, 8))
    other = start(cache, run(50, 8))
    table.block_ids[1], other.block_ids[1] = other.block_ids[1], table.block_ids[1]
    with pytest.raises(AssertionError, match="without its path"):
        cache.check([table, other])


def test_a_block_that_agrees_in_part_is_room_where_nobody_else_needs_any() -> None:
    """No copy of it would fit, so it is written where it lies: the request must not be turned away for it."""
    cache = manager(3)
    fill(cache, [0, 1, 9, 9])
    tokens = [0, 1, *run(50, 10)]
    match = cache.match(tokens)
    assert match.tail is not None
    assert cache.has_room(match, 12, 0)
    assert not cache.has_room(match, 12, 1), "one is promised to others"
    assert not cache.has_room(match, 13, 0)
    table = cache.new_table()
    cache.adopt(table, tokens, match)
    assert cache.reserve(table, 12, 2) == []
    cache.check([table])
