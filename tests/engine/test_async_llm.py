"""Many tasks and one engine thread: nobody waits for ever, and nobody's trouble is another's."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from kvik.config import SamplingParams
from kvik.engine import async_llm
from kvik.engine.async_llm import AsyncLLM
from kvik.engine.events import StepEvent
from kvik.engine.interrupts import OwnedLock
from kvik.engine.llm import LLM
from kvik.engine.output import Completion
from kvik.engine.stream import run_all
from kvik.errors import EngineDead, InvalidInput, QueueFull, SlowReader
from models import assert_idle

PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
PROMPTS = [f"prompt number {number}, " * (1 + number % 4) for number in range(12)]


def finish(work: Coroutine[Any, Any, Any]) -> Any:
    """What the work gives, and an error in place of a hang."""
    return asyncio.run(asyncio.wait_for(work, timeout=60))


def slow_down(llm: LLM) -> None:
    """Steps that take a while, so that what is to come in the middle of a request does."""
    step = llm.engine.step

    def slow_step() -> object:
        time.sleep(0.002)
        return step()

    llm.engine.step = slow_step  # type: ignore[method-assign, assignment]


async def text_of(llm: AsyncLLM, prompt: str, params: SamplingParams = PARAMS) -> str:
    return "".join([piece.text async for piece in llm.stream(prompt, params)])


async def until_idle(llm: LLM) -> None:
    """All blocks free within a second or so: some steps."""
    for _ in range(200):
        if not llm.engine.scheduler.has_work:
            break
        await asyncio.sleep(0.01)
    assert_idle(llm.engine)


def test_streams_side_by_side_write_what_each_would_alone(llm: LLM) -> None:
    wanted = [completion.text for completion in llm.generate(PROMPTS, PARAMS)]

    async def work() -> list[str]:
        async with AsyncLLM(llm) as engine:
            return await asyncio.gather(*(text_of(engine, prompt) for prompt in PROMPTS))

    assert finish(work()) == wanted
    assert_idle(llm.engine)


def test_the_last_piece_carries_the_completion(llm: LLM) -> None:
    async def work() -> list[Completion | None]:
        async with AsyncLLM(llm) as engine:
            return [piece.completion async for piece in engine.stream("Once", PARAMS)]

    *others, last = finish(work())
    assert others == [None] * 19
    assert last == llm.generate("Once", PARAMS)[0] or last.token_ids == llm.generate("Once", PARAMS)[0].token_ids


def test_several_completions_of_one_prompt(llm: LLM) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=3, n=4, ignore_eos=True)
    wanted = [completion.token_ids for completion in llm.generate("Once", params)]

    async def work() -> list[Completion]:
        async with AsyncLLM(llm) as engine:
            return await engine.generate("Once", params)

    assert [completion.token_ids for completion in finish(work())] == wanted


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]

    async def work() -> tuple[Completion, str]:
        async with AsyncLLM(llm) as engine:
            whole = await engine.chat(messages, PARAMS)
            return whole[0], "".join([piece.text async for piece in engine.stream_chat(messages, PARAMS)])

    whole, streamed = finish(work())
    assert whole.text == streamed == llm.chat(messages, PARAMS).text


def test_leaving_a_stream_gives_its_blocks_back(llm: LLM) -> None:
    slow_down(llm)

    async def work() -> None:
        async with AsyncLLM(llm) as engine:
            stream = engine.stream("Once upon a time", LONG)
            async for _ in stream:
                break
            await stream.aclose()  # type: ignore[attr-defined]
            await until_idle(llm)

    finish(work())


def test_a_cancelled_task_gives_its_blocks_back_and_the_others_go_on(llm: LLM) -> None:
    slow_down(llm)

    async def work() -> str:
        async with AsyncLLM(llm) as engine:
            tasks = [asyncio.create_task(engine.generate(prompt, LONG)) for prompt in PROMPTS[:3]]
            stays = asyncio.create_task(text_of(engine, PROMPTS[5]))
            await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            assert all(
                isinstance(error, asyncio.CancelledError)
                for error in await asyncio.gather(*tasks, return_exceptions=True)
            )
            text = await stays
            await until_idle(llm)
            return text

    assert finish(work()) == llm.generate(PROMPTS[5], PARAMS)[0].text


def test_a_bad_request_is_told_at_once(llm: LLM) -> None:
    async def work() -> None:
        async with AsyncLLM(llm) as engine:
            with pytest.raises(InvalidInput):
                await engine.generate("", PARAMS)
            with pytest.raises(InvalidInput):
                await engine.generate([10**9], PARAMS)
            assert len(await engine.generate("Once", PARAMS)) == 1

    finish(work())


def test_a_full_queue_is_told_to_the_one_who_came_too_late(tiny_path: Path) -> None:
    llm = LLM(str(tiny_path), threads=1, max_running=1, max_waiting=1)

    async def work() -> list[Any]:
        async with AsyncLLM(llm) as engine:
            return await asyncio.gather(
                *(engine.generate(prompt, LONG) for prompt in PROMPTS[:6]), return_exceptions=True
            )

    results = finish(work())
    refused = [result for result in results if isinstance(result, QueueFull)]
    assert 1 <= len(refused) <= 5
    assert all(isinstance(result, (list, QueueFull)) for result in results)
    assert_idle(llm.engine)


def test_everybody_hears_of_the_engine_s_death(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(llm)

    async def work() -> list[Any]:
        engine = AsyncLLM(llm)
        tasks = [asyncio.create_task(engine.generate(prompt, LONG)) for prompt in PROMPTS[:4]]
        await asyncio.sleep(0.05)

        def die() -> None:
            raise OSError("the disk is on fire")

        monkeypatch.setattr(llm.engine, "step", die)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not engine.is_alive
        with pytest.raises(EngineDead, match="the disk is on fire"):
            await engine.generate("Once", PARAMS)
        await engine.close()
        return results

    results = finish(work())
    assert [type(result) for result in results] == [EngineDead] * 4
    assert all(isinstance(result.__cause__, OSError) for result in results)
    monkeypatch.undo()
    assert_idle(llm.engine)


def test_closing_ends_what_runs(llm: LLM) -> None:
    slow_down(llm)

    async def work() -> BaseException | None:
        engine = AsyncLLM(llm)
        task = asyncio.create_task(engine.generate("Once", LONG))
        await asyncio.sleep(0.05)
        await engine.close()
        await asyncio.wait([task])
        with pytest.raises(EngineDead, match="closed"):
            await engine.generate("Once", PARAMS)
        return task.exception()

    assert isinstance(finish(work()), EngineDead)
    assert_idle(llm.engine)


def test_a_slow_reader_loses_its_request_and_nobody_else_s(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_llm, "MAX_PIECES", 30)

    async def work() -> str:
        async with AsyncLLM(llm) as engine:
            slow = engine.stream("Once upon a time", LONG)
            await anext(slow)
            text = await text_of(engine, PROMPTS[3])
            await until_idle(llm)
            with pytest.raises(SlowReader):
                async for _ in slow:
                    pass
            return text

    assert finish(work()) == llm.generate(PROMPTS[3], PARAMS)[0].text


def test_observers_hear_of_a_slow_reader_before_another_request_comes(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And why it ended: or the meter counts no failure, and takes an idle engine for one that decodes."""
    monkeypatch.setattr(async_llm, "MAX_PIECES", 30)
    told: dict[int, Exception | None] = {}

    def observe(event: StepEvent) -> None:
        told.update((sequence.branch, sequence.error) for sequence in event.ended)

    llm.engine.add_observer(observe)

    async def work() -> None:
        async with AsyncLLM(llm) as engine:
            slow = engine.stream("Once upon a time", SamplingParams(max_tokens=400, n=3, ignore_eos=True))
            await anext(slow)
            await until_idle(llm)
            for _ in range(200):
                if len(told) == 3:
                    break
                await asyncio.sleep(0.01)
            assert [type(told.get(branch)) for branch in range(3)] == [SlowReader] * 3

    finish(work())


def test_a_lease_that_ends_later_never_waits_for_the_lock(llm: LLM) -> None:
    """No other thread can come between the look whether the lock is free and having it."""
    request = llm.engine.new_request(llm.encode("Once upon a time, " * 8), PARAMS, hold=True)
    (sequence,) = run_all(llm.engine, [llm.engine.new_sequence(request)])
    assert sequence.lease is not None
    could_another: list[bool] = []
    lock = OwnedLock()
    take = lock.take

    def another() -> None:
        could_another.append(lock.try_to_take())
        if could_another[-1]:
            with take():
                pass

    def watched() -> Any:
        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
        return take()

    lock.take = watched  # type: ignore[method-assign]
    llm.engine.lock = lock
    sequence.lease.close_later()
    lock.take = take  # type: ignore[method-assign]
    assert could_another == [False]
    assert sequence.lease.hold.is_over
    assert_idle(llm.engine)


def test_an_idle_engine_sleeps(llm: LLM) -> None:
    async def work() -> float:
        async with AsyncLLM(llm) as engine:
            await engine.generate("Once", PARAMS)
            await asyncio.sleep(0.5)
            before = time.process_time()
            await asyncio.sleep(0.5)
            return time.process_time() - before

    assert finish(work()) < 0.05


def test_a_caller_who_steps_the_engine_too_takes_nothing_away(llm: LLM) -> None:
    """Whoever's step ends a request: its reader gets the pieces."""
    wanted = llm.generate(PROMPTS[1], PARAMS)[0].text

    async def work() -> list[str]:
        async with AsyncLLM(llm) as engine:
            others = asyncio.to_thread(lambda: [llm.generate(prompt, PARAMS) for prompt in PROMPTS * 3])
            texts = asyncio.gather(*(text_of(engine, PROMPTS[1]) for _ in range(20)))
            await others
            return await texts

    assert finish(work()) == [wanted] * 20


def test_two_engines_of_one_program(llm: LLM, tiny_path: Path) -> None:
    other = LLM(str(tiny_path), threads=1)

    async def work() -> tuple[str, str]:
        async with AsyncLLM(llm) as first, AsyncLLM(other) as second:
            return await asyncio.gather(text_of(first, PROMPTS[0]), text_of(second, PROMPTS[0]))

    first, second = finish(work())
    assert first == second
