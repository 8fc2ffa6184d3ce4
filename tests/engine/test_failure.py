"""What fails ends no more than it must, and whoever it ends hears of it."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from kvik.config import SamplingParams
from kvik.engine.async_llm import AsyncLLM
from kvik.engine.events import StepEvent
from kvik.engine.llm import LLM
from kvik.engine.output import Piece
from kvik.engine.session import Session
from kvik.engine.stream import stream_sequence
from kvik.errors import EngineDead, InvalidInput, ModelError, RequestsFailed, StepFailed
from models import altered, assert_idle, run_sequence
from runners import failing, watched_engine
from sequences import new_sequence
from simulation import SimulatedEngine

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
LONG = SamplingParams(max_tokens=150, ignore_eos=True)


def simulated(**options: Any) -> SimulatedEngine:
    return SimulatedEngine(**{"num_blocks": 96, "token_budget": 64, "max_running": 8, "max_waiting": 50} | options)


def served(engine: SimulatedEngine) -> AsyncLLM:
    llm: Any = SimpleNamespace(engine=engine, encode=lambda prompt: prompt)
    return AsyncLLM(llm)


# Completions.


def test_branches_end_with_a_prompt_whose_logits_are_not_finite(tiny_path: Path, tmp_path: Path) -> None:
    """Prompt logprobs are looked at in chunks, before any branch has begun."""
    norm = (np.full(64, np.nan, np.float32), GGMLQuantizationType.F32)
    broken = altered(tiny_path, tmp_path / "nan.gguf", tensors={"output_norm.weight": norm})
    llm = LLM(broken, threads=1, token_budget=16)
    params = SamplingParams(n=3, max_tokens=4, echo=True, logprobs=1)
    with pytest.raises(ModelError, match="are not finite"):
        llm.generate([5] * 60, params)
    assert_idle(llm.engine)


def test_what_is_done_outlives_the_end_of_the_engine(llm: LLM) -> None:
    config = llm.new_engine(max_running=1, max_waiting=2).config
    llm.engine, runner = watched_engine(llm.model, config)
    runner.before = failing(MemoryError(), after=9, times=3)
    with pytest.raises(RequestsFailed) as caught:
        llm.generate([[5, index] for index in range(9)], PARAMS)
    done = [one is not None for one in caught.value.completions]
    assert done == [True, True, *[False] * 7]
    kinds = [type(caught.value.errors[index]) for index in range(2, 9)]
    assert set(kinds) == {StepFailed, EngineDead}


def test_one_completion_that_fails_leaves_the_others_of_its_stream(llm: LLM) -> None:
    params = SamplingParams(n=2, max_tokens=8, ignore_eos=True, seed=1)
    sequence = llm.engine.new_sequence(llm.engine.new_request([5, 6, 7], params))
    first, second = sequence.all_branches()
    add = first.text.add
    count = 0

    def fail(token_id: int, *, may_stop: bool = True) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise ArithmeticError("of this text alone")
        add(token_id, may_stop=may_stop)

    first.text.add = fail  # type: ignore[method-assign]
    pieces: list[Piece] = []
    with pytest.raises(RequestsFailed) as caught:
        pieces.extend(stream_sequence(llm.engine, sequence))
    assert [sum(piece.index == index for piece in pieces) for index in (0, 1)] == [2, 8]
    assert [piece.finish_reason for piece in pieces if piece.completion is not None] == ["length"]
    assert caught.value.completions[1] is not None
    assert second.finish_reason == "length"


# Observers.


def test_an_observer_s_error_tears_nothing_and_keeps_no_other_from_hearing(llm: LLM) -> None:
    heard: list[StepEvent] = []

    def fail(event: StepEvent) -> None:
        raise ValueError("metrics")

    llm.engine.add_observer(fail)
    llm.engine.add_observer(heard.append)
    with pytest.raises(ValueError, match="metrics"):
        llm.generate("Hello", PARAMS)
    llm.engine.remove_observer(fail)
    assert len(heard) == 1
    assert len(llm.generate("Hello", PARAMS)[0].token_ids) == 4
    assert_idle(llm.engine)


def test_observers_of_a_server_may_fail_while_it_serves() -> None:
    engine = simulated()

    def fail(event: StepEvent) -> None:
        raise ValueError("metrics")

    engine.add_observer(fail)

    async def work() -> int:
        async with served(engine) as llm:
            return len((await llm.generate([1, 2], LONG))[0].token_ids)

    assert asyncio.run(work()) == 150


def test_an_observer_may_look_and_must_not_touch(llm: LLM) -> None:
    looked: list[int] = []

    def look(event: StepEvent) -> None:
        looked.append(len(llm.cache.tree()))
        with pytest.raises(RuntimeError, match="must not call"):
            llm.cache.clear()

    llm.engine.add_observer(look)
    llm.generate("Hello " * 40, PARAMS)
    assert max(looked) > 0


def test_whoever_watches_hears_once_of_every_beginning_and_end() -> None:
    engine = simulated(max_running=1)
    begun: list[int] = []
    ended: list[int] = []
    numbers: dict[Any, int] = {}

    def note(event: StepEvent) -> None:
        begun.extend(numbers[sequence] for sequence in event.begun)
        ended.extend(numbers[sequence] for sequence in event.ended)

    engine.add_observer(note)
    sequences = [new_sequence(engine, [1, index], SamplingParams(max_tokens=3, n=2, seed=1)) for index in range(4)]
    for sequence in sequences:
        for branch in sequence.all_branches():
            numbers[branch] = len(numbers)
        engine.add(sequence)
    engine.step()
    engine.abort(sequences[1], sequences[3])
    while engine.step() is not None:
        pass
    assert sorted(ended) == list(range(8))
    assert sorted(begun) == [0, 1, 4, 5], "the others were aborted before"
    assert engine.step() is None


# Leases.


def test_a_forgotten_lease_is_given_back_whatever_holds_the_lock(llm: LLM) -> None:
    """Also the pin of a session: else requests would be refused for blocks that nobody holds."""
    llm.engine = llm.new_engine(kv_memory=8 * llm.engine.kv_spec.block_bytes)
    session = Session(llm)
    session.append("user", "Why is the sky blue? " * 5)
    session.generate(PARAMS)
    session.pin()
    assert llm.engine.cache.num_pinned >= 2
    with llm.engine.lock:
        del session
        gc.collect()
    assert len(llm.generate([5, 6] * 110, PARAMS)[0].token_ids) == 4


def test_an_aborted_sequence_is_not_kept_for_observers_that_are_not_there(llm: LLM) -> None:
    sequence = new_sequence(llm.engine, [5] * 40, LONG, hold=True)
    llm.engine.add(sequence)
    llm.engine.step()
    llm.engine.abort(sequence)
    del sequence
    llm.engine.step()
    gc.collect()
    assert llm.engine.cache.pool.num_held == 0


@pytest.mark.parametrize(
    ("change", "hint"), [({}, "more than 32 tokens"), ({"prefix_cache": False}, "need the prefix cache")]
)
def test_a_pin_of_nothing_is_refused(llm: LLM, change: dict[str, Any], hint: str) -> None:
    engine = llm.new_engine(**change)
    sequence = new_sequence(engine, [5] * (20 if not change else 70), PARAMS, hold=True)
    run_sequence(engine, sequence)
    assert sequence.lease is not None
    with pytest.raises(InvalidInput) as caught:
        sequence.lease.pin()
    assert hint in caught.value.hint


# Options.


@pytest.mark.parametrize("options", [{"lease": None}, {"hold": False}, {"bogus": 1}])
def test_a_session_takes_the_options_that_it_can_honour(llm: LLM, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="there is no option"):
        Session(llm, **options)


def test_a_route_without_leases_takes_none(llm: LLM) -> None:
    with pytest.raises(TypeError, match="there is no option 'hold'"):
        llm.generate("Hello", PARAMS, hold=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="there is no option 'template_vars'"):
        llm.generate("Hello", PARAMS, template_vars={})  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="there is no option 'bogus'"):
        llm.chat([{"role": "user", "content": "Hello"}], PARAMS, bogus=1)  # type: ignore[call-arg]


# AsyncLLM.


def slow(llm: LLM) -> LLM:
    """Steps of 5 ms or more, so that a long answer is still being written when something happens to it."""
    llm.engine, runner = watched_engine(llm.model, llm.config)
    runner.before = lambda batch: time.sleep(0.005)
    return llm


def test_a_newer_turn_of_a_session_ends_the_one_before_it(llm: LLM) -> None:
    slow(llm)

    async def work() -> Any:
        async with AsyncLLM(llm) as served, served.session() as session:
            session.append("user", "Hello")
            first = asyncio.create_task(session.generate(LONG))
            while llm.engine.scheduler.running == []:
                await asyncio.sleep(0.001)
            second = asyncio.create_task(session.generate(PARAMS))
            return await asyncio.wait_for(asyncio.gather(first, second, return_exceptions=True), 30)

    first, second = asyncio.run(work())
    assert isinstance(first, InvalidInput)
    assert "a newer one began" in first.message
    assert len(second.token_ids) == 4
    assert_idle(llm.engine)


def test_a_session_closed_while_it_writes_says_so(llm: LLM) -> None:
    slow(llm)

    async def work() -> Any:
        async with AsyncLLM(llm) as served:
            session = served.session()
            session.append("user", "Hello")
            task = asyncio.create_task(session.generate(LONG))
            while llm.engine.scheduler.running == []:
                await asyncio.sleep(0.001)
            await session.close()
            return (await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 30))[0]

    assert isinstance(asyncio.run(work()), InvalidInput)
    assert_idle(llm.engine)


def test_an_early_end_of_a_turn_keeps_what_it_wrote(llm: LLM) -> None:
    slow(llm)

    async def work() -> None:
        async with AsyncLLM(llm) as served, served.session() as session:
            session.append("user", "Hello, I am talking to you and to nobody else")
            stream = session.stream(LONG)
            text = "".join([(await anext(stream)).text for _ in range(3)])
            await stream.aclose()  # type: ignore[attr-defined]
            assert session.messages[-1]["role"] == "assistant"
            assert str(session.messages[-1]["content"]).startswith(text)
            fork = await session.fork()
            for each in (session, fork):
                each.append("user", "Go on")
                assert (await each.generate(PARAMS)).stats.num_cached_tokens > 32
            await session.pin()
            await session.unpin()
            await fork.close()

    asyncio.run(work())
    assert_idle(llm.engine)


def test_whatever_keeps_a_request_from_beginning_reaches_the_one_who_asked() -> None:
    engine = simulated()
    match = engine.cache.match

    def fail(token_ids: Any, *arguments: Any) -> Any:
        if 7 in token_ids:
            raise MemoryError("no room for a match")
        return match(token_ids, *arguments)

    engine.cache.match = fail  # type: ignore[method-assign, assignment]

    async def work() -> list[Any]:
        async with served(engine) as llm:
            others = [asyncio.create_task(llm.generate([1, index], LONG)) for index in range(3)]
            await asyncio.sleep(0.01)
            bad = await asyncio.wait_for(asyncio.gather(llm.generate([7, 1], PARAMS), return_exceptions=True), 20)
            assert llm.is_alive
            return [*bad, *await asyncio.gather(*others)]

    bad, *others = asyncio.run(work())
    assert isinstance(bad, MemoryError)
    assert [len(one[0].token_ids) for one in others] == [150] * 3


def test_an_engine_that_has_ended_is_not_alive() -> None:
    engine = simulated()

    async def work() -> None:
        async with served(engine) as llm:
            for _ in range(3):
                engine.runner.fails = True
                with pytest.raises((StepFailed, EngineDead)):
                    await llm.generate([1, 2], PARAMS)
            assert not llm.is_alive
            with pytest.raises(EngineDead):
                await llm.generate([1, 2], PARAMS)

    asyncio.run(work())


# Ctrl-C.


def test_ctrl_c_comes_while_another_thread_has_the_lock(llm: LLM) -> None:
    """Waiting is no change of anything: a step that hangs elsewhere must not make a program deaf."""
    has_it, let_go = threading.Event(), threading.Event()

    def hang() -> None:
        with llm.engine.lock:
            has_it.set()
            let_go.wait(20)

    thread = threading.Thread(target=hang)
    thread.start()
    has_it.wait(20)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    started_s = time.monotonic()
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.cache.clear()
        assert time.monotonic() - started_s < 15
    finally:
        let_go.set()
        thread.join()
        timer.join()
    assert_idle(llm.engine)
