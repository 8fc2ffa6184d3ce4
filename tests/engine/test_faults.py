"""Faults that users reported, each as it was seen."""

from __future__ import annotations

import gc
import random
from weakref import ref

import pytest

from kvik.cache import MissReason
from kvik.config import SamplingParams
from kvik.engine.llm import LLM
from kvik.engine.output import TextStream
from kvik.engine.session import Session
from kvik.errors import CacheTooSmall, EngineDead, InvalidInput, QueueFull, RequestsFailed, StepFailed
from models import assert_idle, run_sequence
from runners import failing, watched_engine
from sequences import new_sequence
from simulation import FakeTokenizer, SimulatedEngine

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)


def talked(llm: LLM) -> Session:
    session = Session(llm, system="Short.")
    session.append("user", "the rain in the rain on a " * 3)
    session.generate(SamplingParams(max_tokens=20, ignore_eos=True))
    return session


def test_a_stream_that_is_never_read_leaves_the_turn_before_it_with_its_session(llm: LLM) -> None:
    session = talked(llm)
    session.append("user", "on")
    for _ in range(2):
        session.stream(PARAMS)
    session.rewind(1)
    session.append("user", "And?")
    assert session.generate(PARAMS).stats.num_cached_tokens > 60
    session.close()
    assert_idle(llm.engine)


def test_a_full_queue_is_told_as_such_and_leaves_the_conversation_as_it_was(llm: LLM) -> None:
    llm.engine = llm.new_engine(max_waiting=1, max_running=1)
    session = talked(llm)
    other = new_sequence(llm.engine, [1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True))
    llm.engine.add(other)
    session.append("user", "And?")
    messages = list(session.messages)
    with pytest.raises(QueueFull) as caught:
        session.generate(PARAMS)
    assert caught.value.__context__ is None
    assert (session.messages, len(session.turns)) == (messages, 1)
    while llm.engine.step() is not None:
        pass
    assert session.generate(PARAMS).stats.num_cached_tokens > 60
    session.close()
    assert_idle(llm.engine)


def test_a_prompt_that_goes_on_is_no_miss_by_other_tokens(llm: LLM) -> None:
    engine, prompt = llm.new_engine(prefix_cache=False), llm.encode("the rain in the rain on a " * 3)
    first = run_sequence(engine, new_sequence(engine, prompt, PARAMS, hold=True)).sequence
    assert first.lease is not None
    known = first.token_ids[:-1]
    for more, reason in (([5] * 40, MissReason.UNSEEN), ([5], MissReason.SHORT), ([], MissReason.ALL)):
        turn = run_sequence(engine, new_sequence(engine, [*known, *more, 7], PARAMS, lease=first.lease)).sequence
        assert (turn.costs.num_cached_tokens, turn.costs.miss_reason) == (len(known), reason)
    other = [*known[:-1], known[-1] ^ 1, *[5] * 40]
    turn = run_sequence(engine, new_sequence(engine, other, PARAMS, lease=first.lease)).sequence
    assert turn.costs.miss_reason is MissReason.DIFFERS
    first.lease.close()


def test_the_hit_rate_is_of_prompts_and_not_of_preempted_requests_own_work() -> None:
    engine = SimulatedEngine(num_blocks=16, token_budget=64, max_running=8, max_waiting=50)
    rng = random.Random(1)
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    sequences = [new_sequence(engine, [rng.randrange(10) for _ in range(100)], params) for _ in range(4)]
    for sequence in sequences:
        engine.add(sequence)
    while engine.step() is not None:
        pass
    assert engine.scheduler.num_preemptions > 0
    assert engine.cache.stats.num_queries == 4
    assert engine.cache.stats.num_queried_tokens == 4 * 99
    assert engine.cache.stats.num_cached_tokens == sum(sequence.costs.num_cached_tokens for sequence in sequences) == 0
    assert engine.cache.stats.hit_rate == 0.0


def test_any_number_of_requests_may_be_refused_in_one_step() -> None:
    engine = SimulatedEngine(num_blocks=16, token_budget=64, max_running=1, max_waiting=2000)
    rng = random.Random(1)
    prompt = [rng.randrange(10) for _ in range(300)]
    sequences = [new_sequence(engine, prompt, SamplingParams(max_tokens=1)) for _ in range(1500)]
    engine.cache.pool.allocate(13)
    for sequence in sequences:
        engine.add(sequence)
    assert engine.step() is None
    assert all(isinstance(sequence.error, CacheTooSmall) for sequence in sequences)


def test_the_text_of_a_long_answer_is_not_copied_for_each_token() -> None:
    """Each token's text stands alone, and is put together when somebody asks for all of it."""
    text = TextStream(FakeTokenizer())  # type: ignore[arg-type]
    for _ in range(1000):
        text.add(1)
    assert max(map(len, text.parts)) == 1
    assert text.text == "b" * 1000


def test_completions_that_are_whole_outlive_one_that_failed(llm: LLM) -> None:
    prompts = ["Once upon a time", "Hello there"]
    wanted = [one.token_ids for one in llm.generate(prompts, PARAMS)]
    llm.engine, runner = watched_engine(llm.model, llm.new_engine(max_running=1).config)
    error = MemoryError("no room")
    runner.before = failing(error, after=4)
    with pytest.raises(
        RequestsFailed, match=r"1 of 2 completions failed, the first of them 1: .*MemoryError"
    ) as caught:
        llm.generate(prompts, PARAMS)
    first, second = caught.value.completions
    assert first.token_ids == wanted[0]
    assert second is None
    assert caught.value.errors.keys() == {1}
    assert caught.value.errors[1].__cause__ is error
    assert caught.value.__cause__ is caught.value.errors[1]
    assert_idle(llm.engine)


def test_three_failing_steps_in_a_row_end_the_engine_and_two_do_not(llm: LLM) -> None:
    llm.engine, runner = watched_engine(llm.model, llm.config)
    for _ in range(3):
        runner.before = failing(MemoryError(), times=2)
        for _ in range(2):
            with pytest.raises(StepFailed, match="MemoryError"):
                llm.generate("Hello", PARAMS)
        assert len(llm.generate("Hello", PARAMS)[0].token_ids) == 4
    runner.before = failing(MemoryError(), times=3)
    for _ in range(3):
        with pytest.raises((StepFailed, EngineDead), match="MemoryError"):
            llm.generate("Hello", PARAMS)
    with pytest.raises(EngineDead, match="3 steps failed, one after the other: MemoryError"):
        llm.generate("Hello", PARAMS)


def test_a_lease_of_another_engine_is_no_lease(llm: LLM) -> None:
    """Its blocks have the same numbers and hold something else."""
    prompt = llm.encode("the rain in the rain on a " * 3)
    engines = [llm.new_engine() for _ in range(2)]
    sequence = new_sequence(engines[0], prompt, PARAMS, hold=True)
    engines[0].add(sequence)
    while engines[0].step() is not None:
        pass
    assert sequence.lease is not None
    other = new_sequence(engines[1], prompt, PARAMS, lease=sequence.lease)
    engines[1].add(other)
    while engines[1].step() is not None:
        engines[1].scheduler.check()
    assert other.costs.num_cached_tokens == 0
    assert other.token_ids == sequence.token_ids
    with pytest.raises(InvalidInput, match="lease is 5"):
        new_sequence(engines[0], prompt, PARAMS, lease=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no option 'park'"):
        new_sequence(engines[0], prompt, PARAMS, park=True)  # type: ignore[call-arg]


def test_an_engine_is_gone_with_the_last_reference_to_it(llm: LLM) -> None:
    """Its memory must not wait for the garbage collector, which the command line calls rarely."""
    sequence = new_sequence(llm.engine, [1, 2, 3], PARAMS, hold=True)
    run_sequence(llm.engine, sequence)
    engine, lease = ref(llm.engine), sequence.lease
    assert lease is not None
    gc.disable()
    try:
        llm.engine = llm.new_engine()
        assert engine() is None
    finally:
        gc.enable()
    lease.close()
