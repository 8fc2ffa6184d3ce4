"""The plan is what the engine allocates: to the byte for keys and values, for random models, types and loads."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_files import tiny_llama
from kvik import LLM, SamplingParams, plan
from kvik.cache import BLOCK_SIZE, BLOCKS_PER_SUPERBLOCK, KVCacheSpec
from kvik.cache.sizing import choose_pool_size
from kvik.cache.spec import whole_superblocks
from kvik.config import TOKEN_BUDGET, KVDType
from kvik.engine.runner import ModelRunner
from kvik.models.spec import DecoderSpec, LayerSpec
from kvik.ops.native import NativeKVCache, NativeOps
from kvik.planner import plan as plan_module
from kvik.planner.memory import kv_memory
from kvik.planner.sources import find_shape
from sequences import new_sequence


def random_model(path: Path, rng: random.Random) -> dict[str, int]:
    num_kv_heads = rng.choice([1, 2, 3])
    shape = {
        "num_layers": rng.randint(1, 5),
        "num_kv_heads": num_kv_heads,
        "num_heads": num_kv_heads * rng.choice([1, 2, 4]),
        "head_dim": rng.choice([8, 16, 24, 64]),
        "hidden_size": rng.choice([32, 64, 160]),
        "intermediate_size": rng.choice([32, 96]),
        "context_length": rng.choice([300, 512, 1024]),
    }
    # Columns come in groups of 32: the attended heads are those of the output matrix.
    while shape["num_heads"] * shape["head_dim"] % 32:
        shape["num_heads"] *= 2
    tiny_llama(path, **shape, seed=rng.randrange(2**32))  # type: ignore[arg-type]
    return shape


@pytest.mark.parametrize("seed", range(12))
def test_the_cache_has_the_planned_bytes_and_serves_the_planned_load(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "tiny.gguf"
    shape = random_model(path, rng)
    dtype: KVDType = rng.choice(get_args(KVDType))
    users, context = rng.randint(1, 4), rng.randint(2, shape["context_length"])
    prefix = rng.choice([0, rng.randint(0, context - 1)])
    print(f"seed {seed}: {shape}, {dtype}, {users} users, context {context}, prefix {prefix}")  # noqa: T201  # shown where it fails
    planned = plan(str(path), context=context, users=users, kv=dtype, prefix=prefix)
    (layers,) = planned.kv.layers

    llm = LLM(str(path), threads=1, kv_dtype=dtype, kv_memory=planned.kv.num_bytes)
    assert isinstance(llm.engine.runner, ModelRunner)
    arrays = llm.engine.runner.kv_arrays
    assert isinstance(arrays, NativeKVCache)
    assert sum(one.num_bytes for one in arrays.arrays) == planned.kv.num_bytes == llm.cache.num_bytes
    assert llm.cache.num_blocks == layers.num_blocks
    assert llm.engine.kv_spec.token_bytes == planned.kv.token_bytes
    assert llm.engine.kv_spec.num_blocks_for(context) * llm.engine.kv_spec.block_bytes == planned.kv.sequence_bytes

    common = [3 + index % 200 for index in range(prefix)]
    prompts = [
        [*common, *(3 + (index * 7 + user) % 200 for index in range(context - 1 - prefix))] for user in range(users)
    ]
    done = llm.generate([prompt or [3] for prompt in prompts], SamplingParams(max_tokens=1, ignore_eos=True))
    assert len(done) == users
    assert llm.cache.stats.num_evicted_blocks == 0, "all had room at once"
    shared = prefix // BLOCK_SIZE * BLOCK_SIZE
    cached = sum(one.stats.num_cached_tokens for one in done)
    assert (users - 1) * shared <= cached <= (users - 1) * prefix  # of a block in part, a copy is made


@pytest.mark.parametrize("dtype", get_args(KVDType))
@pytest.mark.parametrize("num_superblocks", [1, 2, 7])
def test_a_memory_holds_as_many_tokens_as_the_engine_makes_of_it(
    tmp_path: Path, dtype: KVDType, num_superblocks: int
) -> None:
    """The largest context that is said to fit has just the engine's blocks; one token more would need others."""
    path = tiny_llama(tmp_path / "tiny.gguf", context_length=1 << 16)
    small = plan(str(path), context=2, kv=dtype)
    spec = LLM(str(path), threads=1, kv_dtype=dtype).engine.kv_spec
    superblock = BLOCKS_PER_SUPERBLOCK * BLOCK_SIZE
    whole = plan(str(path), context=superblock * num_superblocks, kv=dtype)
    assert whole.kv.num_bytes == num_superblocks * BLOCKS_PER_SUPERBLOCK * spec.block_bytes
    size = choose_pool_size(spec, 2, whole.kv.num_bytes, token_budget=TOKEN_BUDGET, max_running=64)
    assert size.num_blocks == num_superblocks * BLOCKS_PER_SUPERBLOCK
    fit = plan(str(path), context=2, kv=dtype, memory=whole.needed_bytes).fit
    assert fit is not None
    assert fit.largest_context == superblock * num_superblocks
    assert small.kv.num_bytes == BLOCKS_PER_SUPERBLOCK * spec.block_bytes


def test_the_default_model_from_its_header(default_model_path: Path) -> None:
    planned = plan("smollm2", context=1000)
    llm = LLM("smollm2", context=1000, kv_memory=planned.kv.num_bytes)
    assert planned.model.origin == "gguf"
    assert planned.model.source == str(default_model_path)
    assert planned.weights is not None
    assert planned.weights.held_bytes == llm.engine.runner.step_bytes(1, 1)
    assert planned.kv.num_bytes == llm.cache.num_bytes == 32 * llm.engine.kv_spec.block_bytes


def test_on_this_machine_the_engine_chooses_as_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_roofline", lambda *_: None)
    path = tiny_llama(tmp_path / "tiny.gguf")
    planned = plan(str(path), device="here", context=400)
    assert planned.auto_kv_bytes == LLM(str(path), threads=1, context=400).cache.num_bytes


@pytest.mark.parametrize("users", [1, 3])
@pytest.mark.parametrize("context", [20, 150, 400])
def test_layers_with_a_window_take_what_the_engine_gives_them(tmp_path: Path, context: int, users: int) -> None:
    window = {"llama.attention.sliding_window": 40}
    path = tiny_llama(tmp_path / "tiny.gguf", extra_metadata=window, context_length=401)
    planned = plan(str(path), context=context, users=users)
    (layers,) = planned.kv.layers
    assert (layers.kind, layers.window) == ("window", 40)
    llm = LLM(str(path), threads=1, context=context + 1, kv_memory=planned.kv.num_bytes)
    assert isinstance(llm.engine.runner, ModelRunner)
    arrays = llm.engine.runner.kv_arrays
    assert isinstance(arrays, NativeKVCache)
    assert sum(one.num_bytes for one in arrays.arrays) == planned.kv.num_bytes == llm.cache.num_bytes
    prompts = [[3 + (index * 7 + user) % 200 for index in range(context)] for user in range(users)]
    done = llm.generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True))
    assert {one.stats.kv_bytes for one in done} <= set(range(planned.kv.sequence_bytes, planned.kv.num_bytes + 1))
    sequence = new_sequence(llm.engine, prompts[0], SamplingParams(max_tokens=1, ignore_eos=True), hold=True)
    llm.engine.add(sequence)
    while llm.engine.step() is not None:
        pass
    assert sequence.lease is not None
    assert llm.engine.cache.held_bytes(sequence.lease.hold.table) == planned.kv.sequence_bytes


def test_windows_and_others_in_one_budget() -> None:
    """The engine's formula and the planner's, over random mixtures."""
    rng = random.Random(5)
    for _ in range(200):
        windows = tuple(rng.choice((None, 24, 100, 4096)) for _ in range(rng.randint(1, 8)))
        spec = KVCacheSpec.uniform(len(windows), 2, 16, "f16", layer_windows=windows)
        shape = dataclasses.replace(find_shape("smollm2-135m"), groups=spec.groups, num_layers=len(windows))
        context, users = rng.randint(1, 5000), rng.randint(1, 20)
        planned = kv_memory(shape, "f16", context, users=users)
        blocks = whole_superblocks(users * spec.num_blocks_for(context))
        load = {"context": context, "step_tokens": TOKEN_BUDGET, "max_running": 64}
        assert planned.num_bytes == spec.pool_bytes(spec.pool_size(blocks, **load)), (windows, context, users)
        assert planned.sequence_bytes == spec.held_bytes(context)
        if spec.block_bytes:
            assert spec.pool_size_within(planned.num_bytes, **load).num_blocks == blocks


@st.composite
def mixtures(draw: st.DrawFn) -> DecoderSpec:
    """Layers of any windows and head shapes, of which some read what an earlier one keeps."""
    layers: list[LayerSpec] = []
    for _ in range(draw(st.integers(1, 7))):
        own: list[int] = [at for at, layer in enumerate(layers) if layer.kv_from is None]
        if own and draw(st.sampled_from((False, True))):
            at = draw(st.sampled_from(own))
            layers.append(dataclasses.replace(layers[at], kv_from=at))
            continue
        window, num_kv_heads = draw(st.sampled_from((None, 24, 100, 700))), draw(st.sampled_from((None, 1, 4)))
        layers.append(LayerSpec(None, window, num_kv_heads, draw(st.sampled_from((None, 8, 64)))))
    spec = DecoderSpec(
        architecture="llama", hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16,
        vocab_size=50, context_length=5000, layers=tuple(layers), tied_head=True, norm_eps=1e-5,
    )  # fmt: skip
    assert spec.problem() is None
    return spec


@given(
    mixtures(),
    st.sampled_from((*get_args(KVDType), "k=int8,v=f16", "k=f32,v=int8")),
    st.integers(1, 3000),
    st.integers(1, 20),
)
@settings(deadline=None, max_examples=60)
def test_any_mixture_of_groups_takes_what_is_planned(
    decoder: DecoderSpec, dtype: str, context: int, users: int
) -> None:
    """Of head shapes, windows, keys unlike values, and layers that share: the bytes of the arrays."""
    spec, f16 = decoder.kv_spec(dtype), decoder.kv_spec("f16")
    shape = dataclasses.replace(
        find_shape("smollm2-135m"), groups=f16.groups, shared_layers=f16.shared, num_layers=decoder.num_layers
    )
    planned = kv_memory(shape, dtype, context, users=users)
    blocks = whole_superblocks(users * spec.num_blocks_for(context))
    size = spec.pool_size(blocks, context=context, step_tokens=TOKEN_BUDGET, max_running=64)
    arrays = NativeOps(threads=1).allocate_kv(spec, size.group_blocks)
    assert planned.dtype == dtype
    assert planned.num_bytes == sum(one.num_bytes for one in arrays.arrays) == spec.pool_bytes(size)
    assert planned.num_bytes == sum(layer.num_bytes for layer in planned.layers)
    assert sum(layer.num_layers for layer in planned.layers) + len(spec.shared) == decoder.num_layers == len(arrays)
    assert (planned.sequence_bytes, planned.token_bytes) == (spec.held_bytes(context), spec.token_bytes)
