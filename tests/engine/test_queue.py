"""Who is served when, who is refused, and that one request's misfortune is its own."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from kvik.config import EngineConfig, SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.scheduler import PRIORITY_STEPS
from kvik.engine.sequence import Sequence
from kvik.errors import CacheTooSmall, InvalidInput, QueueFull, StepFailed
from kvik.models.loader import LoadedModel
from models import assert_idle, random_prompt, run
from runners import failing, watched_engine
from sequences import new_sequence

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


def small(model: LoadedModel, num_superblocks: int, **options: Any) -> Engine:
    """An engine whose cache has room for 256 tokens a superblock."""
    superblock_bytes = 8 * model.decoder.spec.kv_spec("f16").block_bytes
    return Engine(model, EngineConfig(kv_memory=num_superblocks * superblock_bytes, **options))


def queue(engine: Engine, prompt: list[int], params: SamplingParams = PARAMS, **options: Any) -> Sequence:
    sequence = new_sequence(engine, prompt, params, **options)
    engine.add(sequence)
    return sequence


def order_of_ends(engine: Engine) -> list[Sequence]:
    ended: list[Sequence] = []
    while (result := engine.step()) is not None:
        engine.scheduler.check()
        ended += [sequence for sequence in result.sequences if sequence.finish_reason is not None]
    return ended


def test_first_come_first_served(tiny: LoadedModel) -> None:
    engine = Engine(tiny, EngineConfig(max_running=1))
    sequences = [queue(engine, random_prompt(tiny, 20, seed=index)) for index in range(4)]
    assert order_of_ends(engine) == sequences


def test_a_higher_priority_is_served_earlier(tiny: LoadedModel) -> None:
    engine = Engine(tiny, EngineConfig(max_running=1))
    low, middle, high = (
        queue(engine, random_prompt(tiny, 20, seed=index), priority=priority)
        for index, priority in enumerate((-1, 0, 1))
    )
    assert order_of_ends(engine) == [high, middle, low]


def test_a_low_priority_is_not_starved(tiny: LoadedModel) -> None:
    """A stream of higher ones that never ends: after so many steps it is the low one's turn all the same."""
    engine = Engine(tiny, EngineConfig(max_running=1))
    low = queue(engine, random_prompt(tiny, 10, seed=0), priority=-1)
    one = dataclasses.replace(PARAMS, max_tokens=1)
    for index in range(PRIORITY_STEPS + 20):
        queue(engine, [index % 300, 7], one)
        engine.step()
        if low.num_completion_tokens:
            break
    assert low.num_completion_tokens > 0
    assert index >= PRIORITY_STEPS - 20, "a level of priority is worth that many steps"


def test_long_prompts_do_not_hold_up_those_who_write(tiny: LoadedModel) -> None:
    """A prompt takes what is left of the budget: the one that writes gets a token in every step."""
    engine = Engine(tiny, EngineConfig(token_budget=33))
    writer = queue(engine, random_prompt(tiny, 5, seed=1), dataclasses.replace(PARAMS, max_tokens=30))
    engine.step()
    queue(engine, random_prompt(tiny, 320, seed=2))
    for count in range(2, 12):
        engine.step()
        assert writer.num_completion_tokens == count
    assert_idle_after(engine)


def assert_idle_after(engine: Engine) -> None:
    while engine.step() is not None:
        engine.scheduler.check()
    assert_idle(engine)


@pytest.mark.parametrize("hold", [False, True])
def test_a_prompt_that_was_left_half_way_keeps_nobody_waiting(tiny: LoadedModel, hold: bool) -> None:
    """While it is computed, others that begin alike wait for its blocks."""
    engine, prompt = Engine(tiny, EngineConfig(token_budget=40)), random_prompt(tiny, 200, seed=6)
    first = queue(engine, prompt, hold=hold)
    engine.step()
    second = queue(engine, prompt)
    engine.step()
    assert (len(engine.scheduler.waiting), first.num_computed_tokens) == (1, 80)
    engine.abort(first)
    assert order_of_ends(engine) == [second]
    assert second.costs.num_cached_tokens == 80
    if first.lease is not None:
        first.lease.close()
    assert_idle(engine)


def test_nobody_begins_on_the_block_that_another_needs_next(tiny: LoadedModel) -> None:
    """Else a long prompt would be computed only to make room again a few steps later."""
    engine = small(tiny, 1)
    writer = queue(engine, random_prompt(tiny, 31, seed=1), dataclasses.replace(PARAMS, max_tokens=40))
    engine.step()
    long = queue(engine, random_prompt(tiny, 210, seed=2))  # seven blocks: all that are left
    assert order_of_ends(engine) == [writer, long]
    assert engine.scheduler.num_preemptions == 0


def test_a_full_queue_is_refused(tiny: LoadedModel) -> None:
    engine = Engine(tiny, EngineConfig(max_running=1, max_waiting=2))
    for index in range(2):
        queue(engine, [1, 2, index])
    with pytest.raises(QueueFull, match="2 requests wait, the engine takes 2") as caught:
        queue(engine, [1, 2, 3])
    assert caught.value.hint
    engine.step()  # one begins
    queue(engine, [1, 2, 3])
    assert_idle_after(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_abort_releases_everything_wherever_it_comes(tiny: LoadedModel, num_steps: int) -> None:
    engine = Engine(tiny, EngineConfig(token_budget=50, max_running=3))
    several = dataclasses.replace(PARAMS, n=3, max_tokens=20)
    sequences = [queue(engine, random_prompt(tiny, 60, seed=index), several) for index in range(3)]
    branches = [branch for sequence in sequences for branch in sequence.all_branches()]
    for _ in range(num_steps):
        engine.step()
    for branch in branches:
        engine.abort(branch)
        engine.scheduler.check()
    assert all(branch.finish_reason == "abort" for branch in branches)
    assert_idle(engine)


def test_what_never_fits_is_refused_with_both_numbers_and_a_hint_that_works(tiny: LoadedModel) -> None:
    prompt = random_prompt(tiny, 300, seed=3)
    engine = small(tiny, 1)
    with pytest.raises(CacheTooSmall) as caught:
        new_sequence(engine, prompt, PARAMS)
    assert "10 blocks (308 tokens), the cache has 8" in caught.value.message
    mebibytes = re.search(r"raise kv_memory \(`--kv-memory`\) to ([\d,]+) MiB", caught.value.hint)
    assert mebibytes is not None
    larger = Engine(tiny, EngineConfig(kv_memory=int(mebibytes[1].replace(",", "")) << 20))
    assert len(run(larger, prompt, PARAMS).token_ids) == 8
    assert_idle(engine)


def test_the_hint_names_the_max_tokens_that_fit(tiny: LoadedModel) -> None:
    engine = small(tiny, 1)
    prompt = random_prompt(tiny, 200, seed=3)
    with pytest.raises(CacheTooSmall) as caught:
        new_sequence(engine, prompt, dataclasses.replace(PARAMS, max_tokens=100))
    room = re.search(r"lower max_tokens to (\d+) or less", caught.value.hint)
    assert room is not None
    fitting = dataclasses.replace(PARAMS, max_tokens=int(room[1]))
    assert len(run(engine, prompt, fitting).token_ids) == int(room[1])
    with pytest.raises(CacheTooSmall):
        new_sequence(engine, prompt, dataclasses.replace(PARAMS, max_tokens=int(room[1]) + 1))


@pytest.mark.parametrize("salt", ["", "a\x00b", "a\nb", "x" * 257, "\ud800", 7, b"salt"])
def test_a_bad_salt_is_refused(tiny: LoadedModel, salt: Any) -> None:
    with pytest.raises(InvalidInput, match="salt"):
        new_sequence(Engine(tiny), [1, 2], PARAMS, salt=salt)


@pytest.mark.parametrize("priority", [101, -101, 1.0, None, True, "1"])
def test_a_bad_priority_is_refused(tiny: LoadedModel, priority: Any) -> None:
    with pytest.raises(InvalidInput, match="priority"):
        new_sequence(Engine(tiny), [1, 2], PARAMS, priority=priority)


def test_nothing_is_shared_across_salts(tiny: LoadedModel) -> None:
    engine, prompt = Engine(tiny), random_prompt(tiny, 100, seed=4)
    cached = []
    for salt in (None, "ada", "bob", "ada", None):
        sequence = queue(engine, prompt, salt=salt)
        while engine.step() is not None:
            pass
        cached.append(sequence.costs.num_cached_tokens)
    assert cached == [0, 0, 0, 99, 99]


def test_a_turn_of_another_salt_takes_nothing_over(tiny: LoadedModel) -> None:
    engine, prompt = Engine(tiny), random_prompt(tiny, 100, seed=4)
    previous = queue(engine, prompt, hold=True, salt="ada")
    while engine.step() is not None:
        pass
    assert previous.lease is not None
    turn = queue(engine, [*prompt, 5], salt="bob", lease=previous.lease)
    engine.step()
    assert turn.costs.num_cached_tokens == 0
    assert turn.table.namespace.salt == "bob"
    previous.lease.close()
    assert_idle_after(engine)


def test_a_request_that_fails_while_it_is_sampled_fails_alone(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [random_prompt(tiny, 30, seed=index) for index in range(3)]
    alone = [run(Engine(tiny), prompt, PARAMS) for prompt in prompts]
    engine = Engine(tiny)
    sequences = [queue(engine, prompt) for prompt in prompts]
    failure = ArithmeticError("of this text alone")

    def fail(token_id: int, *, may_stop: bool = True) -> None:
        raise failure

    for _ in range(3):
        engine.step()
    monkeypatch.setattr(sequences[1].text, "add", fail)
    while engine.step() is not None:
        engine.scheduler.check()
    assert sequences[1].error is failure
    assert sequences[1].finish_reason == "abort"
    for index in (0, 2):
        assert sequences[index].completion_ids == alone[index].token_ids
    assert_idle(engine)


def test_a_step_that_fails_ends_its_requests_and_leaves_the_cache_in_order(tiny: LoadedModel) -> None:
    (engine, runner), prompt = watched_engine(tiny), random_prompt(tiny, 70, seed=5)
    wanted = run(Engine(tiny), prompt, PARAMS)
    error = MemoryError("no room for this step")
    sequences = [queue(engine, prompt), queue(engine, [*prompt, 5])]
    engine.step()
    runner.before = failing(error)
    result = engine.step()
    assert result is not None
    assert result.error is error
    engine.scheduler.check()
    failed = [sequence.error for sequence in sequences if sequence.error is not None]
    assert failed
    assert all(isinstance(each, StepFailed) and each.__cause__ is error for each in failed)
    assert len({id(each) for each in failed}) == len(failed), "an error of its own"
    assert_idle_after(engine)
    assert run(engine, prompt, PARAMS).token_ids == wanted.token_ids
