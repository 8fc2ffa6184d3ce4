"""Several sequences read as one stream, step by step, and the progress of their prompts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvik.config import EngineConfig, SamplingParams
from kvik.engine.async_llm import AsyncLLM
from kvik.engine.engine import Engine
from kvik.engine.llm import LLM
from kvik.engine.output import Piece, Progress
from kvik.errors import QueueFull
from kvik.models.loader import LoadedModel
from models import assert_idle
from sequences import new_sequence

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, timeout=60))


def test_pieces_of_all_sequences_say_whose_they_are(llm: LLM) -> None:
    wanted = [completion.text for completion in llm.generate(["one", "two", "three"], PARAMS)]

    async def work() -> list[str]:
        async with AsyncLLM(llm) as served:
            sequences = [new_sequence(llm.engine, llm.encode(text), PARAMS) for text in ("one", "two", "three")]
            texts = [""] * 3
            with served.open(sequences) as stream:
                while pieces := await stream.read():
                    for piece in pieces:
                        texts[piece.index] += piece.text
            return texts

    assert run(work()) == wanted


def test_progress_begins_with_what_was_cached_and_ends_with_all(tiny: LoadedModel, llm: LLM) -> None:
    prompt = [3 + at % 40 for at in range(150)]
    llm = llm.with_decoder(llm.model.decoder)
    llm.engine = Engine(llm.model, EngineConfig(token_budget=40))
    llm.generate(prompt[:70], PARAMS)

    async def work() -> tuple[list[Progress], list[Piece]]:
        async with AsyncLLM(llm) as served:
            found: list[Progress] = []
            pieces: list[Piece] = []
            with served.open([new_sequence(llm.engine, prompt, PARAMS)], wants_progress=True) as stream:
                while not (stream.is_done and not pieces and not stream.progress) and len(pieces) < PARAMS.max_tokens:
                    pieces += await stream.read()
                    found += stream.progress
                    stream.progress.clear()
            return found, pieces

    found, _ = run(work())
    assert found[0].num_processed == found[0].num_cached > 0
    assert {(each.num_total, each.num_cached) for each in found} == {(150, found[0].num_cached)}
    processed = [each.num_processed for each in found]
    assert processed == sorted(set(processed))
    assert processed[-1] == 150
    assert len(processed) >= 3  # in chunks of 40


def test_all_are_queued_or_none(llm: LLM) -> None:
    llm = llm.with_decoder(llm.model.decoder)
    llm.engine = Engine(llm.model, EngineConfig(max_waiting=2))

    async def work() -> None:
        async with AsyncLLM(llm) as served:
            sequences = [new_sequence(llm.engine, [5, 6, 7 + at], PARAMS) for at in range(4)]
            with served.open(sequences) as stream:
                with pytest.raises(QueueFull):
                    await stream.read()
                assert all(branch.finish_reason == "abort" for branch in stream.branches)

    run(work())
    assert_idle(llm.engine)


def test_closing_a_stream_aborts_its_sequences(llm: LLM) -> None:
    async def work() -> list[str | None]:
        async with AsyncLLM(llm) as served:
            sequences = [
                new_sequence(llm.engine, [5, 6, 7 + at], SamplingParams(max_tokens=400, ignore_eos=True))
                for at in range(2)
            ]
            with served.open(sequences) as stream:
                await stream.read()
            await served.abort(sequences)
            return [sequence.finish_reason for sequence in sequences]

    assert run(work()) == ["abort", "abort"]
    assert_idle(llm.engine)
