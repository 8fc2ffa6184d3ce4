"""Drafts by prompt lookup: against the plain definition, and how many are dared."""

from __future__ import annotations

import time
from typing import Any, SupportsIndex

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.engine.drafts import LONGEST_PAUSE, MAX_WANTED, NgramDrafts

tokens = st.lists(st.integers(0, 3), max_size=40)


def plain_draft(token_ids: list[int], count: int) -> list[int]:
    """Look back for the last three tokens, then for the last two; copy what followed, the copy itself included."""
    for size in (3, 2):
        if len(token_ids) < size:
            continue
        for end in range(len(token_ids) - 1, size - 1, -1):
            if token_ids[end - size : end] == token_ids[-size:]:
                longer = list(token_ids)
                for index in range(count):
                    longer.append(longer[end + index])
                return longer[len(token_ids) :]
    return []


def wanting(num_wanted: int) -> NgramDrafts:
    drafts = NgramDrafts()
    while drafts.num_wanted < num_wanted:
        drafts.note(1, 1)
    return drafts


@settings(deadline=None, max_examples=300)
@given(tokens, st.integers(0, 10))
def test_a_draft_is_what_followed_the_same_tokens_last(token_ids: list[int], most: int) -> None:
    drafts = wanting(MAX_WANTED)
    assert drafts.propose(token_ids, most) == plain_draft(token_ids, min(most, MAX_WANTED))


@settings(deadline=None, max_examples=300)
@given(tokens, st.lists(st.tuples(st.integers(0, 12), st.lists(st.integers(0, 3), max_size=6)), max_size=12))
def test_a_sequence_that_grows_and_is_cut_back_is_indexed_right(
    token_ids: list[int], changes: list[tuple[int, list[int]]]
) -> None:
    drafts = wanting(MAX_WANTED)
    for num_cut, more in changes:
        if num_cut > 8:  # else it only grows
            del token_ids[max(0, len(token_ids) - (num_cut - 8)) :]
            assert drafts.propose(token_ids, 8) == plain_draft(token_ids, 8)
        token_ids += more
        assert drafts.propose(token_ids, 8) == plain_draft(token_ids, 8)


@pytest.mark.parametrize("seed", range(5))
def test_long_sequences_with_few_different_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    token_ids: list[int] = []
    drafts = wanting(MAX_WANTED)
    for _ in range(120):
        token_ids += rng.integers(0, 12, rng.integers(1, 8)).tolist()
        assert drafts.propose(token_ids, 8) == plain_draft(token_ids, 8)


@pytest.mark.parametrize("seed", range(5))
def test_a_sequence_rewritten_unseen_is_indexed_anew(seed: int) -> None:
    """Cut back and longer than before at the next call, with other tokens."""
    rng = np.random.default_rng(seed)
    token_ids = rng.integers(0, 50, 200).tolist()
    drafts = wanting(MAX_WANTED)
    for _ in range(40):
        drafts.propose(token_ids, 8)
        del token_ids[-int(rng.integers(2, 100)) :]
        token_ids += rng.integers(0, 50, 120).tolist()
        assert drafts.propose(token_ids, 8) == plain_draft(token_ids, 8)


def test_three_tokens_say_more_than_two_and_the_last_time_more_than_the_first() -> None:
    drafts = wanting(MAX_WANTED)
    assert drafts.propose([1, 2, 3, 40, 9, 2, 3, 50, 1, 2, 3], 1) == [40]
    assert drafts.propose([1, 2, 3, 40, 9, 2, 3, 50, 8, 2, 3], 1) == [50]
    assert drafts.propose([1, 2, 3, 40, 1, 2, 3, 50, 1, 2, 3], 2) == [50, 1]


def test_a_text_that_repeats_itself_is_continued_through_the_draft() -> None:
    assert wanting(8).propose([5, 5, 5], 8) == [5] * 8
    assert wanting(8).propose([1, 2, 3, 1, 2, 3], 8) == [1, 2, 3, 1, 2, 3, 1, 2]


@pytest.mark.parametrize("token_ids", [[], [1], [1, 1], [1, 2], [1, 2, 3, 4, 5, 6]])
def test_nothing_known_is_no_draft(token_ids: list[int]) -> None:
    assert NgramDrafts().propose(token_ids, 4) == []


def test_the_sequence_is_left_alone_and_no_more_is_drafted_than_asked_for() -> None:
    token_ids = [1, 2, 3, 4, 1, 2, 3]
    drafts = NgramDrafts()
    assert [len(drafts.propose(token_ids, most)) for most in (-1, 0, 1, 3, 4, 5, 100)] == [0, 0, 1, 3, 4, 4, 4]
    assert token_ids == [1, 2, 3, 4, 1, 2, 3]


def test_success_doubles_and_failure_falls_back_to_what_was_accepted() -> None:
    drafts = NgramDrafts()
    wanted = [drafts.num_wanted]
    for drafted, accepted in [(4, 4), (8, 8), (8, 7), (8, 3), (4, 0), (1, 1), (2, 2), (4, 2), (0, 0)]:
        drafts.note(drafted, accepted)
        wanted.append(drafts.num_wanted)
    assert wanted == [4, 8, 8, 8, 4, 1, 2, 4, 3, 3]


def paused_steps(drafts: NgramDrafts) -> int:
    """Steps until something is drafted again."""
    for steps in range(2 * LONGEST_PAUSE):
        wanted = drafts.num_wanted
        draft = drafts.propose([1, 1, 1], 8)
        assert len(draft) == wanted
        if draft:
            return steps
    raise AssertionError("the pause does not end")


def test_hopeless_text_pauses_for_longer_and_longer() -> None:
    drafts = NgramDrafts()
    pauses = []
    for _ in range(8):
        drafts.note(1, 0)
        pauses.append(paused_steps(drafts))
    assert pauses == [0, 0, 8, 16, 32, 64, 64, 64]
    assert drafts.num_wanted == 1
    drafts.note(1, 1)  # hope again
    assert drafts.num_wanted == 2
    for expected in (0, 0, 8):
        drafts.note(1, 0)
        assert paused_steps(drafts) == expected


def test_no_draft_is_no_failure() -> None:
    drafts = NgramDrafts()
    for _ in range(100):
        drafts.note(0, 0)
    assert drafts.num_wanted == 4


def run(text: list[int], num_prompt_tokens: int) -> tuple[int, int]:
    """Steps and drafted tokens that it takes to write the rest of a text that is known."""
    drafts, token_ids = NgramDrafts(), text[:num_prompt_tokens]
    steps = num_drafted = 0
    while len(token_ids) < len(text):
        draft = drafts.propose(token_ids, len(text) - len(token_ids) - 1)
        rest = text[len(token_ids) :]
        accepted = next((i for i, token_id in enumerate(draft) if token_id != rest[i]), len(draft))
        token_ids += rest[: accepted + 1]
        drafts.note(len(draft), accepted)
        steps, num_drafted = steps + 1, num_drafted + len(draft)
    return steps, num_drafted


def test_a_copy_takes_a_ninth_of_the_steps_and_hopeless_text_hardly_a_draft() -> None:
    rng = np.random.default_rng(0)
    original = rng.integers(0, 50_000, 900).tolist()
    steps, _ = run(original + original, 902)
    assert steps <= 900 / 9 + 5
    # Of ten different tokens, pairs come again all the time, and tell nothing.
    hopeless = rng.integers(0, 10, 2000).tolist()
    steps, num_drafted = run(hopeless, 500)
    assert steps > 1350
    assert num_drafted < 250


class Watched(list[int]):
    """Counts the tokens that were looked at."""

    num_read = 0

    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        found = super().__getitem__(key)
        self.num_read += len(found) if isinstance(found, list) else 1
        return found


def test_a_step_looks_at_new_tokens_only() -> None:
    rng = np.random.default_rng(1)
    token_ids = Watched(rng.integers(0, 30, 8000).tolist())
    drafts = NgramDrafts()
    drafts.propose(token_ids, 8)
    assert token_ids.num_read < 6 * 8000
    token_ids.num_read = 0
    for _ in range(100):
        token_ids.append(int(rng.integers(0, 30)))
        drafts.propose(token_ids, 8)
    assert token_ids.num_read < 100 * 40


@pytest.mark.parametrize("num_different", [1, 7, 50_000])
def test_thousands_of_tokens_are_indexed_in_milliseconds(num_different: int) -> None:
    token_ids = np.random.default_rng(2).integers(0, num_different, 8000).tolist()
    taken_s = []
    for _ in range(5):
        drafts = NgramDrafts()
        start_s = time.perf_counter()
        drafts.propose(token_ids, 8)
        taken_s.append(time.perf_counter() - start_s)
    assert min(taken_s) < 0.1, "a few milliseconds; ten times that on a busy machine"
