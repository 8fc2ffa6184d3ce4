"""AsyncLLM under load, on the engine whose model tells on the cache: each task gets its answer or its own error."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from kvik.config import SamplingParams
from kvik.engine import async_llm
from kvik.engine.async_llm import AsyncLLM
from kvik.engine.output import Completion
from kvik.errors import InvalidInput, SlowReader, StepFailed
from simulation import VOCAB, SimulatedEngine, expected_sequence

NUM_TASKS = 300
SEED = 5


def served(engine: SimulatedEngine) -> AsyncLLM:
    llm: Any = SimpleNamespace(engine=engine, encode=lambda prompt: prompt)
    return AsyncLLM(llm)


async def use(
    llm: AsyncLLM, prompt: list[int], params: SamplingParams, salt: str | None, kind: str
) -> list[Completion] | None:
    """The completions, or `None` where the client left."""
    if kind == "generate":
        return await llm.generate(prompt, params, salt=salt)
    done: list[Completion] = []
    text: Counter[int] = Counter()
    stream = llm.stream(prompt, params, salt=salt)
    try:
        async for piece in stream:
            text[piece.index] += len(piece.text)
            if piece.completion is not None:
                assert len(piece.completion.text) == text[piece.index]
                assert piece.finish_reason == piece.completion.finish_reason
                done.append(piece.completion)
            elif kind == "leave" and sum(text.values()) > 5:
                return None
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
    return done


async def crowd(engine: SimulatedEngine, rng: random.Random) -> list[tuple[Any, list[int], SamplingParams, str | None]]:
    beginnings = [[rng.randrange(VOCAB) for _ in range(60)] for _ in range(4)]
    results = []
    async with served(engine) as llm:
        tasks = []
        for index in range(NUM_TASKS):
            prompt = [*rng.choice(beginnings)[: rng.randrange(1, 60)], rng.randrange(VOCAB)]
            params = SamplingParams(
                max_tokens=rng.choice((1, 5, 30)),
                ignore_eos=True,
                n=rng.choice((1, 1, 2)),
                seed=index,
                temperature=rng.choice((0.0, 1.0)),
            )
            salt = rng.choice((None, None, "ada"))
            kind = rng.choice(("generate", "stream", "stream", "leave"))
            task = asyncio.create_task(use(llm, prompt, params, salt, kind))
            tasks.append((task, prompt, params, salt))
            if index == NUM_TASKS // 2:
                engine.runner.fails = True
            if rng.random() < 0.2:
                rng.choice(tasks)[0].cancel()
            if rng.random() < 0.1:
                await asyncio.sleep(0)
        for task, prompt, params, salt in tasks:
            outcome = await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 60)
            results.append((outcome[0], prompt, params, salt))
    return results


def test_a_crowd_of_tasks_of_which_some_leave_and_one_step_fails() -> None:
    engine = SimulatedEngine(num_blocks=8 * 12, token_budget=64, max_running=16, max_waiting=NUM_TASKS)
    results = asyncio.run(crowd(engine, random.Random(SEED)))
    outcomes: Counter[str] = Counter()
    for outcome, prompt, params, salt in results:
        if isinstance(outcome, BaseException):
            assert isinstance(outcome, asyncio.CancelledError | StepFailed), repr(outcome)
        elif outcome is not None:
            assert len(outcome) == params.n
            for one in outcome:
                wanted = expected_sequence(engine, prompt, params, one.seed, salt)
                assert (one.token_ids, one.finish_reason) == (wanted.completion_ids, wanted.finish_reason)
        outcomes[type(outcome).__name__] += 1
    assert outcomes["list"] > 100, outcomes
    assert outcomes["CancelledError"] > 20, outcomes
    assert outcomes["NoneType"] > 10, outcomes
    assert 1 <= outcomes["StepFailed"] <= 16, outcomes
    engine.clear_cache()
    engine.scheduler.check()
    assert engine.cache.pool.num_free == engine.cache.pool.num_blocks
    assert not engine.scheduler.has_work
    assert not engine.cache.holds


def test_a_reader_that_does_not_read_loses_its_own_request_alone(monkeypatch: Any) -> None:
    monkeypatch.setattr(async_llm, "MAX_PIECES", 30)
    engine = SimulatedEngine(num_blocks=8 * 12, token_budget=64, max_running=16, max_waiting=50)
    long = SamplingParams(max_tokens=200, ignore_eos=True)

    async def work() -> tuple[int, list[Completion]]:
        async with served(engine) as llm:
            slow = llm.stream([1, 2, 3], long)
            await anext(slow)
            others = await asyncio.gather(*(llm.generate([5, index], long) for index in range(4)))
            count = 1
            try:
                async for _ in slow:
                    count += 1
            except SlowReader:
                return count, [one for each in others for one in each]
        raise AssertionError("nobody told the slow reader")

    count, others = asyncio.run(work())
    assert 1 <= count < 200
    assert [len(one.token_ids) for one in others] == [200] * 4
    assert engine.cache.pool.num_held == 0


def test_nobody_waits_for_a_step_to_be_admitted() -> None:
    """While a step hangs, requests are checked and queued, and the event loop goes on."""
    engine = SimulatedEngine(num_blocks=8 * 12, token_budget=64, max_running=16, max_waiting=50)
    go, started = threading.Event(), threading.Event()

    def hang() -> None:
        started.set()
        assert go.wait(30)

    engine.runner.before = hang

    async def work() -> list[list[Completion]]:
        async with served(engine) as llm:
            params = SamplingParams(max_tokens=3, ignore_eos=True)
            first = asyncio.create_task(llm.generate([1, 2, 3], params))
            await asyncio.to_thread(started.wait, 30)
            begun_s = time.monotonic()
            tasks = [asyncio.create_task(llm.generate([index % VOCAB], params)) for index in range(20)]
            with pytest.raises(InvalidInput):
                await llm.generate([VOCAB], params)
            assert engine.scheduler.waiting == [], "they are in the inbox"
            assert time.monotonic() - begun_s < 5
            go.set()
            return list(await asyncio.gather(first, *tasks))

    assert all(len(one[0].token_ids) == 3 for one in asyncio.run(work()))


def test_requests_of_an_event_loop_that_is_gone_end() -> None:
    engine = SimulatedEngine(num_blocks=8 * 12, token_budget=64, max_running=16, max_waiting=50)
    params = SamplingParams(max_tokens=300, ignore_eos=True)
    go = threading.Event()
    engine.runner.before = lambda: time.sleep(0.001)

    async def begin() -> tuple[AsyncLLM, Any]:
        llm = served(engine)
        stream = llm.stream([1, 2, 3], params)
        await anext(stream)
        return llm, stream

    loop = asyncio.new_event_loop()
    llm, stream = loop.run_until_complete(begin())
    loop.close()
    deadline_s = time.monotonic() + 20
    while engine.scheduler.has_work and time.monotonic() < deadline_s:
        go.wait(0.01)
    assert not engine.scheduler.has_work
    assert engine.cache.pool.num_held == 0
    asyncio.run(llm.close())
    del stream
