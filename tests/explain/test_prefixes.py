"""Prompts that begin alike: what of them is found, told block by block."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvik import LLM, InvalidInput
from kvik.cache import MissReason
from kvik.explain.prefixes import default_follow_ups, follow_up

KNOWN = list(range(3, 80))  # two whole blocks, and 13 tokens of a third


@pytest.mark.parametrize(
    ("token_ids", "common", "shared", "copied", "stop"),
    [
        ([*KNOWN, 100, 101], 77, 64, 13, MissReason.SHORT),
        ([*KNOWN[:40], *[100] * 40], 40, 32, 8, MissReason.DIFFERS),
        ([*KNOWN, *[100] * 40], 77, 64, 13, MissReason.UNSEEN),
        ([*KNOWN[:64], *[100] * 40], 64, 64, 0, MissReason.DIFFERS),
        ([*KNOWN[:6], 100, 101], 6, 0, 6, MissReason.DIFFERS),
        ([100, 101, 102], 0, 0, 0, MissReason.DIFFERS),
        (KNOWN[:64], 64, 32, 31, MissReason.ALL),
    ],
)
def test_blocks_are_shared_up_to_the_difference(
    llm: LLM, token_ids: list[int], common: int, shared: int, copied: int, stop: MissReason
) -> None:
    found = follow_up(llm, KNOWN, "title", token_ids)
    assert (found.num_common_tokens, found.num_shared_tokens, found.num_copied_tokens) == (common, shared, copied)
    assert found.stop == stop
    assert len(found.shared_blocks) == shared // 32
    assert (found.copied_block is not None) == (copied > 0)
    assert found.num_computed_tokens == len(token_ids) - shared - copied
    assert found.is_same
    assert found.cold_s > 0 < found.warm_s


def test_both_defaults_begin_like_the_text(llm: LLM) -> None:
    (_, turn), (_, other) = default_follow_ups(llm, KNOWN[:10], KNOWN)
    assert turn[: len(KNOWN)] == KNOWN
    assert other[:9] == KNOWN[:9]
    assert other[9] != KNOWN[9]


def test_a_full_context_leaves_no_room_for_another_turn(tiny: Path) -> None:
    llm = LLM(str(tiny), context=len(KNOWN) + 1)
    assert [title for title, _ in default_follow_ups(llm, KNOWN[:10], KNOWN)] == ["The same beginning, another end"]
    with pytest.raises(InvalidInput, match="the context holds 78"):
        follow_up(llm, KNOWN, "title", [*KNOWN, 100])
