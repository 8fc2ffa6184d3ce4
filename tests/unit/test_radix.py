"""The prefix tree: what is found, why no more is found, and that only ends of branches leave it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import pytest

from kvik.cache import Match, MissReason, Namespace, RadixTree, radix

pytestmark = pytest.mark.tiny

HERE = Namespace("f16")
SIZE = 4


def packed(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def insert(tree: RadixTree, tokens: Sequence[int], block_ids: Sequence[int], namespace: Namespace = HERE) -> list[int]:
    """Append whole blocks; gives those that hold the tokens now."""
    assert len(tokens) == len(block_ids) * SIZE
    path: list[int] = []
    for index, block_id in enumerate(block_ids):
        key = packed(tokens[index * SIZE : (index + 1) * SIZE])
        path.append(tree.append(namespace, path[-1] if path else None, key, block_id))
    tree.check()
    return path


def match(tree: RadixTree, tokens: Sequence[int], namespace: Namespace = HERE) -> Match:
    return tree.match(packed(tokens), namespace)


def run(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


@pytest.fixture
def tree() -> RadixTree:
    """0 to 11 in blocks 0, 1, 2; then 0 to 7 and 50 to 53, which splits the run, in blocks 0, 1, 3."""
    tree = RadixTree(SIZE)
    insert(tree, run(0, 12), [0, 1, 2])
    assert insert(tree, run(0, 8) + run(50, 4), [7, 8, 3]) == [0, 1, 3]
    return tree


def test_an_empty_tree_knows_nothing() -> None:
    tree = RadixTree(SIZE)
    found = match(tree, run(0, 9))
    assert (found.block_ids, found.num_cached_tokens, found.tail, found.miss_reason) == ([], 0, None, MissReason.UNSEEN)
    assert match(tree, []).miss_reason is MissReason.ALL
    assert len(tree) == 0
    tree.check()


@pytest.mark.parametrize(
    ("tokens", "block_ids", "tail", "stop"),
    [
        ([], [], None, MissReason.ALL),
        (run(0, 8), [0, 1], None, MissReason.ALL),
        (run(0, 12), [0, 1, 2], None, MissReason.ALL),
        (run(0, 8) + run(50, 4), [0, 1, 3], None, MissReason.ALL),
        # The end of the tokens is found in a block that goes on.
        (run(0, 3), [], (0, 3), MissReason.ALL),
        (run(0, 6), [0], (1, 2), MissReason.ALL),
        (run(0, 11), [0, 1], (2, 3), MissReason.ALL),
        ([*run(0, 8), 50], [0, 1], (3, 1), MissReason.ALL),
        # Or is not, and is too short to be a block of its own.
        ([9], [], None, MissReason.DIFFERS),
        ([0, 9], [], (0, 1), MissReason.DIFFERS),
        ([*run(0, 6), 99], [0], (1, 2), MissReason.DIFFERS),
        (run(0, 13), [0, 1, 2], None, MissReason.SHORT),
        # Something else goes on from there.
        ([9, 1, 2, 3], [], None, MissReason.DIFFERS),
        ([0, 1, 9, 3, 4, 5, 6, 7], [], (0, 2), MissReason.DIFFERS),
        ([*run(0, 4), 9, 5, 6, 7], [0], None, MissReason.DIFFERS),
        ([*run(0, 7), 9], [0], (1, 3), MissReason.DIFFERS),
        ([*run(0, 8), 50, 51, 9, 9, 9], [0, 1], (3, 2), MissReason.DIFFERS),
        ([*run(0, 8), 8, 9, 10, 99, 12], [0, 1], (2, 3), MissReason.DIFFERS),
        # Nothing does.
        (run(0, 16), [0, 1, 2], None, MissReason.UNSEEN),
        (run(0, 8) + run(50, 9), [0, 1, 3], None, MissReason.UNSEEN),
    ],
)
def test_what_is_found_and_why_no_more(
    tree: RadixTree, tokens: list[int], block_ids: list[int], tail: tuple[int, int] | None, stop: MissReason
) -> None:
    found = match(tree, tokens)
    assert (found.block_ids, found.tail, found.miss_reason) == (block_ids, tail, stop)
    assert found.num_tokens == SIZE * len(block_ids)
    assert found.num_cached_tokens == found.num_tokens + (tail[1] if tail else 0)
    assert (found.next_digest is None) == (len(tokens) - found.num_tokens < SIZE)
    tree.check()


@pytest.mark.parametrize("differs_at", range(12))
def test_the_first_token_that_differs_is_named(tree: RadixTree, differs_at: int) -> None:
    tokens = run(0, 12)
    tokens[differs_at] = 99
    found = match(tree, tokens)
    assert found.miss_reason is MissReason.DIFFERS
    assert found.num_cached_tokens == differs_at


def test_the_tail_is_the_block_that_agrees_longest() -> None:
    tree = RadixTree(SIZE)
    branches = [[5, 5, 5, 5], [5, 5, 7, 5], [5, 6, 5, 5], [256, 5, 5, 5], [5, 5, 7, -1], [-5, 5, 5, 5]]
    for block_id, tokens in enumerate(branches):
        insert(tree, tokens, [block_id])
    for first in (5, 256, -5):
        for second in (5, 6, 8):
            for third in (5, 7, 300):
                tokens = [first, second, third, 99]
                common = [next((at for at in range(4) if branch[at] != tokens[at]), 4) for branch in branches]
                found = match(tree, tokens)
                assert found.tail is not None
                assert found.tail[1] == max(common) == common[found.tail[0]]


def test_appending_what_is_there_gives_the_block_that_was(tree: RadixTree) -> None:
    assert insert(tree, run(0, 12), [20, 21, 22]) == [0, 1, 2]
    assert len(tree) == 4
    assert insert(tree, run(0, 16), [20, 21, 22, 23]) == [0, 1, 2, 23]
    assert match(tree, run(0, 16)).block_ids == [0, 1, 2, 23]


@pytest.mark.parametrize("at", range(6))
def test_a_split_loses_nothing(at: int) -> None:
    """A run of six blocks with two branches behind it is split at each of its blocks."""
    tree = RadixTree(SIZE)
    trunk = run(0, 24)
    insert(tree, trunk + run(100, 4), [0, 1, 2, 3, 4, 5, 6])
    insert(tree, trunk + run(200, 4), [0, 1, 2, 3, 4, 5, 7])
    assert insert(tree, trunk[: at * SIZE] + run(300, 8), [*range(at), 8, 9])[at:] == [8, 9]
    assert match(tree, trunk + run(100, 4)).block_ids == [0, 1, 2, 3, 4, 5, 6]
    assert match(tree, trunk + run(200, 4)).block_ids == [0, 1, 2, 3, 4, 5, 7]
    assert match(tree, trunk[: at * SIZE] + run(300, 8)).block_ids == [*range(at), 8, 9]
    for block_id in (9, 8, 7, 6, 5, 4, 3, 2, 1, 0):
        tree.evict(block_id)
        tree.check()
    assert len(tree) == 0


def test_an_open_block_is_a_tail_and_the_end_of_its_branch(tree: RadixTree) -> None:
    assert tree.append_open(HERE, 2, packed([12, 13]), 4)
    assert tree.append_open(HERE, None, packed([70]), 5)
    assert tree.append_open(HERE, 0, packed([4, 80, 81]), 6), "which splits a run"
    assert tree.append_open(HERE, 1, packed([9, 9]), 7), "beside others, which differ"
    tree.check()
    assert len(tree) == 8
    for tokens, tail, reason in [
        (run(0, 13), (4, 1), MissReason.ALL),
        (run(0, 14), (4, 2), MissReason.ALL),
        (run(0, 15), (4, 2), MissReason.SHORT),
        (run(0, 18), (4, 2), MissReason.UNSEEN),
        ([*run(0, 13), *run(90, 6)], (4, 1), MissReason.DIFFERS),
        ([*run(0, 13), 90], (4, 1), MissReason.DIFFERS),
        ([*run(0, 8), 9, 9, *run(90, 6)], (7, 2), MissReason.UNSEEN),
        ([*run(0, 8), 9, 9, 90], (7, 2), MissReason.SHORT),
        (run(70, 9), (5, 1), MissReason.UNSEEN),
        ([*run(0, 5), 80, 7, 7, 7], (6, 2), MissReason.DIFFERS),
        (run(0, 7), (1, 3), MissReason.ALL),
    ]:
        found = match(tree, tokens)
        assert (found.tail, found.miss_reason) == (tail, reason), tokens
    assert tree.place_of(4) == (HERE, 2)
    with pytest.raises(AssertionError, match="which is open"):
        tree.append(HERE, 4, packed(run(0, 4)), 8)
    for block_id in (4, 5, 6, 7):
        tree.evict(block_id)
        tree.check()
    assert match(tree, run(0, 16)).miss_reason is MissReason.UNSEEN, "no hash names an open block that was evicted"
    assert len(tree) == 4


def test_an_open_block_is_kept_only_where_no_other_begins_with_its_tokens(tree: RadixTree) -> None:
    for previous, tokens in ((0, [4, 5]), (1, [8]), (1, [50, 51, 52]), (None, [0, 1])):
        assert not tree.append_open(HERE, previous, packed(tokens), 9)
    assert tree.append_open(HERE, 1, packed([8, 9, 11]), 4)
    assert not tree.append_open(HERE, 1, packed([8, 9]), 9)
    assert not tree.append_open(HERE, 1, packed([8, 9, 11]), 9)
    assert tree.take_open(HERE, 1, packed([8, 9, 10, 11])) is None
    assert tree.take_open(HERE, 0, packed([8, 9, 11, 12])) is None
    assert tree.take_open(HERE, 1, packed([8, 9, 11, 12])) == 4
    tree.check()
    assert len(tree) == 4
    assert insert(tree, [*run(0, 8), 8, 9, 11, 12], [0, 1, 4]) == [0, 1, 4]


def test_what_is_behind_a_block(tree: RadixTree) -> None:
    assert [tree.last_behind(block_id) for block_id in (2, 3)] == [2, 3]
    assert {tree.last_behind(block_id) for block_id in (0, 1)} <= {2, 3}


def test_every_block_knows_its_place(tree: RadixTree) -> None:
    other = Namespace("f16", "other")
    insert(tree, run(0, 4), [9], other)
    assert [tree.place_of(block_id) for block_id in (0, 1, 2, 3)] == [(HERE, None), (HERE, 0), (HERE, 1), (HERE, 1)]
    assert tree.place_of(9) == (other, None)


def test_only_the_end_of_a_branch_is_evicted(tree: RadixTree) -> None:
    for block_id, reason in [(0, "not the last"), (1, "others behind it")]:
        before = list(tree.edges())
        with pytest.raises(AssertionError, match=reason):
            tree.evict(block_id)
        assert list(tree.edges()) == before
        tree.check()
    for block_id in (2, 3, 1, 0):
        tree.evict(block_id)
        tree.check()
    assert list(tree.edges()) == []


def test_a_miss_tells_that_the_block_was_evicted(tree: RadixTree) -> None:
    tree.evict(2)
    found = match(tree, run(0, 12))
    assert (found.block_ids, found.miss_reason) == ([0, 1], MissReason.EVICTED)
    assert match(tree, [*run(0, 11), 99]).miss_reason is MissReason.DIFFERS, "a block that never was"
    tree.evict(3)
    tree.evict(1)
    tree.evict(0)
    assert match(tree, run(0, 12)).miss_reason is MissReason.EVICTED
    assert match(tree, run(0, 12), Namespace("f16", "other")).miss_reason is MissReason.UNSEEN
    insert(tree, run(0, 12), [5, 6, 7])
    assert match(tree, run(0, 12)).miss_reason is MissReason.ALL


def test_evicted_blocks_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radix, "MAX_EVICTED", 3)
    tree = RadixTree(SIZE)
    for start in range(5):
        insert(tree, run(start, SIZE), [0])
        tree.evict(0)
    stops = [match(tree, run(start, SIZE)).miss_reason for start in range(5)]
    assert stops == [MissReason.UNSEEN, MissReason.UNSEEN, MissReason.EVICTED, MissReason.EVICTED, MissReason.EVICTED]


def test_nothing_is_matched_across_namespaces(tree: RadixTree) -> None:
    salted, narrow = Namespace("f16", "a"), Namespace("int8")
    for namespace, stop in [(salted, MissReason.OTHER_SALT), (narrow, MissReason.OTHER_FORMAT)]:
        found = match(tree, run(0, 12), namespace)
        assert (found.namespace, found.block_ids, found.tail, found.miss_reason) == (namespace, [], None, stop)
    assert match(tree, run(0, 3), salted).tail is None
    assert match(tree, run(60, 4), salted).miss_reason is MissReason.UNSEEN
    insert(tree, run(0, 8), [30, 31], salted)
    insert(tree, run(0, 4), [40], narrow)
    assert match(tree, run(0, 12)).block_ids == [0, 1, 2]
    assert match(tree, run(0, 12), salted).block_ids == [30, 31]
    assert match(tree, run(0, 12), narrow).block_ids == [40]
    assert match(tree, run(0, 4), Namespace("int8", "a")).miss_reason is MissReason.OTHER_SALT
    assert match(tree, run(0, 4), Namespace("f32", "a")).miss_reason is MissReason.OTHER_FORMAT
    for block_id in (31, 30):
        tree.evict(block_id)
    assert match(tree, run(0, 4), salted).miss_reason is MissReason.EVICTED
    assert match(tree, run(0, 4), Namespace("f16", "b")).miss_reason is MissReason.OTHER_SALT
    tree.check()


def test_names_of_what_comes_next() -> None:
    """The same for the same tokens in the same namespace, whatever part of them is cached; else different."""
    tree = RadixTree(SIZE)
    before = match(tree, run(0, 8)).next_digest
    insert(tree, run(0, 4), [0])
    after = match(tree, run(0, 8)).next_digest
    assert None not in (before, after)
    assert before != after
    tree.evict(0)
    assert match(tree, run(0, 8)).next_digest == before == match(tree, run(0, 4)).next_digest
    assert match(tree, run(1, 4)).next_digest != before
    assert match(tree, run(0, 8), Namespace("f16", "a")).next_digest != before


def test_edges(tree: RadixTree) -> None:
    salted = Namespace("f16", "a")
    insert(tree, run(7, 4), [9], salted)
    edges = list(tree.edges())
    assert [namespace for namespace, _ in edges] == [HERE, HERE, HERE, salted]
    assert [(edge.depth, edge.first_token, edge.block_ids) for _, edge in edges] == [
        (0, 0, [0, 1]),
        (1, 8, [2]),
        (1, 8, [3]),
        (0, 0, [9]),
    ]
    assert [edge.tokens for _, edge in edges] == [
        packed(tokens) for tokens in (run(0, 8), run(8, 4), run(50, 4), run(7, 4))
    ]


HARM: list[Callable[[RadixTree], object]] = [
    lambda tree: tree._node_of.pop(3),
    lambda tree: tree._depth_of.update({1: 5}),
    lambda tree: tree._node_of[2].tokens.extend(b"1234"),
    lambda tree: tree._node_of[2].block_ids.__setitem__(0, 0),
    lambda tree: tree._node_of[0].keys.reverse(),
    lambda tree: tree._beginnings.clear(),
    lambda tree: tree._node_of[3].digests.pop(),
]


@pytest.mark.parametrize("harm", HARM)
def test_check_finds_corruption(tree: RadixTree, harm: Callable[[RadixTree], object]) -> None:
    tree.check()
    harm(tree)
    with pytest.raises(AssertionError):
        tree.check()
