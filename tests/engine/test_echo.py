"""Echo: the prompt comes back, and with logprobs each of its tokens has what the model thought of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest

from kvik.cache import BLOCK_SIZE
from kvik.config import EngineConfig, SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.llm import LLM
from kvik.engine.output import Completion
from kvik.models.loader import LoadedModel
from kvik.ops.base import Batch
from models import FloatArray, assert_idle, random_prompt, run, run_sequence
from sequences import new_sequence

PARAMS = SamplingParams(max_tokens=5, ignore_eos=True, echo=True, logprobs=3)
TEXT = "The quick brown fox jumps over the lazy dog. "


def teacher_forced(model: LoadedModel, token_ids: list[int]) -> FloatArray:
    """Logits after each of the tokens, in one forward pass without an engine."""
    spec = model.decoder.spec.kv_spec("f16")
    count, positions = spec.num_blocks_for(len(token_ids)), np.arange(len(token_ids), dtype=np.int32)
    batch = Batch.in_blocks(
        token_ids=np.array(token_ids, np.int32),
        positions=positions,
        sequence_index=np.zeros_like(positions),
        block_tables=np.arange(count, dtype=np.int32)[None],
        logit_rows=positions,
        num_groups=len(spec.groups),
    )
    assert spec.block_size == BLOCK_SIZE
    return model.decoder.ops.to_numpy(model.decoder.capture(model.decoder.ops.allocate_kv(spec, count))(batch))


def logprobs_of(rows: FloatArray) -> Iterator[list[float]]:
    for row in rows.astype(np.float64):
        yield (row - row.max() - math.log(np.exp(row - row.max()).sum())).tolist()


def assert_scored(completion: Completion, prompt: list[int], rows: FloatArray) -> None:
    """Every prompt token but the first has its logprob and the three likeliest in its place."""
    found = completion.prompt_logprobs
    assert found is not None
    assert len(found) == len(prompt)
    assert found[0] is None, "nothing stands before the first token"
    for entry, token_id, row, wanted in zip(found[1:], prompt[1:], rows, logprobs_of(rows), strict=False):
        assert entry is not None
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(wanted[token_id], abs=1e-5)
        assert list(entry.top) == np.argsort(-row, kind="stable")[:3].tolist()
        for top_id, logprob in entry.top.items():
            assert logprob == pytest.approx(wanted[top_id], abs=1e-5)


def test_the_text_begins_with_the_prompt_s(llm: LLM) -> None:
    plain = llm.generate(TEXT, dataclasses.replace(PARAMS, echo=False))[0]
    echoed = llm.generate(TEXT, PARAMS)[0]
    assert echoed.text == TEXT + plain.text
    assert echoed.token_ids == plain.token_ids
    assert echoed.logprobs == plain.logprobs
    assert plain.prompt_logprobs is None
    pieces = list(llm.stream(TEXT, PARAMS))
    assert "".join(piece.text for piece in pieces) == echoed.text
    assert_idle(llm.engine)


def test_without_logprobs_the_prompt_has_none_and_may_come_from_the_cache(llm: LLM) -> None:
    params = dataclasses.replace(PARAMS, logprobs=None)
    first, again = (llm.generate(TEXT, params)[0] for _ in range(2))
    assert first.text == again.text
    assert first.prompt_logprobs is first.logprobs is None
    assert again.stats.num_cached_tokens > 0


def test_a_stop_string_in_the_prompt_does_not_stop(llm: LLM) -> None:
    echoed = llm.generate(TEXT, dataclasses.replace(PARAMS, stop=("quick", "dog. ")))[0]
    assert echoed.text.startswith(TEXT)
    assert len(echoed.token_ids) == 5


@pytest.mark.parametrize("token_budget", [1, 7, 33, 64, 512])
@pytest.mark.parametrize("length", [1, 2, 33, 64, 65, 200])
def test_prompt_logprobs_are_those_of_the_tokens_before(tiny: LoadedModel, length: int, token_budget: int) -> None:
    prompt = random_prompt(tiny, length, seed=length)
    engine = Engine(tiny, EngineConfig(token_budget=token_budget))
    rows = teacher_forced(tiny, prompt)
    for _ in range(2):
        result = run(engine, prompt, PARAMS)
        completion = engine.completion(result.sequence)
        assert_scored(completion, prompt, rows)
        assert completion.stats.num_cached_tokens == 0, "each prompt token's logits are asked for"
    assert completion.token_ids == run(engine, prompt, dataclasses.replace(PARAMS, echo=False)).token_ids
    assert_idle(engine)


@pytest.mark.parametrize("keep_cache", [True, False])
def test_logprobs_of_nothing_but_the_token(tiny: LoadedModel, keep_cache: bool) -> None:
    engine, prompt = Engine(tiny, EngineConfig(token_budget=20)), random_prompt(tiny, 70, seed=2)
    params = dataclasses.replace(PARAMS, logprobs=0)
    result = run(engine, prompt, params, use_cache=keep_cache)
    found = engine.completion(result.sequence).prompt_logprobs
    assert found is not None
    assert [entry and entry.token_id for entry in found] == [None, *prompt[1:]]
    assert all(entry is None or entry.top == {} for entry in found)


@pytest.mark.parametrize("length", [1, 70])
def test_every_branch_has_the_prompt_s(tiny: LoadedModel, length: int) -> None:
    engine, prompt = Engine(tiny, EngineConfig(token_budget=40)), random_prompt(tiny, length, seed=3)
    sequence = new_sequence(engine, prompt, dataclasses.replace(PARAMS, n=3, temperature=1.0, seed=1))
    branches = list(sequence.all_branches())
    engine.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    rows = teacher_forced(tiny, prompt)
    for branch in branches:
        assert_scored(engine.completion(branch), prompt, rows)


@pytest.mark.parametrize("token_budget", [3, 40])
def test_a_preemption_in_the_middle_of_the_prompt(tiny: LoadedModel, token_budget: int) -> None:
    """What is computed again is not told again, and nothing is left out."""
    engine = Engine(tiny, EngineConfig(token_budget=token_budget, kv_memory=16 * Engine(tiny).kv_spec.block_bytes))
    first = new_sequence(engine, random_prompt(tiny, 130, seed=4), SamplingParams(max_tokens=250, ignore_eos=True))
    engine.add(first)
    while first.num_completion_tokens == 0:
        engine.step()
    prompt = random_prompt(tiny, 300, seed=5)
    second = new_sequence(engine, prompt, PARAMS)
    result = run_sequence(engine, second)
    if token_budget == 3:
        assert second.costs.num_preemptions > 0
    assert_scored(engine.completion(second), prompt, teacher_forced(tiny, prompt))
    assert result.token_ids == run(Engine(tiny), prompt, dataclasses.replace(PARAMS, echo=False)).token_ids


@pytest.mark.parametrize("token_budget", [16, 512])
def test_a_preemption_behind_the_prompt(tiny: LoadedModel, token_budget: int) -> None:
    engine = Engine(tiny, EngineConfig(token_budget=token_budget, kv_memory=8 * Engine(tiny).kv_spec.block_bytes))
    params = dataclasses.replace(PARAMS, max_tokens=120, speculate="ngram")
    prompts = [random_prompt(tiny, length, seed=length) for length in (40, 50, 60)]
    sequences = [new_sequence(engine, prompt, params) for prompt in prompts]
    for sequence in sequences:
        engine.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
        engine.scheduler.check()
    assert engine.scheduler.num_preemptions > 0
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.error is None
        assert_scored(engine.completion(sequence), prompt, teacher_forced(tiny, prompt))
        assert len(sequence.logprobs) == sequence.num_completion_tokens == 120


def test_the_default_model_finds_sense_likelier_than_nonsense(trained: LoadedModel) -> None:
    engine, scores = Engine(trained), []
    for text in ("The capital of France is Paris", "The capital of France is Lunch"):
        prompt = trained.tokenizer.encode(text)
        completion = engine.completion(run(engine, prompt, PARAMS).sequence)
        assert_scored(completion, prompt, teacher_forced(trained, prompt))
        assert completion.prompt_logprobs is not None
        last = completion.prompt_logprobs[-1]
        assert last is not None
        scores.append(last.logprob)
    assert scores[0] > scores[1] + 3
