"""The cache, to look at: what it says adds up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvik.config import SamplingParams
from kvik.engine.llm import LLM
from kvik.errors import InvalidInput

PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)
BEGINNING = "the same words at the beginning of each prompt, more than a block of them"


def test_a_new_cache_is_empty(llm: LLM) -> None:
    cache = llm.cache
    assert (cache.num_held, cache.num_reusable, cache.num_free) == (0, 0, cache.num_blocks)
    assert cache.committed_bytes == 0
    assert cache.tree() == []
    assert cache.stats.hit_rate == 0
    assert f"{cache.num_blocks:,} blocks of 32 tokens" in str(cache)


def test_blocks_and_tokens_add_up(llm: LLM) -> None:
    prompts = [BEGINNING + ending for ending in (" one", " two")]
    first, second = (llm.generate(prompt, PARAMS)[0] for prompt in prompts)
    cache = llm.cache
    assert cache.num_held == 0
    assert cache.num_reusable == sum(len(row.block_ids) for row in cache.tree()) > 0
    assert cache.num_reusable + cache.num_free == cache.num_blocks
    assert cache.num_reusable * llm.engine.kv_spec.block_bytes <= cache.committed_bytes <= cache.num_bytes
    stats = cache.stats
    assert stats.num_queries == 2
    assert stats.num_cached_tokens == second.stats.num_cached_tokens > 0
    assert stats.num_queried_tokens == sum(one.stats.num_prompt_tokens - 1 for one in (first, second))
    assert stats.hit_rate == stats.num_cached_tokens / stats.num_queried_tokens


def test_the_tree_shows_what_prompts_share_once(llm: LLM) -> None:
    texts = [BEGINNING + ending for ending in (" one", " two")]
    prompts = [llm.encode(text) for text in texts]
    for prompt in prompts:
        llm.generate(prompt, PARAMS)
    rows = llm.cache.tree()
    assert rows[0].level == rows[0].first_token == 0
    shared = next(index for index in range(500) if prompts[0][index] != prompts[1][index]) // 32 * 32
    assert rows[0].num_tokens == shared
    assert rows[0].text == llm.model.tokenizer.decode(prompts[0][:shared], skip_special=False)
    ends = [row for row in rows[1:] if row.num_tokens < 32]  # the blocks in which they ended, not full
    assert {(row.level, row.first_token) for row in rows[1:] if row not in ends} == {(1, shared)}
    assert [len(rows), len(ends)] == [5, 2]
    lines = str(llm.cache).splitlines()
    assert len(lines) == 3 + len(rows)
    assert lines[4].startswith("  ")


def test_an_end_is_reusable_and_not_sealed(llm: LLM) -> None:
    completion = llm.generate(BEGINNING, PARAMS)[0]
    num_computed = completion.stats.num_prompt_tokens + completion.stats.num_completion_tokens - 1
    views = [llm.cache.block(block_id) for row in llm.cache.tree() for block_id in row.block_ids]
    told = {(view.state, view.is_sealed, len(view.token_ids)) for view in views if view is not None}
    assert told == {("reusable", True, 32), ("reusable", False, num_computed % 32)}


def test_salts_and_holders_are_shown(llm: LLM) -> None:
    stream = llm.stream(BEGINNING * 2, PARAMS, salt="ada")
    for _ in range(3):
        next(stream)
    rows = llm.cache.tree()
    assert {(row.salt, row.num_holders) for row in rows} == {("ada", 1)}
    assert llm.cache.num_held > 0
    assert "[ada]" in str(llm.cache)
    stream.close()  # type: ignore[attr-defined]
    assert llm.cache.num_held == 0


def test_clear_forgets_what_nobody_holds_and_gives_the_memory_back(llm: LLM) -> None:
    llm.generate([BEGINNING, BEGINNING * 2], PARAMS)
    assert llm.cache.committed_bytes > 0
    llm.cache.clear()
    assert (llm.cache.num_free, llm.cache.committed_bytes, llm.cache.tree()) == (llm.cache.num_blocks, 0, [])
    stream = llm.stream(BEGINNING, PARAMS)
    next(stream)
    llm.cache.clear()
    assert llm.cache.num_held > 0, "what a request uses is not forgotten"
    assert len(list(stream)) == 39


def test_text_is_made_of_tokens_while_the_engine_goes_on(llm: LLM) -> None:
    """Ids are copied with the lock held, and decoded without it; depth and count bound both."""
    prompts = [
        BEGINNING + ending for ending in (" one and more of it until a block is full", " two, and more again, as above")
    ]
    for prompt in prompts:
        llm.generate(prompt, PARAMS)
    tokenizer = llm.model.tokenizer

    class Watched:
        def decode(self, token_ids: list[int], *, skip_special: bool = True) -> str:
            assert not llm.engine.lock.is_owned
            return tokenizer.decode(token_ids, skip_special=skip_special)

    rows = llm.cache.tree()
    llm.engine.model = replace(llm.model, tokenizer=Watched())  # type: ignore[arg-type]
    assert llm.cache.tree() == rows
    assert len(rows) >= 3
    assert llm.cache.tree(max_rows=2) == rows[:2]
    assert llm.cache.tree(max_level=0) == [row for row in rows if row.level == 0]
    assert llm.cache.tree(max_rows=0) == []
    for bad in (-1, 1.5, True):
        with pytest.raises(InvalidInput, match="max_rows is"):
            llm.cache.tree(max_rows=bad)  # type: ignore[arg-type]
