"""Many sequences in one batch: each one's logits are, bit for bit, those of a run alone without any cache."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, get_args

import numpy as np
import pytest

from crowds import ARRANGEMENTS, PARAMS, add_all, assert_same, run_batch, run_together
from kvik.config import EngineConfig, KVDType, SamplingParams
from kvik.engine.batch import ScheduledBatch
from kvik.engine.engine import Engine
from kvik.engine.runner import ModelRunner, StepOutput
from kvik.engine.sequence import Sequence
from kvik.models.loader import LoadedModel
from models import FloatArray, Run, assert_idle, random_prompt, run, shuffle_free_blocks, with_ops
from sequences import new_sequence

LENGTHS = (5, 33, 64, 1, 90, 31, 32, 130, 7, 65, 12, 200, 40, 3, 96, 58)
VOCAB = 320


def alone(model: LoadedModel, prompt: list[int], params: SamplingParams = PARAMS, **options: Any) -> Run:
    """Nothing is kept, nobody else is there: what every arrangement is compared with."""
    return run(Engine(model, EngineConfig(**options)), prompt, params, use_cache=False)


def prompts_of(model: LoadedModel, count: int) -> list[list[int]]:
    return [random_prompt(model, length, seed=1000 + length) for length in LENGTHS[:count]]


@pytest.fixture(scope="module")
def wanted(tiny: LoadedModel) -> list[Run]:
    return [alone(tiny, prompt) for prompt in prompts_of(tiny, 16)]


@pytest.mark.parametrize("token_budget", [1, 7, 33, 512])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_batches_of_ragged_lengths(tiny: LoadedModel, wanted: list[Run], count: int, token_budget: int) -> None:
    engine = Engine(tiny, EngineConfig(token_budget=token_budget))
    shuffle_free_blocks(engine, seed=count)
    runs = run_batch(engine, prompts_of(tiny, count))
    assert_same(runs, wanted[:count])
    assert all(each.sequence.costs.num_computed_tokens == each.sequence.num_tokens - 1 for each in runs)
    if count == 16 and token_budget == 512:
        assert engine.scheduler.num_steps < 2 * 16, "they ran in one batch"


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kv_dtype", get_args(KVDType))
def test_threads_and_formats(tiny: LoadedModel, kv_dtype: KVDType, threads: int) -> None:
    prompts = prompts_of(tiny, 6)
    first = [alone(tiny, prompt, kv_dtype=kv_dtype) for prompt in prompts]
    engine = Engine(with_ops(tiny, "int8", threads), EngineConfig(kv_dtype=kv_dtype, token_budget=50))
    shuffle_free_blocks(engine, seed=threads)
    assert_same(run_batch(engine, prompts), first)
    assert_same(run_batch(engine, prompts), first, "found in the cache")
    assert engine.cache.stats.num_cached_tokens > 0


# What was computed before.


@pytest.mark.parametrize("token_budget", [7, 512])
def test_prompts_seen_before(tiny: LoadedModel, wanted: list[Run], token_budget: int) -> None:
    """All that was computed is found; the last token of a prompt is always computed."""
    engine = Engine(tiny, EngineConfig(token_budget=token_budget))
    prompts = prompts_of(tiny, 12)
    assert_same(run_batch(engine, prompts), wanted[:12])
    again = run_batch(engine, prompts)
    assert_same(again, wanted[:12])
    for each in again:
        assert each.sequence.costs.num_cached_tokens == each.sequence.num_prompt_tokens - 1


def test_a_prompt_that_agrees_up_to_the_middle_of_a_block(tiny: LoadedModel) -> None:
    engine, first = Engine(tiny, EngineConfig(token_budget=20)), random_prompt(tiny, 100, seed=31)
    run(engine, first)
    for shared in (1, 31, 32, 33, 50, 63, 64, 90, 95, 96):
        second = [*first[:shared], (first[shared] + 1) % VOCAB, *random_prompt(tiny, 20, seed=shared)]
        found = run(engine, second, PARAMS)
        assert_same([found], [alone(tiny, second)], shared)
        assert found.sequence.costs.num_cached_tokens == shared
    assert engine.cache.stats.num_copied_blocks > 0


@pytest.mark.parametrize("token_budget", [9, 64, 512])
def test_prompts_that_begin_alike_are_prefilled_once(tiny: LoadedModel, token_budget: int) -> None:
    """They arrive together: the others wait for the blocks that the first computes, and only for those."""
    prefix = random_prompt(tiny, 128, seed=32)
    prompts = [[*prefix, *random_prompt(tiny, length, seed=length)] for length in (6, 3, 20, 11, 5)]
    prompts += [prompts[0]] * 3 + [random_prompt(tiny, 10, seed=33)]
    engine = Engine(tiny, EngineConfig(token_budget=token_budget))
    runs = run_batch(engine, prompts)
    assert_same(runs, [alone(tiny, prompt) for prompt in prompts])
    cached = sorted(each.sequence.costs.num_cached_tokens for each in runs)
    assert cached[:5] == [0, 0, *[128] * 3]
    assert {*cached[5:]} <= {128, len(prompts[0]) - 1}, "one that begins late finds where an equal one has ended"
    for each in runs:
        costs = each.sequence.costs
        assert costs.num_computed_tokens == len(each.sequence.request.prompt_ids) + 7 - costs.num_cached_tokens


def test_without_the_prefix_cache_nothing_is_shared(tiny: LoadedModel, wanted: list[Run]) -> None:
    engine = Engine(tiny, EngineConfig(prefix_cache=False))
    prompts = prompts_of(tiny, 4)
    for _ in range(2):
        runs = run_batch(engine, prompts * 2)
        assert_same(runs, wanted[:4] * 2)
        assert all(each.sequence.costs.num_cached_tokens == 0 for each in runs)
    assert (engine.cache.pool.num_reusable, len(engine.cache.tree)) == (0, 0)


# Too little room.


@pytest.mark.parametrize("token_budget", [16, 100, 512])
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("num_blocks", [8, 16])
def test_preemption(tiny: LoadedModel, num_blocks: int, prefix_cache: bool, token_budget: int) -> None:
    """Completions far longer than their prompts: no pool of this size has room for all of them to the end."""
    params = dataclasses.replace(PARAMS, max_tokens=100)
    prompts = prompts_of(tiny, 7)
    block_bytes = Engine(tiny).kv_spec.block_bytes
    engine = Engine(
        tiny, EngineConfig(token_budget=token_budget, prefix_cache=prefix_cache, kv_memory=num_blocks * block_bytes)
    )
    runs = run_batch(engine, prompts, params)
    assert engine.cache.pool.num_blocks == num_blocks
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.num_preemptions == sum(each.sequence.costs.num_preemptions for each in runs)
    fresh = Engine(tiny, EngineConfig(prefix_cache=False))
    assert_same(runs, [run(fresh, prompt, params) for prompt in prompts])


# Guesses.


def test_speculation(tiny: LoadedModel) -> None:
    """Greedy random models soon repeat themselves; prompts that repeat do the rest. At a temperature, guesses fail."""
    params = [
        SamplingParams(max_tokens=40, ignore_eos=True, speculate="ngram"),
        SamplingParams(max_tokens=40, ignore_eos=True, speculate="ngram", temperature=0.8, seed=5),
        SamplingParams(max_tokens=30, ignore_eos=True, speculate="ngram", repetition_penalty=1.3),
        SamplingParams(max_tokens=40, ignore_eos=True),
    ]
    prompts = [random_prompt(tiny, 10, seed=34) * 6, random_prompt(tiny, 9, seed=35) * 4, prompts_of(tiny, 5)[4]]
    pairs = [(prompt, each) for prompt in prompts for each in params]
    plain = [alone(tiny, prompt, dataclasses.replace(each, speculate=None)) for prompt, each in pairs]
    for token_budget, num_blocks in ((512, 512), (60, 512), (3, 512), (512, 8)):
        engine = Engine(
            tiny, EngineConfig(token_budget=token_budget, kv_memory=num_blocks * Engine(tiny).kv_spec.block_bytes)
        )
        runs = run_together(engine, add_all(engine, *zip(*pairs, strict=True)))
        assert_same(runs, plain, (token_budget, num_blocks))
        drafted = sum(each.sequence.costs.num_drafted_tokens for each in runs)
        accepted = sum(each.sequence.costs.num_accepted_tokens for each in runs)
        if token_budget > 3:
            assert 0 < accepted < drafted, "some right, some wrong"
        assert (engine.scheduler.num_preemptions > 0) == (num_blocks == 8)


def test_a_guess_saves_steps(tiny: LoadedModel) -> None:
    params = SamplingParams(max_tokens=100, ignore_eos=True, speculate="ngram")
    engine = Engine(tiny)
    found = run(engine, random_prompt(tiny, 10, seed=34) * 6, params)
    accepted = found.sequence.costs.num_accepted_tokens
    assert engine.scheduler.num_steps == 100 - accepted
    assert accepted > 30
    assert found.sequence.costs.num_computed_tokens == 159 + found.sequence.costs.num_drafted_tokens - accepted


# Several completions of one prompt.


@pytest.mark.parametrize("token_budget", [3, 40, 512])
@pytest.mark.parametrize("length", [1, 31, 32, 70])
def test_branches_compute_the_prompt_once(tiny: LoadedModel, length: int, token_budget: int) -> None:
    prompt = random_prompt(tiny, length, seed=36)
    params = SamplingParams(n=3, max_tokens=12, temperature=1.0, seed=2**64 - 2, ignore_eos=True)
    engine = Engine(tiny, EngineConfig(token_budget=token_budget))
    sequence = new_sequence(engine, prompt, params)
    branches = list(sequence.all_branches())
    engine.add(sequence)
    runs = run_together(engine, branches)
    for index, each in enumerate(runs):
        single = dataclasses.replace(params, n=1, seed=(params.seed + index) % 2**64)  # type: ignore[operator]
        assert_same([each], [alone(tiny, prompt, single)], index)
    assert len({tuple(each.token_ids) for each in runs}) == 3
    assert sum(branch.costs.num_computed_tokens for branch in branches) == length + 3 * 11
    assert [branch.costs.num_cached_tokens for branch in branches] == [0, length, length]


def test_branches_under_pressure(tiny: LoadedModel) -> None:
    prompt = random_prompt(tiny, 70, seed=36)
    params = SamplingParams(n=5, max_tokens=90, temperature=1.0, seed=3, ignore_eos=True, speculate="ngram")
    for max_running in (2, 64):
        engine = Engine(tiny, EngineConfig(kv_memory=16 * Engine(tiny).kv_spec.block_bytes, max_running=max_running))
        sequence = new_sequence(engine, prompt, params)
        branches = list(sequence.all_branches())
        engine.add(sequence)
        runs = run_together(engine, branches)
        assert engine.scheduler.num_preemptions > 0 or max_running == 2
        singles = [dataclasses.replace(params, n=1, seed=3 + index, speculate=None) for index in range(5)]
        fresh = Engine(tiny, EngineConfig(prefix_cache=False))
        assert_same(runs, [run(fresh, prompt, single) for single in singles], max_running)


# The captured step and the ops one by one.


def test_a_recorded_step_is_its_ops_one_by_one(tiny: LoadedModel, wanted: list[Run]) -> None:
    calls: list[int] = []

    class OneByOne(ModelRunner):
        def run(self, batch: ScheduledBatch) -> StepOutput:
            calls.append(len(batch.arrays.token_ids))
            return StepOutput(self.decoder.forward(batch.arrays, kv_cache=self.kv_arrays), np.empty((0, 0), np.float32))

    engine = Engine(tiny, EngineConfig(token_budget=50), make_runner=OneByOne)
    assert_same(run_batch(engine, prompts_of(tiny, 16)), wanted)
    assert calls


# All of it at once, by chance.


@pytest.mark.parametrize("seed", range(12))
def test_random_crowds(tiny: LoadedModel, seed: int) -> None:
    """Requests come while others run; engine, prompts, salts and settings by chance."""
    rng = random.Random(seed)
    kv_dtype = rng.choice(get_args(KVDType))
    spec = Engine(tiny, EngineConfig(kv_dtype=kv_dtype)).kv_spec
    num_blocks = 8 * rng.choice((2, 3, 64))
    engine = Engine(
        with_ops(tiny, "int8", rng.choice((1, 2))),
        EngineConfig(
            kv_dtype=kv_dtype,
            token_budget=rng.choice((5, 40, 256)),
            kv_memory=num_blocks * spec.block_bytes,
            max_running=rng.choice((2, 5, 64)),
        ),
    )
    beginnings = [random_prompt(tiny, rng.randrange(1, 200), seed=100 * seed + index) for index in range(3)]
    waiting: list[Sequence] = []
    for index in range(14):
        beginning = rng.choice(beginnings)
        prompt = beginning[: rng.randrange(1, len(beginning) + 1)] + random_prompt(tiny, rng.randrange(30), seed=index)
        params = SamplingParams(
            max_tokens=rng.choice((1, 5, 30, 60)),
            temperature=rng.choice((0.0, 1.0)),
            seed=rng.randrange(100),
            ignore_eos=True,
            speculate=rng.choice((None, "ngram")),
        )
        waiting.append(new_sequence(engine, prompt, params, salt=rng.choice((None, None, "ada"))))
    sequences = list(waiting)
    rows: dict[Sequence, list[FloatArray]] = {sequence: [] for sequence in waiting}
    while waiting or engine.scheduler.has_work:
        while waiting and (rng.random() < 0.4 or not engine.scheduler.has_work):
            engine.add(waiting.pop(0))
        result = engine.step()
        engine.scheduler.check()
        assert result is not None
        for sequence, row in zip(result.sequences, result.logits, strict=True):
            rows[sequence].append(row)
    fresh = Engine(tiny, EngineConfig(kv_dtype=kv_dtype, prefix_cache=False))
    for index, sequence in enumerate(sequences):
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        other = run(fresh, prompt, dataclasses.replace(sequence.params, speculate=None))
        assert_same(
            [Run(sequence, sequence.completion_ids, np.stack(rows[sequence]))], [other], f"seed {seed}, {index}"
        )
    assert_idle(engine)


# The trained model.


@pytest.fixture(scope="module")
def trained_prompts(trained: LoadedModel) -> list[list[int]]:
    prefix = "You are a terse assistant. Answer in one word, and in the language of the question. "
    texts = ["What is the capital of France?", "And of Denmark?", "one two three " * 8]
    return [trained.tokenizer.encode(prefix * 2 + text) for text in texts] + [trained.tokenizer.encode("Hello")]


@pytest.fixture(scope="module")
def trained_wanted(trained: LoadedModel, trained_prompts: list[list[int]]) -> list[Run]:
    engine = Engine(trained, EngineConfig(prefix_cache=False))
    return [run(engine, prompt) for prompt in trained_prompts]


@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)
def test_the_default_model_in_batches(
    trained: LoadedModel, trained_prompts: list[list[int]], trained_wanted: list[Run], arrangement: dict[str, Any]
) -> None:
    options = dict(arrangement)
    params = dataclasses.replace(PARAMS, speculate=options.pop("speculate", None))
    max_tokens = options.pop("max_tokens", 8)
    if "kv_memory" in options:
        options["kv_memory"] = 8 * Engine(trained).kv_spec.block_bytes
        params = dataclasses.replace(params, max_tokens=max_tokens)
    engine = Engine(trained, EngineConfig(**options))
    shuffle_free_blocks(engine, seed=1)
    for _ in range(2):
        runs = run_batch(engine, trained_prompts, params)
        assert_same([Run(each.sequence, each.token_ids[:8], each.logits[:8]) for each in runs], trained_wanted)
    assert engine.cache.stats.num_cached_tokens > 0
    if max_tokens > 8:
        assert engine.scheduler.num_preemptions > 0
    if params.speculate:
        assert sum(each.sequence.costs.num_accepted_tokens for each in runs) > 0


def test_branches_of_the_default_model(trained: LoadedModel, trained_prompts: list[list[int]]) -> None:
    params = SamplingParams(n=3, max_tokens=6, temperature=0.9, seed=7, ignore_eos=True)
    engine = Engine(trained)
    sequence = new_sequence(engine, trained_prompts[0], params)
    branches = list(sequence.all_branches())
    engine.add(sequence)
    runs = run_together(engine, branches)
    fresh = Engine(trained, EngineConfig(prefix_cache=False))
    singles = [dataclasses.replace(params, n=1, seed=7 + index) for index in range(3)]
    assert_same(runs, [run(fresh, trained_prompts[0], single) for single in singles])
