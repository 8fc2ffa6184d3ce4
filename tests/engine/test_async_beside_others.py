"""Others may step the engine that an `AsyncLLM` serves: a session's own loop, a `generate` of the same `LLM`."""

from __future__ import annotations

import asyncio

import pytest

from kvik.config import SamplingParams
from kvik.engine.async_llm import AsyncLLM
from kvik.engine.llm import LLM
from models import assert_idle, random_prompt

PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)


def test_a_request_that_another_thread_finished_is_delivered(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just then the engine's thread has nothing more to do, and a reader who waits."""
    prompt = random_prompt(llm.model, 30, seed=1)
    (wanted,) = llm.generate(prompt, PARAMS)
    deliver = AsyncLLM._deliver

    def and_then_others_step(served: AsyncLLM) -> None:
        deliver(served)
        while llm.engine.step() is not None:
            pass

    monkeypatch.setattr(AsyncLLM, "_deliver", and_then_others_step)

    async def ask() -> list[int]:
        async with AsyncLLM(llm) as served:
            (completion,) = await asyncio.wait_for(served.generate(prompt, PARAMS), timeout=20)
            return completion.token_ids

    assert asyncio.run(ask()) == wanted.token_ids
    assert_idle(llm.engine)
