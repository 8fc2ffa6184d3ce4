"""Prompts that begin like a text that was computed before: which blocks they reuse, and why no more of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from kvik.cache import Stop
from kvik.config import SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.lanes import digest
from kvik.engine.llm import LLM
from kvik.explain.run import check_tokens

ROUNDS = 3


@dataclass(frozen=True, slots=True)
class FollowUp:
    """A prompt, and what of it was found in the cache."""

    title: str
    token_ids: list[int]
    num_common_tokens: int  # that both texts begin with
    num_shared_tokens: int  # in whole blocks that both use now
    num_copied_tokens: int  # the beginning of a block that was copied, because its end differs
    shared_blocks: list[int]
    copied_block: int | None
    stop: Stop  # why the match went no further
    num_computed_tokens: int  # up to its first token
    cold_s: float  # to its first token, without what was computed before
    warm_s: float  # with it; medians of `ROUNDS` both
    is_same: bool  # the logits of both, to the last bit


def default_follow_ups(llm: LLM, prompt_ids: list[int], token_ids: list[int]) -> list[tuple[str, list[int]]]:
    """A conversation that goes on, and another that began alike, by title; those for which there is room."""
    tokenizer = llm.model.tokenizer
    turn = tokenizer.encode(" What happened next?", add_special=False)
    other = tokenizer.encode(" when it began to rain", add_special=False)
    both = [
        ("The whole text again, and a few words more: the next turn of a chat", token_ids + turn),
        ("The same beginning, another end", prompt_ids[: max(1, len(prompt_ids) - 1)] + other),
    ]
    return [(title, ids) for title, ids in both if len(ids) < llm.model.context]


def follow_up(llm: LLM, known_ids: list[int], title: str, token_ids: list[int]) -> FollowUp:
    """Ask for one token behind `token_ids` where `known_ids` was computed before, and where nothing was."""
    check_tokens(llm, len(token_ids), 1)
    cold, warm = [], []
    for _ in range(ROUNDS):
        cold.append(_first_token(llm.new_engine(prefix_cache=False), token_ids))
        engine = llm.new_engine(prefix_cache=True)
        _first_token(engine, known_ids)
        warm.append(_first_token(engine, token_ids))
    found = warm[0]
    common = next(
        (at for at, (one, other) in enumerate(zip(known_ids, token_ids, strict=False)) if one != other),
        min(len(known_ids), len(token_ids)),
    )
    return FollowUp(
        title=title,
        token_ids=token_ids,
        num_common_tokens=common,
        num_shared_tokens=found.num_shared,
        num_copied_tokens=found.num_copied,
        shared_blocks=found.shared_blocks,
        copied_block=found.copied_block,
        stop=found.stop,
        num_computed_tokens=found.num_computed,
        cold_s=statistics.median(each.seconds for each in cold),
        warm_s=statistics.median(each.seconds for each in warm),
        is_same=len({each.bits for each in (*cold, *warm)}) == 1,
    )


@dataclass(frozen=True, slots=True)
class _FirstToken:
    seconds: float
    bits: bytes
    num_computed: int
    num_shared: int
    num_copied: int
    shared_blocks: list[int]
    copied_block: int | None
    stop: Stop


def _first_token(engine: Engine, token_ids: list[int]) -> _FirstToken:
    """Write one token, and tell what the cache had of the prompt."""
    sequence = engine.new_sequence(token_ids, SamplingParams(max_tokens=1, ignore_eos=True))
    match = engine.scheduler.match(sequence)
    engine.add(sequence)
    bits = b""
    while sequence.finish_reason is None:
        result = engine.step()
        assert result is not None
        bits = b"".join(map(digest, result.logits))
    if sequence.error is not None:
        raise sequence.error
    stats = engine.completion(sequence).stats
    assert stats.num_cached_tokens == match.num_cached_tokens
    return _FirstToken(
        seconds=stats.time_to_first_token_s,
        bits=bits,
        num_computed=stats.num_computed_tokens,
        num_shared=match.num_tokens,
        num_copied=match.tail[1] if match.tail else 0,
        shared_blocks=match.block_ids,
        copied_block=match.tail[0] if match.tail else None,
        stop=match.stop,
    )
