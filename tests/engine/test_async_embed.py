"""Embeddings on the event loop: beside streams, many at once, and left in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from kvik import Embedding
from kvik.config import SamplingParams
from kvik.engine.async_llm import AsyncLLM
from kvik.engine.llm import LLM
from kvik.errors import EngineDead, InvalidInput, StepFailed
from models import assert_idle
from runners import failing, watched_engine

PARAMS = SamplingParams(max_tokens=60, ignore_eos=True)
PROMPTS = [f"prompt number {number}, " * (1 + number % 4) for number in range(12)]


def finish(work: Coroutine[Any, Any, Any]) -> Any:
    """What the work gives, and an error in place of a hang."""
    return asyncio.run(asyncio.wait_for(work, timeout=60))


def assert_same(found: list[Embedding], wanted: list[Embedding]) -> None:
    for mine, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(mine.vector.view(np.uint32), other.vector.view(np.uint32))


def test_embeddings_beside_a_stream_are_those_alone(llm: LLM) -> None:
    wanted = llm.embed(PROMPTS), llm.embed(PROMPTS, "mean")
    text = llm.generate(PROMPTS[0], PARAMS)[0].text
    llm.engine = llm.new_engine()

    async def work() -> None:
        async with AsyncLLM(llm) as engine:
            completed, last, mean = await asyncio.gather(
                engine.generate(PROMPTS[0], PARAMS), engine.embed(PROMPTS), engine.embed(PROMPTS, "mean")
            )
            assert completed[0].text == text
            assert_same(last, wanted[0])
            assert_same(mean, wanted[1])
            assert_same(await engine.embed(PROMPTS[3]), wanted[0][3:4])
            assert await engine.embed([]) == []

    finish(work())
    assert_idle(llm.engine)


def test_more_prompts_than_may_wait(llm: LLM) -> None:
    wanted = llm.embed(PROMPTS)
    llm.engine = llm.new_engine(max_waiting=2, max_running=2)

    async def work() -> list[Embedding]:
        async with AsyncLLM(llm) as engine:
            return await engine.embed(PROMPTS)

    assert_same(finish(work()), wanted)
    assert_idle(llm.engine)


def test_cancelling_aborts_what_is_under_way(llm: LLM) -> None:
    async def work() -> None:
        async with AsyncLLM(llm) as engine:
            task = asyncio.create_task(engine.embed([[5, index, *range(100)] for index in range(40)], "mean"))
            while not llm.engine.scheduler.running:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while llm.engine.scheduler.has_work:
                await asyncio.sleep(0.001)

    finish(work())
    assert_idle(llm.engine)


def test_errors_reach_whoever_asked(llm: LLM) -> None:
    llm.engine, runner = watched_engine(llm.model, llm.config)

    async def work() -> None:
        async with AsyncLLM(llm) as engine:
            with pytest.raises(InvalidInput, match="is not in the vocabulary"):
                await engine.embed([[5], [320]])
            with pytest.raises(TypeError, match="no option 'n'"):
                await engine.embed("a", n=2)  # type: ignore[call-arg]
            runner.before = failing(MemoryError())
            with pytest.raises(StepFailed):
                await engine.embed("Once upon a time")
            assert len(await engine.embed("Once upon a time")) == 1
        with pytest.raises(EngineDead):
            await engine.embed("Once upon a time")

    finish(work())
    assert_idle(llm.engine)
