"""Blocks of layers with a window: held while they are seen, found again only where all that is seen is there."""

from __future__ import annotations

import random

import pytest

from kvik.cache import BlockTable, CacheManager, KVCacheSpec, MissReason, PoolSize, packed

pytestmark = pytest.mark.tiny

SIZE = 4  # tokens of a block


def manager(*windows: int | None, num_blocks: int = 32, window_blocks: int = 32) -> CacheManager:
    spec = KVCacheSpec.uniform(len(windows), 1, 8, "f16", SIZE, windows)
    return CacheManager(
        spec, PoolSize(num_blocks, tuple(num_blocks if group.keeps_all else window_blocks for group in spec.groups))
    )


def one_layer(window: int) -> KVCacheSpec:
    return KVCacheSpec.uniform(1, 1, 8, "f16", SIZE, (window,))


def advance(cache: CacheManager, table: BlockTable, tokens: list[int], start: int, end: int) -> None:
    """One step: tokens [start, end) computed, full blocks sealed, what left the windows given back."""
    copies = cache.reserve(table, end, start)
    assert copies is not None
    cache.end_copies()
    cache.seal(table, tokens, end)
    cache.slide(table, end)
    cache.check([table])


def computed(cache: CacheManager, tokens: list[int], step: int = 3, salt: str | None = None) -> BlockTable:
    """A table with all of the tokens computed, some a step, from what the cache has of them."""
    table = cache.new_table(salt)
    done = cache.adopt(table, tokens, cache.match(tokens, salt))
    while done < len(tokens):
        advance(cache, table, tokens, done, min(done + step, len(tokens)))
        done = min(done + step, len(tokens))
    return table


def run(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


@pytest.mark.parametrize(
    ("window", "tokens", "first"), [(1, 8, 2), (4, 8, 1), (5, 8, 1), (6, 8, 0), (9, 8, 0), (5, 0, 0)]
)
def test_the_first_block_that_the_next_token_sees(window: int, tokens: int, first: int) -> None:
    assert one_layer(window).first_block(0, tokens) == first


@pytest.mark.parametrize("seed", range(6))
def test_no_step_holds_more_than_the_most(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        spec = one_layer(rng.randint(1, 40))
        step, computed_tokens = rng.randint(1, 30), rng.randint(0, 100)
        end = computed_tokens + rng.randint(1, step)
        held = -(-end // SIZE) - spec.first_block(0, computed_tokens)
        assert held <= spec.max_group_blocks(0, end, step), f"seed {seed}: {spec}, {computed_tokens} ... {end}"


def test_a_table_holds_its_window_and_no_more() -> None:
    cache = manager(None, 6)
    table = computed(cache, run(0, 40))
    assert len(table.block_ids) == 10
    (window,) = table.twins.values()
    assert (window.first, len(window.block_ids)) == (8, 2)  # the next token, 40, sees 35 ... 40
    (group,) = cache.twins.groups
    assert group.pool.num_held == 2
    assert group.pool.num_reusable == 8, "the others are kept for whoever begins alike, as long as nobody needs them"
    assert cache.held_bytes(table) == cache.spec.held_bytes(40) == 10 * 128 + 2 * 128


def test_layers_that_all_slide_need_no_memory_for_the_rest() -> None:
    cache = manager(6, 6)
    table = computed(cache, run(0, 40))
    assert cache.spec.block_bytes == 0
    assert cache.held_bytes(table) == 2 * 2 * 128
    size = cache.spec.pool_size_within(10**6, context=4000, step_tokens=8, max_running=4)
    assert size.num_blocks >= 4 * 1000
    assert cache.spec.pool_bytes(size) <= 10**6


def test_a_hit_brings_the_blocks_of_the_window() -> None:
    cache = manager(None, 6)
    first = computed(cache, run(0, 40))
    match = cache.match([*run(0, 36), 99, 99])
    assert (match.num_tokens, match.miss_reason) == (36, MissReason.DIFFERS)
    second = cache.new_table()
    assert cache.adopt(second, [*run(0, 36), 99, 99], match) == 36
    assert second.twins[1].first == 7  # token 36 sees 31 ... 36
    assert second.twins[1].block_ids[1:] == first.twins[1].block_ids[:1]
    cache.check([first, second])


def test_a_hit_needs_every_block_of_the_window() -> None:
    cache = manager(None, 6)
    cache.release(computed(cache, run(0, 40)))
    (group,) = cache.twins.groups
    twins = [group.twin_of(block_id) for block_id in cache.match(run(0, 41)).block_ids]
    assert None not in twins

    def lose(index: int) -> None:
        twin = twins[index]
        assert twin is not None
        group.pool.hold([twin])  # so that it is the newest, and all older ones go first
        group.pool.release([twin])
        taken = group.take(group.pool.num_free, None)
        assert taken is not None
        while (more := group.take(1, None)) != [twin]:
            assert more is not None
            taken += more
        group.pool.release([*taken, twin])

    group.pool.check([])
    lose(9)
    found = cache.match(run(0, 41))
    assert found.miss_reason is MissReason.WINDOW
    assert found.num_tokens == 0, "all older ones went before"
    assert (found.tail, found.next_hash) == (None, None)
    table = computed(cache, run(0, 41))
    assert cache.match(run(0, 41)).num_tokens == 40, "what was computed again is found again"
    cache.release(table)
    cache.check([])


def test_a_hit_ends_before_the_gap() -> None:
    cache = manager(None, 6, window_blocks=32)
    cache.release(computed(cache, run(0, 40)))
    (group,) = cache.twins.groups
    block_ids = cache.match(run(0, 41)).block_ids
    group.forget(block_ids[8])
    found = cache.match(run(0, 41))
    assert (found.num_tokens, found.miss_reason) == (32, MissReason.WINDOW)
    group.forget(block_ids[6])  # a token behind block 7 would see its end
    assert cache.match(run(0, 33)).num_tokens == 24
    assert cache.match(run(0, 24)).miss_reason is MissReason.ALL


def test_two_windows_cut_to_what_both_have() -> None:
    cache = manager(6, 14, None)
    cache.release(computed(cache, run(0, 40)))
    narrow, wide = cache.twins.groups
    assert (narrow.spec.window, wide.spec.window) == (6, 14)
    block_ids = cache.match(run(0, 41)).block_ids
    wide.forget(block_ids[7])  # tokens 28 ... 31, which 41 of 14 tokens sees
    assert cache.match(run(0, 41)).num_tokens == 28


def test_the_same_block_computed_twice_is_known_once() -> None:
    cache = manager(None, 100)
    first, second = cache.new_table(), cache.new_table()
    for table in (first, second):
        cache.adopt(table, run(0, 8), cache.match(run(0, 8)))
    for table in (first, second):
        copies = cache.reserve(table, 8, 0)
        assert copies == []
    for table in (first, second):
        cache.seal(table, run(0, 8), 8)
        cache.slide(table, 8)
    assert first.block_ids == second.block_ids
    assert first.twins[1].block_ids == second.twins[1].block_ids
    cache.check([first, second])
    assert cache.twins.groups[0].pool.num_held == 2


def test_a_lost_twin_comes_back_from_whoever_computes_it_again() -> None:
    cache = manager(None, 100)
    cache.release(computed(cache, run(0, 8)))
    (group,) = cache.twins.groups
    block_ids = cache.match(run(0, 9)).block_ids
    group.forget(block_ids[0])
    table = computed(cache, run(0, 9))
    assert table.block_ids[:2] == block_ids
    assert group.twin_of(block_ids[0]) == table.twins[1].block_ids[0]
    cache.check([table])


def test_a_copy_before_writing_is_made_in_every_group() -> None:
    cache = manager(None, 6)
    first = computed(cache, run(0, 10))
    second = cache.fork(first, 10)
    cache.check([first, second])
    copies = cache.reserve(second, 11, 10)
    assert copies is not None
    assert [copy.group for copy in copies] == [0, 1]
    assert copies[0][:2] == (first.block_ids[-1], second.block_ids[-1])
    assert copies[1][:2] == (first.twins[1].block_ids[-1], second.twins[1].block_ids[-1])
    cache.check([first, second])
    cache.end_copies()
    cache.check([first, second])
    assert cache.reserve(first, 11, 10) == [], "nobody else has it any more"


def test_going_back_is_possible_as_far_as_the_window_was_kept() -> None:
    cache = manager(None, 6)
    table = computed(cache, run(0, 40))
    assert [tokens for tokens in range(41) if cache.can_go_back(table, tokens)] == [37, 38, 39, 40]
    cache.release(table, 38)
    assert table.twins[1].first == 8
    advance(cache, table, [*run(0, 38), 7, 7], 38, 40)
    cache.release(table)
    assert table.twins[1].block_ids == []
    cache.check([table])


def test_shortage_in_a_window_is_not_now() -> None:
    cache = manager(None, 6, window_blocks=3)
    table = cache.new_table()
    assert cache.reserve(table, 13, 0) is None
    assert (table.block_ids, table.twins[1].block_ids) == ([], [])
    assert cache.reserve(table, 12, 0) == []
    cache.check([table])


def test_a_block_written_where_it_lies_takes_those_behind_it_out_of_the_tree() -> None:
    """No copy of its twin fits, though the blocks that all tokens have are plenty."""
    cache = manager(None, 6, window_blocks=4)
    cache.release(computed(cache, run(0, 16)))
    tokens = [*run(0, 10), 99]
    table = cache.new_table()
    assert cache.adopt(table, tokens, cache.match(tokens)) == 10
    others = [cache.new_table(), cache.new_table()]
    assert [cache.reserve(other, 1, 0) for other in others] == [[], []]
    assert not cache.twins.groups[0].pool.num_available
    assert cache.reserve(table, 11, 10) == []
    cache.check([table, *others])
    assert len(cache.tree) == 2


def test_the_end_of_a_sequence_is_found_with_its_window() -> None:
    cache = manager(None, 6)
    table = computed(cache, run(0, 18))
    cache.keep_end(table, run(0, 18), 18)
    cache.check([table])
    cache.release(table)
    cache.check([])
    again = cache.new_table()
    assert cache.adopt(again, run(0, 20), cache.match(run(0, 20))) == 18
    copies = cache.reserve(again, 20, 18)
    assert copies is not None
    assert [copy.group for copy in copies] == [0, 1]
    cache.end_copies()
    cache.seal(again, run(0, 20), 20)
    cache.check([again])
    assert len(cache.tree) == 5


def test_pins_hold_what_a_hit_needs() -> None:
    cache = manager(None, 6, window_blocks=5)
    table = computed(cache, run(0, 20), step=2)
    pin = cache.keep(table, packed(run(0, 20)), is_pinned=True)
    cache.release(table)
    (group,) = cache.twins.groups
    other = computed(cache, run(50, 20), step=2)  # takes all twins that nobody holds
    assert cache.match(run(0, 21)).num_tokens == 20
    assert cache.num_blocks_within_reach(cache.match([99])) == 32 - 5
    cache.release(other)
    cache.let_go(pin)
    assert group.pool.num_held == 0
    cache.check([])


def test_pins_that_leave_too_little_of_a_window_limit_what_can_come() -> None:
    cache = manager(None, 6, window_blocks=4)
    table = computed(cache, run(0, 20), step=2)
    pin = cache.keep(table, packed(run(0, 20)), is_pinned=True)
    cache.release(table)
    assert cache.num_blocks_within_reach(cache.match([99])) == 2, "of four blocks two are pinned, a step needs three"
    cache.let_go(pin)
    assert cache.num_blocks_within_reach(cache.match([99])) == 32


def test_no_window_costs_nothing() -> None:
    spec = KVCacheSpec.uniform(4, 2, 16, "f16")
    assert spec.sliding_groups == ()
    assert spec.layer_groups == (0,) * 4
    assert KVCacheSpec.uniform(4, 2, 16, "f16", layer_windows=(None,) * 4) == spec
    assert spec.held_bytes(100) == 4 * spec.block_bytes


def test_a_pin_reaches_back_from_its_last_full_block() -> None:
    """The table itself has gone on, and given back a block that the first token behind the pinned ones sees."""
    cache = manager(None, 6, window_blocks=8)
    table = computed(cache, run(0, 23), step=2)
    (group,) = cache.twins.groups
    num_full = table.num_sealed * 4
    assert table.twins[1].first > group.first_block(num_full)
    pin = cache.keep(table, packed(run(0, 23)), is_pinned=True)
    cache.release(table)
    taken = group.take(group.pool.num_available, None)  # others need all twins that nobody holds
    assert taken is not None
    group.pool.release(taken)
    assert cache.match(run(0, 24)).num_cached_tokens == num_full
    cache.let_go(pin)
    cache.check([])


def test_a_pin_of_so_many_tokens_ends_with_a_full_block_where_there_are_windows() -> None:
    cache = manager(None, 6, window_blocks=8)
    table = computed(cache, run(0, 23), step=2)
    pin = cache.keep(table, packed(run(0, 23)), is_pinned=True, num_pinned_tokens=14)
    assert pin.num_tokens == 12
    cache.check([table])
    cache.release(table)
    assert cache.match(run(0, 13), hold=pin).num_cached_tokens == 12
    cache.let_go(pin)
    cache.check([])
