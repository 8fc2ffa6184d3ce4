"""Keys and values in codes, in the engine: what a token reads depends on its position, so nothing else shows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from arrangements import Arrangement
from crowds import assert_same, run_batch, run_together
from kvik.cache import MissReason
from kvik.config import EngineConfig, SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.llm import LLM
from kvik.engine.session import Session
from kvik.errors import InvalidInput
from kvik.models.loader import LoadedModel
from models import Run, random_prompt, run, shuffle_free_blocks, tiny_model, with_ops
from sequences import new_sequence

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
DTYPES = ("k4v4", "k=k4,v=f16", "k=int8,v=v4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("coded")
    return tiny_model(folder, seed=8, head_dim=32, num_heads=2, num_kv_heads=1, context_length=1024)


def coded(model: LoadedModel, **options: object) -> Engine:
    return Engine(model, EngineConfig(**({"kv_dtype": "k4v4"} | options)))  # type: ignore[arg-type]


def alone(model: LoadedModel, prompt: list[int], params: SamplingParams = PARAMS, kv_dtype: str = "k4v4") -> Run:
    return run(coded(model, kv_dtype=kv_dtype), prompt, params, use_cache=False)


@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_every_arrangement_gives_the_same_bits(model: LoadedModel, kv_dtype: str) -> None:
    prompt = random_prompt(model, 300, seed=1)
    wanted = alone(model, prompt, kv_dtype=kv_dtype)
    arrangements = (
        Arrangement(token_budget=7, threads=2, shuffled=True),
        Arrangement(token_budget=100, threads=3),
        Arrangement(token_budget=256, use_cache=False, threads=2),
        Arrangement(token_budget=512, shuffled=True),
    )
    for arrangement in arrangements:
        assert_same([arrangement.run(model, prompt, PARAMS, kv_dtype, "int8")], [wanted], arrangement)


def test_hits_and_partial_matches(model: LoadedModel) -> None:
    """In the open segment, at its edges, far behind it, and where what was written as it is was evicted."""
    prompt = random_prompt(model, 600, seed=2)
    engine = coded(model, token_budget=90)
    shuffle_free_blocks(engine, seed=2)
    assert_same([run(engine, prompt, PARAMS)], [alone(model, prompt)])
    for shared in (599, 577, 530, 513, 512, 511, 300, 257, 256, 255, 40, 31):
        branch = [*prompt[:shared], (prompt[shared] + 1) % 320, 5, 6]
        found = run(engine, branch, PARAMS)
        assert_same([found], [alone(model, branch)], shared)
        assert found.sequence.costs.num_cached_tokens == shared
    for group in engine.cache.twins.groups:  # others need the places of all blocks of the second segment
        blocks = [each for each in engine.cache.match(prompt).block_ids[8:16] if group.twin_of(each) is not None]
        for block_id in blocks:
            group.forget(block_id)
    branch = [*prompt[:300], 7, 8]
    found = run(engine, branch, PARAMS)
    assert_same([found], [alone(model, branch)])
    assert found.sequence.costs.num_cached_tokens == 256
    assert found.sequence.costs.miss_reason is MissReason.WINDOW


def test_batches_and_threads(model: LoadedModel) -> None:
    beginning = random_prompt(model, 270, seed=3)
    prompts = [beginning + random_prompt(model, count, seed=count) for count in (3, 20, 260)]
    prompts += [random_prompt(model, count, seed=count) for count in (5, 255, 256, 257)]
    wanted = [alone(model, prompt) for prompt in prompts]
    for threads, budget in ((1, 64), (3, 400)):
        engine = coded(with_ops(model, "int8", threads), token_budget=budget)
        for _ in range(2):
            assert_same(run_batch(engine, prompts, PARAMS), wanted, (threads, budget))
        assert engine.cache.stats.num_cached_tokens > 0


def test_branches_and_guesses(model: LoadedModel) -> None:
    prompt = random_prompt(model, 9, seed=4) * 28  # 252 tokens: both go on over the segment's edge
    params = SamplingParams(n=3, max_tokens=12, temperature=1.0, seed=5, ignore_eos=True, speculate="ngram")
    sequence = new_sequence(engine := coded(model, token_budget=70), prompt, params)
    branches = list(sequence.all_branches())
    engine.add(sequence)
    for index, each in enumerate(run_together(engine, branches)):
        single = dataclasses.replace(params, n=1, seed=5 + index, speculate=None)
        assert_same([each], [alone(model, prompt, single)], index)


def test_preemption(model: LoadedModel) -> None:
    params = dataclasses.replace(PARAMS, max_tokens=120)
    prompts = [random_prompt(model, count, seed=count) for count in (200, 150, 90, 240)]
    spec = coded(model).kv_spec
    engine = coded(model, token_budget=100, kv_memory=spec.pool_bytes(spec.pool_size_for(24, 2, 100)))
    runs = run_batch(engine, prompts, params)
    assert engine.scheduler.num_preemptions > 0
    assert_same(runs, [alone(model, prompt, params) for prompt in prompts])


def test_a_restart_reads_what_was_stored(model: LoadedModel, tmp_path: Path) -> None:
    prompt, texts = random_prompt(model, 600, seed=6), []
    for stored in (0, 576):
        llm = LLM(str(model.path), threads=2, kv_dtype="k4v4", store=tmp_path / "store")
        (completion,) = llm.generate(prompt, PARAMS)
        assert completion.stats.num_stored_tokens == stored
        texts.append(completion.token_ids)
        llm.close()
    assert texts[0] == texts[1] == alone(model, prompt).token_ids


def test_sessions_and_forks(model: LoadedModel) -> None:
    llm = LLM(str(model.path), threads=1, token_budget=60, kv_dtype="k4v4")
    session = Session(llm, system="terse " * 40)
    for question in ("Why is the sky blue? " * 9, "And the sea?"):
        session.append("user", question)
        prompt = llm.render_chat(session.messages)
        fork = session.fork()
        for each in (session, fork):
            *_, last = each.stream(PARAMS)
            assert last.completion is not None
            assert last.completion.token_ids == alone(model, prompt).token_ids
            assert last.completion.stats.num_cached_tokens > 0 or each is session


def test_memory_is_as_planned(model: LoadedModel) -> None:
    engine = coded(model)
    spec, arrays = engine.kv_spec, engine.runner.kv_arrays  # type: ignore[attr-defined]
    assert sum(each.num_bytes for each in arrays.arrays) == spec.pool_bytes(engine.cache.size)
    sequence = new_sequence(engine, random_prompt(model, 600, seed=7), PARAMS)
    engine.add(sequence)
    while sequence.finish_reason is None:
        engine.step()
        if sequence.finish_reason is None:
            assert engine.cache.held_bytes(sequence.table) == spec.held_bytes(sequence.num_computed_tokens)
    assert spec.held_bytes(600) == 2 * 32 * (19 * 36 + (1 + 3) * 128)  # 19 blocks of codes; as written: 1 and 3


def test_what_is_no_format_is_refused_by_name(model: LoadedModel) -> None:
    for name in ("k4", "v4", "k4v2", "k=v4,v=v4", "k=k4,v=v2", "k=k4,v=k4"):
        with pytest.raises(InvalidInput, match="kv_dtype is"):
            EngineConfig(kv_dtype=name)
    assert EngineConfig(kv_dtype="k=k4,v=v4").kv_dtype == "k4v4"
