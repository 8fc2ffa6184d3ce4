"""Requests inside the engine: why they end, what they count, and blocks that always come home."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from kvik.config import EngineConfig, SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.sequence import Sequence
from kvik.errors import CacheTooSmall, InvalidInput, PromptTooLong, StepFailed
from kvik.models.loader import LoadedModel
from models import assert_idle, random_prompt, run, run_sequence, tiny_model
from runners import failing, watched_engine
from sequences import new_sequence

PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)
VOCAB = 320


@pytest.fixture
def engine(tiny: LoadedModel) -> Engine:
    return Engine(tiny, EngineConfig(token_budget=50))


@pytest.fixture
def prompt(tiny: LoadedModel) -> list[int]:
    return random_prompt(tiny, 40, seed=21)


# Why a sequence ends.


def test_max_tokens_is_length(engine: Engine, prompt: list[int]) -> None:
    for count in (1, 2, 33):
        result = run(engine, prompt, dataclasses.replace(PARAMS, max_tokens=count))
        assert (len(result.token_ids), result.sequence.finish_reason) == (count, "length")


def test_the_end_of_the_context_is_length(tiny: LoadedModel) -> None:
    """The last token needs no place for its own key and value."""
    engine = Engine(tiny)
    for length in (511, 510, 500):
        result = run(engine, random_prompt(tiny, length, seed=22), dataclasses.replace(PARAMS, max_tokens=1000))
        assert result.sequence.finish_reason == "length"
        assert result.sequence.num_tokens == 512
    assert_idle(engine)


def test_a_stop_token_is_stop_and_part_of_the_completion(engine: Engine, prompt: list[int]) -> None:
    token_ids = run(engine, prompt, PARAMS).token_ids
    for stop_id in (token_ids[0], token_ids[4]):
        end = token_ids.index(stop_id) + 1
        result = run(engine, prompt, dataclasses.replace(PARAMS, stop_token_ids=(stop_id,)))
        assert result.token_ids == token_ids[:end]
        assert result.sequence.finish_reason == "stop"
        assert result.sequence.text.text == engine.model.tokenizer.decode(token_ids[: end - 1])


def test_the_end_of_text_token_ends_unless_it_is_ignored(tmp_path: Path, engine: Engine, prompt: list[int]) -> None:
    token_ids = run(engine, prompt, PARAMS).token_ids
    eos = next(token_id for token_id in token_ids[2:] if token_id not in token_ids[:2])
    end = token_ids.index(eos) + 1
    model = tiny_model(tmp_path, seed=5, extra_metadata={"tokenizer.ggml.eos_token_id": eos})
    other = Engine(model)
    stopped = run(other, prompt, dataclasses.replace(PARAMS, ignore_eos=False))
    assert (stopped.token_ids, stopped.sequence.finish_reason) == (token_ids[:end], "stop")
    assert run(other, prompt, PARAMS).token_ids == token_ids
    late = run(other, prompt, dataclasses.replace(PARAMS, ignore_eos=False, min_tokens=end + 1))
    assert eos not in late.token_ids[: end + 1]
    assert len(late.token_ids) > end


def test_a_stop_string_over_several_tokens(engine: Engine, prompt: list[int]) -> None:
    whole = run(engine, prompt, dataclasses.replace(PARAMS, max_tokens=60))
    text = whole.sequence.text.text
    at = next(
        at for at in range(5, len(text) - 4) if text.find(text[at : at + 4]) == at and "\ufffd" not in text[at : at + 4]
    )
    stop = text[at : at + 4]
    result = run(engine, prompt, dataclasses.replace(PARAMS, max_tokens=60, stop=(stop,)))
    assert result.sequence.finish_reason == "stop"
    assert result.sequence.text.text == text[:at]
    assert result.token_ids == whole.token_ids[: len(result.token_ids)]
    assert stop in engine.model.tokenizer.decode(result.token_ids)
    assert stop not in engine.model.tokenizer.decode(result.token_ids[:-1])


def test_min_tokens_holds_stop_strings_back(engine: Engine, prompt: list[int]) -> None:
    params = dataclasses.replace(PARAMS, max_tokens=60, min_tokens=20, stop=tuple("etaoinshr"))
    result = run(engine, prompt, params)
    assert len(result.token_ids) >= 20


def test_a_request_that_may_never_end_is_refused(engine: Engine, prompt: list[int]) -> None:
    """Every token ends the text, and none may: no token is left to choose."""
    params = dataclasses.replace(PARAMS, min_tokens=1, stop_token_ids=tuple(range(VOCAB)))
    with pytest.raises(InvalidInput):
        run(engine, prompt, params)
    assert_idle(engine)


def test_a_stop_token_outside_the_vocabulary_is_refused(engine: Engine, prompt: list[int]) -> None:
    with pytest.raises(InvalidInput, match=f"stop_token_ids: {VOCAB} is not in the vocabulary"):
        new_sequence(engine, prompt, dataclasses.replace(PARAMS, stop_token_ids=(VOCAB,)))
    with pytest.raises(InvalidInput, match=f"logit_bias: token id {VOCAB} is not in the vocabulary"):
        new_sequence(engine, prompt, dataclasses.replace(PARAMS, logit_bias={VOCAB: 1.0}))


# What a request costs.


@pytest.mark.parametrize("token_budget", [1, 7, 40, 512])
@pytest.mark.parametrize(("length", "count"), [(1, 1), (40, 1), (40, 10), (64, 1), (64, 2), (100, 30)])
def test_counts_with_the_cache(tiny: LoadedModel, length: int, count: int, token_budget: int) -> None:
    """Each token goes through the model once, but for the last, which nobody asks about."""
    engine = Engine(tiny, EngineConfig(token_budget=token_budget))
    params = dataclasses.replace(PARAMS, max_tokens=count)
    sequence = run_sequence(engine, new_sequence(engine, random_prompt(tiny, length, 23), params)).sequence
    assert_idle(engine)
    stats = engine.completion(sequence).stats
    computed = length + count - 1
    assert (stats.num_prompt_tokens, stats.num_cached_tokens, stats.num_completion_tokens) == (length, 0, count)
    assert stats.num_computed_tokens == computed
    assert stats.kv_bytes == -(-computed // 32) * engine.kv_spec.block_bytes
    chunks = -(-length // token_budget)
    without, with_logits = (engine.runner.step_bytes(1, num_logits) for num_logits in (0, 1))
    assert without < with_logits
    assert stats.weight_bytes == (chunks - 1) * without + count * with_logits
    assert stats.time_to_first_token_s > 0
    assert (stats.decode_s > 0) == (count > 1)


@pytest.mark.parametrize("token_budget", [7, 512])
@pytest.mark.parametrize(("length", "count"), [(1, 1), (40, 10), (64, 2)])
def test_counts_without_the_cache(tiny: LoadedModel, length: int, count: int, token_budget: int) -> None:
    """Before each token, all tokens before it are computed again."""
    engine = Engine(tiny, EngineConfig(token_budget=token_budget))
    params = dataclasses.replace(PARAMS, max_tokens=count)
    sequence = new_sequence(engine, random_prompt(tiny, length, 24), params, use_cache=False)
    stats = engine.completion(run_sequence(engine, sequence).sequence).stats
    assert stats.num_computed_tokens == count * length + count * (count - 1) // 2
    steps = sum(-(-(length + done) // token_budget) for done in range(count))
    without, with_logits = (engine.runner.step_bytes(1, num_logits) for num_logits in (0, 1))
    assert stats.weight_bytes == steps * without + count * (with_logits - without)
    assert_idle(engine)
    assert engine.cache.pool.num_reusable == 0, "nobody finds what was to be forgotten"


def test_logprobs_and_seed_come_with_the_completion(engine: Engine, prompt: list[int]) -> None:
    sequence = new_sequence(engine, prompt, dataclasses.replace(PARAMS, logprobs=2, seed=77))
    result = run_sequence(engine, sequence)
    completion = engine.completion(sequence)
    assert completion.seed == 77
    assert completion.logprobs is not None
    assert [entry.token_id for entry in completion.logprobs] == result.token_ids == completion.token_ids
    for entry, row in zip(completion.logprobs, result.logits, strict=True):
        assert next(iter(entry.top)) == entry.token_id == row.argmax()
        assert len(entry.top) == 2
    seeds = {new_sequence(engine, prompt, PARAMS).seed for _ in range(5)}
    assert len(seeds) == 5, "a seed of its own is drawn for each request"


# What is refused.


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(tmp_path: Path) -> None:
    engine = Engine(tiny_model(tmp_path, context_length=2000))
    for length in (2000, 2001, 5000):
        with pytest.raises(PromptTooLong) as caught:
            new_sequence(engine, [5] * length, PARAMS)
        assert f"{length:,}" in caught.value.message
        assert "2,000" in caught.value.message
        assert caught.value.hint
    assert new_sequence(engine, [5] * 1999, PARAMS).num_tokens == 1999


def test_an_empty_prompt_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidInput, match="empty"):
        new_sequence(engine, [], PARAMS)


@pytest.mark.parametrize("token_id", [-1, VOCAB, 2**31, -(2**63), 2**64])
def test_a_token_outside_the_vocabulary_is_refused(engine: Engine, token_id: int) -> None:
    with pytest.raises(InvalidInput, match=f"{token_id}") as caught:
        new_sequence(engine, [1, token_id, 2], PARAMS)
    assert f"{VOCAB - 1}" in caught.value.hint
    assert_idle(engine)


# Blocks.


@pytest.mark.parametrize("hold", [False, True])
def test_a_sequence_holds_the_blocks_its_tokens_need_and_no_more(engine: Engine, prompt: list[int], hold: bool) -> None:
    """At its end they go back, to be found again; a lease holds them until it is closed."""
    sequence = new_sequence(engine, prompt, dataclasses.replace(PARAMS, max_tokens=40), hold=hold)
    engine.add(sequence)
    pool = engine.cache.pool
    assert pool.num_held == 0
    while sequence.finish_reason is None:
        engine.step()
        engine.scheduler.check()
        if sequence.finish_reason is None:
            assert len(sequence.table.block_ids) == pool.num_held == -(-sequence.num_computed_tokens // 32)
    assert (pool.num_held, pool.num_reusable) == ((3, 0) if hold else (0, 3))
    assert sequence.table.block_ids == []
    assert (sequence.lease is not None) == hold
    if sequence.lease is not None:
        assert sequence.lease.num_tokens == 79
        sequence.lease.close()
        sequence.lease.close()  # nothing is left to give back
        assert sequence.lease.num_tokens == 0
    assert (pool.num_held, pool.num_reusable) == (0, 3), "79 tokens have a key and a value"
    assert_idle(engine)


@pytest.mark.parametrize("hold", [False, True])
def test_abort_at_every_step(tiny: LoadedModel, hold: bool) -> None:
    engine, prompt = Engine(tiny, EngineConfig(token_budget=50, prefix_cache=False)), random_prompt(tiny, 130, seed=25)
    for num_steps in range(8):
        sequence = new_sequence(engine, prompt, PARAMS, hold=hold)
        engine.add(sequence)
        for _ in range(num_steps):
            engine.step()
        engine.abort(sequence)
        assert sequence.finish_reason == "abort"
        assert sequence.num_completion_tokens == max(0, num_steps - 2)
        engine.scheduler.check()
        num_computed = min(50 * num_steps, 130) + max(0, num_steps - 3)
        assert engine.cache.pool.num_held == (-(-num_computed // 32) if hold else 0)
        if sequence.lease is not None:
            assert sequence.lease.num_tokens == num_computed
            sequence.lease.close()
        assert_idle(engine)


def test_abort_of_a_finished_sequence_changes_nothing(engine: Engine, prompt: list[int]) -> None:
    sequence = run_sequence(engine, new_sequence(engine, prompt, PARAMS)).sequence
    text = sequence.text.text
    engine.abort(sequence)
    assert (sequence.finish_reason, sequence.text.text) == ("length", text)
    assert_idle(engine)


@pytest.mark.parametrize("hold", [False, True])
def test_an_exception_in_a_step_ends_its_sequences_and_leaves_the_accounts_right(
    tiny: LoadedModel, prompt: list[int], hold: bool
) -> None:
    engine, runner = watched_engine(tiny)
    wanted = run(engine, prompt, PARAMS)
    engine.clear_cache()
    sequence = new_sequence(engine, prompt, PARAMS, hold=hold)
    engine.add(sequence)
    engine.step()
    error = ZeroDivisionError()
    runner.before = failing(error)
    result = engine.step()
    assert result is not None
    assert (result.error, result.sequences) == (error, [])
    assert sequence.finish_reason == "abort"
    assert isinstance(sequence.error, StepFailed)
    assert sequence.error.__cause__ is error
    assert sequence.lease is None
    assert_idle(engine)  # nothing is held either: its blocks may be half written
    np.testing.assert_array_equal(run(engine, prompt, PARAMS).logits.view(np.uint32), wanted.logits.view(np.uint32))


# Too few blocks: what could never fit is refused at once; what fits waits, or is preempted, and comes to its end.


@pytest.mark.parametrize("max_tokens", [30, 2000])
def test_what_could_never_fit_is_refused_with_both_numbers_and_a_hint_that_works(
    tiny: LoadedModel, max_tokens: int
) -> None:
    block_bytes = Engine(tiny).kv_spec.block_bytes
    engine = Engine(tiny, EngineConfig(kv_memory=8 * block_bytes))
    prompt, params = random_prompt(tiny, 250, seed=1), dataclasses.replace(PARAMS, max_tokens=max_tokens)
    with pytest.raises(CacheTooSmall) as caught:
        new_sequence(engine, prompt, params)
    most = min(250 + max_tokens, 512)
    assert f"{-(-(most - 1) // 32)} blocks ({most:,} tokens), the cache has 8" in caught.value.message
    found = re.fullmatch(
        r"lower max_tokens to (\d+) or less, or raise kv_memory .* to (\d+) MiB or more", caught.value.hint
    )
    assert found is not None, caught.value.hint
    assert_idle(engine)
    lower, more = int(found[1]), int(found[2])
    for larger in (Engine(tiny, EngineConfig(kv_memory=more << 20)), engine):
        count = lower if larger is engine else max_tokens
        result = run(larger, prompt, dataclasses.replace(params, max_tokens=count))
        assert len(result.token_ids) == min(count, 262)
    with pytest.raises(CacheTooSmall):
        new_sequence(engine, prompt, dataclasses.replace(params, max_tokens=lower + 1))


def test_a_prompt_that_could_never_fit_is_not_told_to_lower_max_tokens(tiny: LoadedModel) -> None:
    engine = Engine(tiny, EngineConfig(kv_memory=8 * Engine(tiny).kv_spec.block_bytes))
    with pytest.raises(CacheTooSmall) as caught:
        new_sequence(engine, random_prompt(tiny, 300, seed=1), PARAMS)
    assert caught.value.hint.startswith("raise kv_memory")


def test_blocks_that_nobody_gives_back_are_an_error_with_numbers(tiny: LoadedModel) -> None:
    """It can only happen to what was promised room before: here another holder takes it away."""
    engine = Engine(tiny, EngineConfig(kv_memory=16 * Engine(tiny).kv_spec.block_bytes))
    waiting = new_sequence(engine, random_prompt(tiny, 250, seed=2), PARAMS)
    running = new_sequence(engine, random_prompt(tiny, 60, seed=26), dataclasses.replace(PARAMS, max_tokens=100))
    blocks = engine.cache.pool.allocate(13)
    assert blocks is not None
    holder = _holder(engine, blocks)
    engine.add(waiting)
    assert engine.step() is None
    assert isinstance(waiting.error, CacheTooSmall)
    assert waiting.error.message == "250 tokens need 8 blocks, of the cache's 16 others hold 13"
    assert (waiting.finish_reason, waiting.table.block_ids) == ("abort", [])
    engine.add(running)
    while running.finish_reason is None:
        engine.step()
        engine.scheduler.check([holder])
    assert isinstance(running.error, CacheTooSmall)
    assert running.error.message == "97 tokens need 4 blocks, of the cache's 16 others hold 13"
    assert running.num_completion_tokens == 37, "what it had written stays"
    engine.cache.pool.release(blocks)
    assert_idle(engine)


def _holder(engine: Engine, blocks: list[int]) -> Sequence:
    sequence = new_sequence(engine, [1], PARAMS)
    sequence.table.block_ids = blocks
    return sequence
