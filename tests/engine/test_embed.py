"""Embeddings: what they are, and that nothing but the prompt shows in their bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType

from kvik import Embedding
from kvik.config import EngineConfig, KVDType, Pooling, SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.llm import LLM
from kvik.engine.pooling import PooledHidden
from kvik.engine.sequence import Sequence
from kvik.errors import CacheTooSmall, EngineDead, InvalidInput, ModelError, PromptTooLong, RequestsFailed, StepFailed
from kvik.explain.tracing_ops import TracingOps, weight_names
from kvik.models.loader import LoadedModel
from kvik.ops.base import Batch
from models import (
    FloatArray,
    altered,
    assert_idle,
    num_common_tokens,
    random_prompt,
    run,
    shuffle_free_blocks,
    tiny_model,
    tiny_reference_model,
    with_ops,
)
from runners import failing, watched_engine
from sequences import new_sequence
from simulation import SimulatedEngine, expected_vector

POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
GENERATE = SamplingParams(max_tokens=12, ignore_eos=True)


def hidden_of(model: LoadedModel, prompt: list[int], kv_dtype: KVDType = "f16") -> FloatArray:
    """The hidden state of each token behind the last norm, in one pass of ops that do one thing each."""
    decoder, positions = model.decoder, np.arange(len(prompt), dtype=np.int32)
    spec = decoder.spec.kv_spec(kv_dtype)
    count = spec.num_blocks_for(len(prompt))
    batch = Batch.in_blocks(
        token_ids=np.array(prompt, np.int32),
        positions=positions,
        sequence_index=np.zeros_like(positions),
        block_tables=np.arange(count, dtype=np.int32)[None],
        logit_rows=positions[:0],
        num_groups=len(spec.groups),
    )
    ops = TracingOps(decoder.ops, weight_names(decoder))
    decoder.forward(batch, decoder.ops.allocate_kv(spec, count), ops)
    return decoder.ops.to_numpy(decoder.normed(ops.hidden))


def pooled(rows: FloatArray, pooling: Pooling, *, normalize: bool = True) -> FloatArray:
    """The definition, written another way: `accumulate` adds row after row."""
    wide = rows.astype(np.float64)
    vector = wide[-1] if pooling == "last" else np.add.accumulate(wide, axis=0)[-1] / len(wide)
    scaled: FloatArray = (vector / math.sqrt(math.fsum(vector**2)) if normalize else vector).astype(np.float32)
    return scaled


def embed_sequence(
    engine: Engine, prompt: SequenceOf[int], pooling: Pooling, *, normalize: bool = True, **options: Any
) -> Sequence:
    return engine.new_sequence(engine.new_embed_request(prompt, pooling, normalize, **options))


def finish(engine: Engine, *sequences: Sequence) -> list[Embedding]:
    """Queue them and step to the end, proving the accounts after each step."""
    for sequence in sequences:
        engine.add(sequence)
    while any(sequence.finish_reason is None for sequence in sequences):
        engine.step()
        engine.scheduler.check()
    return [sequence.embedding() for sequence in sequences]


def same_bits(found: FloatArray, wanted: FloatArray, message: object = "") -> None:
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32), str(message))


# What it is.


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_it_is_the_hidden_state_behind_the_last_norm(tiny: LoadedModel, pooling: Pooling, normalize: bool) -> None:
    prompt = random_prompt(tiny, 90, seed=1)
    engine = Engine(tiny)
    (found,) = finish(engine, embed_sequence(engine, prompt, pooling, normalize=normalize))
    same_bits(found.vector, pooled(hidden_of(tiny, prompt), pooling, normalize=normalize))
    length = float(np.linalg.norm(found.vector))
    assert (abs(length - 1) < 1e-6) == normalize
    assert (found.num_tokens, found.finish_reason) == (90, "stop")
    assert_idle(engine)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_reference_backend_agrees(tmp_path: Path, pooling: Pooling) -> None:
    vectors = []
    for model in (tiny_model(tmp_path, seed=3, activations="int16"), tiny_reference_model(tmp_path, seed=3)):
        engine = Engine(model, EngineConfig(kv_dtype="f32", token_budget=20))
        vectors += finish(engine, embed_sequence(engine, random_prompt(model, 45, seed=2), pooling))
    first, second = (each.vector for each in vectors)
    assert float(first @ second) > 0.999
    assert abs(first - second).max() < 0.02


def test_pooling_in_any_chunks_and_again_from_the_beginning() -> None:
    rng = np.random.default_rng(4)
    rows = (rng.normal(size=(50, 33)) * np.exp(rng.normal(size=(50, 1)) * 6)).astype(np.float32)
    for pooling in POOLINGS:
        for ends in ((50,), (1, 2, 49, 50), tuple(range(1, 51)), (20, 30, 10, 40, 50)):
            whole, first = PooledHidden(pooling), 0
            for end in ends:
                first = 0 if end < first else first  # it was preempted
                whole.add(first, rows[first:end])
                first = end
            same_bits(whole.vector(normalize=True), pooled(rows, pooling), (pooling, ends))
    zeros = PooledHidden("mean")
    zeros.add(0, rows[:3] * 0)
    same_bits(zeros.vector(normalize=True), np.zeros(33, np.float32))


def test_the_order_of_adding_would_show() -> None:
    """The comparison of chunks above would also hold for sums that are exact anyway."""
    rows = np.array([[1e16], [1.0], [-1e16], [1.0]], np.float32)
    mean = PooledHidden("mean")
    mean.add(0, rows)
    assert mean.vector(normalize=False) == pooled(rows, "mean", normalize=False)
    assert mean.vector(normalize=False) != pooled(rows[[0, 2, 1, 3]], "mean", normalize=False)


# What must not show.


def arrangements() -> Iterator[tuple[int, int, bool]]:
    """Token budget, threads, whether the cache is used."""
    for budget in (1, 7, 32, 33, 512):
        yield budget, 1, True
        yield budget, 2, False
    yield 33, 3, True


@pytest.mark.parametrize("kv_dtype", get_args(KVDType))
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_arrangement_gives_the_same_bits(tiny: LoadedModel, pooling: Pooling, kv_dtype: KVDType) -> None:
    for length in (1, 32, 33, 300):
        prompt = random_prompt(tiny, length, seed=length)
        wanted = pooled(hidden_of(tiny, prompt, kv_dtype), pooling)
        for budget, threads, use_cache in arrangements():
            engine = Engine(with_ops(tiny, "int8", threads), EngineConfig(kv_dtype=kv_dtype, token_budget=budget))
            shuffle_free_blocks(engine, seed=length)
            (found,) = finish(engine, embed_sequence(engine, prompt, pooling, use_cache=use_cache))
            same_bits(found.vector, wanted, (length, budget, threads, use_cache))
            assert_idle(engine)


@pytest.mark.parametrize("token_budget", [5, 40, 512])
def test_a_batch_may_mix_both_kinds(tiny: LoadedModel, token_budget: int) -> None:
    """Completions and embeddings of the same and of other prompts: one pass, and each has the bits it has alone."""
    prompts = [random_prompt(tiny, length, seed=7) for length in (3, 40, 64, 90, 150)]
    alone = [run(Engine(tiny), prompt, GENERATE, use_cache=False) for prompt in prompts]
    rows = [hidden_of(tiny, prompt) for prompt in prompts]
    engine, runner = watched_engine(tiny, EngineConfig(token_budget=token_budget))
    batches = []
    runner.before = lambda batch: batches.append(batch.arrays)
    shuffle_free_blocks(engine, seed=token_budget)
    for _ in range(2):  # the second time behind what is cached
        writers = [new_sequence(engine, prompt, GENERATE) for prompt in prompts]
        for sequence in writers:
            engine.add(sequence)
        engine.step()
        asked = [(index, pooling) for index in range(len(prompts)) for pooling in POOLINGS]
        embedded = [embed_sequence(engine, prompts[index], pooling) for index, pooling in asked]
        for (index, pooling), embedding in zip(asked, finish(engine, *embedded), strict=True):
            same_bits(embedding.vector, pooled(rows[index], pooling), (index, pooling))
        while engine.step() is not None:
            engine.scheduler.check()
        for sequence, wanted in zip(writers, alone, strict=True):
            assert sequence.completion_ids == wanted.token_ids
    mixed = sum(len(batch.hidden_rows) > 0 and len(batch.logit_rows) > 0 for batch in batches)
    assert mixed > 2
    assert len(batches) == engine.scheduler.num_steps, "one pass a step"
    assert_idle(engine)


def test_completions_beside_embeddings_have_the_logits_of_those_alone(tiny: LoadedModel) -> None:
    prompt = random_prompt(tiny, 40, seed=8)
    wanted = run(Engine(tiny), prompt, GENERATE)
    engine = Engine(tiny, EngineConfig(token_budget=16))
    writer, rows = new_sequence(engine, prompt, GENERATE), list[FloatArray]()
    engine.add(writer)
    for seed in range(6):
        engine.add(embed_sequence(engine, random_prompt(tiny, 30, seed), "mean" if seed % 2 else "last"))
    while (result := engine.step()) is not None:
        rows += [row for owner, row in zip(result.sequences, result.logits, strict=True) if owner is writer]
    same_bits(np.stack(rows), wanted.logits)


# The cache.


def test_last_goes_on_from_what_is_cached_and_computes_the_last_token(tiny: LoadedModel) -> None:
    prompt = random_prompt(tiny, 129, seed=9)
    wanted = pooled(hidden_of(tiny, prompt), "last")
    engine = Engine(tiny, EngineConfig(token_budget=50))
    for num_cached in (0, 128, 128):
        (found,) = finish(engine, embed_sequence(engine, prompt, "last"))
        same_bits(found.vector, wanted)
        assert (found.stats.num_cached_tokens, found.stats.num_computed_tokens) == (num_cached, 129 - num_cached)
    run(engine, prompt, GENERATE)
    (found,) = finish(engine, embed_sequence(engine, prompt, "last"))
    same_bits(found.vector, wanted)
    assert found.stats.num_computed_tokens == 1
    (other,) = finish(engine, embed_sequence(engine, prompt, "last", salt="ada"))
    assert other.stats.num_cached_tokens == 0
    same_bits(other.vector, wanted)


def test_mean_takes_nothing_from_the_cache_and_leaves_what_it_computed(tiny: LoadedModel) -> None:
    prompt = random_prompt(tiny, 129, seed=10)
    wanted = pooled(hidden_of(tiny, prompt), "mean")
    engine = Engine(tiny, EngineConfig(token_budget=50))
    for _ in range(2):
        (found,) = finish(engine, embed_sequence(engine, prompt, "mean"))
        same_bits(found.vector, wanted)
        assert (found.stats.num_cached_tokens, found.stats.num_computed_tokens) == (0, 129)
        assert found.stats.miss_reason is None, "it did not ask"
    assert run(engine, prompt, GENERATE).sequence.costs.num_cached_tokens == 128
    (found,) = finish(engine, embed_sequence(engine, prompt, "last"))
    assert found.stats.num_cached_tokens == 128
    same_bits(found.vector, pooled(hidden_of(tiny, prompt), "last"))


def test_a_lease_of_an_embedding_goes_on_as_a_completion(tiny: LoadedModel) -> None:
    prompt, engine = random_prompt(tiny, 45, seed=11), Engine(tiny)
    embedded = embed_sequence(engine, prompt, "mean", hold=True)
    finish(engine, embedded)
    assert embedded.lease is not None
    assert embedded.lease.num_tokens == 45
    longer = [*prompt, 5, 6]
    sequence = new_sequence(engine, longer, GENERATE, lease=embedded.lease)
    engine.add(sequence)
    while engine.step() is not None:
        pass
    assert sequence.costs.num_cached_tokens == 45
    assert sequence.completion_ids == run(Engine(tiny), longer, GENERATE).token_ids
    (found,) = finish(engine, embed_sequence(engine, longer, "last", lease=embedded.lease))
    assert found.stats.num_cached_tokens >= 45
    same_bits(found.vector, pooled(hidden_of(tiny, longer), "last"))
    embedded.lease.close()
    assert_idle(engine)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_one_that_is_preempted_is_computed_again_to_the_same_bits(pooling: Pooling) -> None:
    engine = SimulatedEngine(num_blocks=8, token_budget=3, max_running=8, max_waiting=50)
    writer = new_sequence(engine, [1, 2, 3] * 21, SamplingParams(max_tokens=120, ignore_eos=True), priority=50)
    engine.add(writer)
    for _ in range(21):  # it has two blocks and will have six
        engine.step()
    sequence = embed_sequence(engine, [index % 7 for index in range(150)], pooling)
    (found,) = finish(engine, sequence)
    assert sequence.costs.num_preemptions > 0
    assert found.stats.num_preemptions == sequence.costs.num_preemptions
    same_bits(found.vector, expected_vector(engine, sequence))


# What is refused.


def test_a_prompt_may_fill_the_context_and_the_cache(tiny: LoadedModel) -> None:
    context = tiny.context
    prompt = random_prompt(tiny, context + 1, seed=12)
    block_bytes = Engine(tiny).kv_spec.block_bytes
    engine = Engine(tiny, EngineConfig(kv_memory=context // 32 * block_bytes))
    for pooling in POOLINGS:
        (found,) = finish(engine, embed_sequence(engine, prompt[:context], pooling))
        same_bits(found.vector, pooled(hidden_of(tiny, prompt[:context]), pooling))
        with pytest.raises(PromptTooLong, match=r"513 tokens, the context holds 512\n"):
            engine.new_embed_request(prompt, pooling, True)
    small = Engine(tiny, EngineConfig(kv_memory=8 * block_bytes))
    finish(small, embed_sequence(small, prompt[:256], "last"))
    with pytest.raises(CacheTooSmall, match=r"the prompt needs 9 blocks \(257 tokens\), the cache has 8") as caught:
        small.new_embed_request(prompt[:257], "last", True)
    assert "max_tokens" not in caught.value.hint
    assert_idle(engine)


def test_what_is_refused_is_refused_before_anything_runs(llm: LLM) -> None:
    for prompts, message in (([[]], "the prompt is empty"), ([[5], [320]], "320 is not in the"), ([[5], [-1]], "-1")):
        with pytest.raises(InvalidInput, match=message):
            llm.embed(prompts)
    wrong: Any
    for wrong in ("max", None, SamplingParams(n=2)):
        with pytest.raises(InvalidInput, match="pooling is"):
            llm.embed("a", wrong)
    with pytest.raises(InvalidInput, match="normalize is 1"):
        llm.embed("a", normalize=1)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="priority is 'high'"):
        llm.embed("a", priority="high")  # type: ignore[arg-type]
    for options in ({"n": 2}, {"temperature": 1.0}, {"params": SamplingParams()}, {"hold": True}):
        with pytest.raises(TypeError, match="no option"):
            llm.embed("a", **options)
    assert llm.engine.scheduler.num_steps == 0
    assert_idle(llm.engine)


# The front door.


def test_each_prompt_has_its_embedding(llm: LLM, tiny: LoadedModel) -> None:
    prompts: list[str | list[int]] = ["Once upon a time", llm.encode("Once upon a time"), [5], "x" * 150]
    for pooling in POOLINGS:
        found = llm.embed(prompts, pooling)
        for prompt, embedding in zip(prompts, found, strict=True):
            token_ids = llm.encode(prompt)
            same_bits(embedding.vector, pooled(hidden_of(tiny, token_ids), pooling))
            assert embedding.num_tokens == embedding.stats.num_prompt_tokens == len(token_ids)
            assert embedding.stats.num_completion_tokens == 0
            assert embedding.stats.total_s > 0
    same_bits(llm.embed("Once upon a time")[0].vector, llm.embed([prompts[1]], "last")[0].vector)
    assert llm.embed([]) == []
    assert_idle(llm.engine)


def test_no_token_is_sampled(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(logits: FloatArray, rows: SequenceOf[object]) -> list[object]:
        assert len(logits) == len(rows) == 0
        return []

    monkeypatch.setattr(llm.engine.runner, "sample", sample)
    assert llm.embed("Once upon a time", "mean")[0].finish_reason == "stop"


# What goes wrong.


@pytest.mark.parametrize("pooling", POOLINGS)
def test_hidden_states_that_are_not_finite_end_their_own_request(
    tiny_path: Path, tmp_path: Path, pooling: Pooling
) -> None:
    """One token's embedding is damaged: prompts without it are served."""
    table = np.random.default_rng(1).normal(size=(320, 64)).astype(np.float32)
    table[7] = np.inf
    tensors: dict[str, tuple[npt.NDArray[Any], GGMLQuantizationType]] = {
        "token_embd.weight": (table, GGMLQuantizationType.F32)
    }
    llm = LLM(altered(tiny_path, tmp_path / "inf.gguf", tensors=tensors), threads=1, token_budget=8)
    with pytest.raises(
        RequestsFailed, match=r"1 of 3 embeddings failed, .* 1: .*hidden states after 20 tokens"
    ) as caught:
        llm.embed([[5] * 20, [7] * 20, [6] * 20], pooling)
    assert [one is not None for one in caught.value.completions] == [True, False, True]
    assert isinstance(caught.value.errors[1], ModelError)
    assert_idle(llm.engine)


def test_steps_that_fail_end_their_requests_and_three_the_engine(llm: LLM) -> None:
    llm.engine, runner = watched_engine(llm.model, llm.config)
    runner.before = failing(MemoryError())
    with pytest.raises(StepFailed, match="MemoryError"):
        llm.embed("Once upon a time")
    assert_idle(llm.engine)
    assert len(llm.embed("Once upon a time", "mean")) == 1
    runner.before = failing(MemoryError(), times=3)
    for kind in (StepFailed, StepFailed, StepFailed, EngineDead):
        with pytest.raises(kind):
            llm.embed("Once upon a time")


def test_one_that_is_aborted_has_no_vector(tiny: LoadedModel) -> None:
    engine = Engine(tiny, EngineConfig(token_budget=10))
    sequence = embed_sequence(engine, random_prompt(tiny, 45, seed=13), "mean")
    engine.add(sequence)
    engine.step()
    engine.abort(sequence)
    embedding = sequence.embedding()
    assert (embedding.finish_reason, len(embedding.vector)) == ("abort", 0)
    assert embedding.stats.num_computed_tokens == 10
    assert_idle(engine)


# Its neighbours.


def test_one_that_is_unlike_another_is_further_away(trained_llm: LLM) -> None:
    """Not a promise about quality: only that vectors are about what the prompt says."""
    texts = ["The cat sits on the mat.", "A cat is sitting on a mat.", "Interest rates rose by two percent in May."]
    first, alike, unlike = (each.vector for each in trained_llm.embed(texts, "mean"))
    assert first @ alike > first @ unlike
    assert num_common_tokens(*map(trained_llm.encode, texts[:2])) < 2


@pytest.fixture
def trained_llm(default_model_path: Path) -> LLM:
    return LLM(default_model_path, context=300, threads=2)


def test_an_embedding_is_frozen(llm: LLM) -> None:
    (embedding,) = llm.embed("a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        embedding.finish_reason = "length"  # type: ignore[misc]
