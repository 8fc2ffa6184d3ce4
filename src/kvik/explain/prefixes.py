"""Prompts that begin like a text that was computed before: which blocks they reuse, and why no more of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from kvik.cache import MissReason
from kvik.config import SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.llm import LLM
from kvik.errors import InvalidInput
from kvik.explain.run import check_tokens, max_page_tokens
from kvik.measure.lanes import digest

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
    stop: MissReason  # why the match went no further
    num_computed_tokens: int  # up to its first token
    cold_s: float  # to its first token, without what was computed before
    warm_s: float  # with it; medians of `ROUNDS` both
    is_same: bool  # the logits of both, to the last bit


def default_follow_ups(llm: LLM, prompt_ids: list[int], token_ids: list[int]) -> list[tuple[str, list[int]]]:
    """A text that goes on, and another that began alike, by title; those for which the page and the model have room."""
    encode = llm.model.tokenizer.encode
    try:
        both = [
            ("The whole text again, and a few words more", token_ids + encode(" What then?", add_special=False)),
            (
                "The same beginning, another end",
                prompt_ids[: max(1, len(prompt_ids) - 1)] + encode(" when it began to rain", add_special=False),
            ),
        ]
    except InvalidInput:  # a vocabulary that cannot write these
        return []
    return [(title, ids) for title, ids in both if len(ids) < max_page_tokens(llm)]


def next_turn(llm: LLM, question: str, answer_ids: list[int]) -> list[tuple[str, list[int]]]:
    """The chat goes on, by title; nothing where there is no room for it."""
    answer = llm.model.tokenizer.decode(answer_ids)
    messages = [("user", question), ("assistant", answer), ("user", "What then?")]
    token_ids = llm.render_chat([{"role": role, "content": content} for role, content in messages])
    return [("The next turn of the chat", token_ids)] if len(token_ids) < max_page_tokens(llm) else []


def follow_up(llm: LLM, known_ids: list[int], title: str, token_ids: list[int]) -> FollowUp:
    """Ask for one token after `token_ids` where `known_ids` was computed before, and where nothing was kept of it."""
    check_tokens(llm, len(token_ids), 1)
    cold: list[_FirstToken] = []
    warm: list[_FirstToken] = []
    for _ in range(ROUNDS):
        for found, prefix_cache in ((cold, False), (warm, True)):
            engine = llm.new_engine(prefix_cache=prefix_cache, store=None)
            _first_token(engine, known_ids)  # in both: memory that was touched before is quicker
            found.append(_first_token(engine, token_ids))
    first = warm[0]
    common = next(
        (at for at, (one, other) in enumerate(zip(known_ids, token_ids, strict=False)) if one != other),
        min(len(known_ids), len(token_ids)),
    )
    return FollowUp(
        title=title,
        token_ids=token_ids,
        num_common_tokens=common,
        num_shared_tokens=first.num_shared,
        num_copied_tokens=first.num_copied,
        shared_blocks=first.shared_blocks,
        copied_block=first.copied_block,
        stop=first.stop,
        num_computed_tokens=first.num_computed,
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
    stop: MissReason


def _first_token(engine: Engine, token_ids: list[int]) -> _FirstToken:
    """Write one token, and tell what the cache had of the prompt."""
    request = engine.new_request(token_ids, SamplingParams(max_tokens=1, ignore_eos=True))
    sequence = engine.new_sequence(request)
    match = engine.scheduler.match(request, request.prompt_ids)
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
        stop=match.miss_reason,
    )
