"""The promise that every other one rests on: the logits of a token depend on nothing but the tokens before it.

Not on the cache, the chunks, the threads or where a block lies. Compared are bits, of every logit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from arrangements import Arrangement, assert_same, prompt_logits
from kvik.config import ActivationDType, EngineConfig, KVDType, SamplingParams
from kvik.engine.engine import Engine
from kvik.models.loader import LoadedModel
from models import random_prompt, run, shuffle_free_blocks, tiny_model, tiny_reference_model, with_ops

MIXED = {"attn_q": Type.Q4_1, "attn_k": Type.Q5_0, "attn_v": Type.F16, "ffn_down": Type.Q4_0, "token_embd": Type.F32}
K_QUANTS = {
    "attn_q": Type.Q4_K,
    "attn_k": Type.Q3_K,
    "attn_v": Type.Q6_K,
    "ffn_gate": Type.Q5_K,
    "ffn_up": Type.Q2_K,
    "ffn_down": Type.BF16,
    "output": Type.Q6_K,
}
SHAPES: list[dict[str, Any]] = [
    {"seed": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "weight_type": Type.Q8_0},
    {"seed": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 40, "weight_type": MIXED, "tied": False},
    {"seed": 3, "num_heads": 6, "num_kv_heads": 2, "head_dim": 64, "weight_type": K_QUANTS, "tied": False}
    | {"hidden_size": 256, "intermediate_size": 256, "num_layers": 1},
    {"seed": 4, "num_heads": 3, "num_kv_heads": 1, "head_dim": 64, "weight_type": Type.Q4_1, "num_layers": 3},
    {"seed": 5, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "hidden_size": 37, "weight_type": Type.F32},
]
BUDGETS = (1, 7, 32, 33, 512)
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
KV_DTYPES = (*get_args(KVDType), "k=int8,v=f16")


def arrangements() -> Iterator[Arrangement]:
    for budget, use_cache, threads in itertools.product(BUDGETS, (True, False), (1, 2)):
        yield Arrangement(budget, use_cache, threads, shuffled=threads == 2)
    yield Arrangement(33, threads=3, shuffled=True)
    yield Arrangement(7, use_cache=False, threads=3)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"seed{shape['seed']}")
def shaped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("shaped"), **request.param)


@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_every_arrangement_gives_the_same_bits(
    shaped: LoadedModel, kv_dtype: str, activations: ActivationDType
) -> None:
    prompt = random_prompt(shaped, 70, seed=11)
    wanted = Arrangement().run(shaped, prompt, PARAMS, kv_dtype, activations)
    assert np.isfinite(wanted.logits).all()
    assert len(wanted.token_ids) == 8
    for arrangement in arrangements():
        assert_same(arrangement.run(shaped, prompt, PARAMS, kv_dtype, activations), wanted, arrangement)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 250, 256, 505])
def test_lengths_at_the_edges_of_blocks_and_segments(shaped: LoadedModel, length: int) -> None:
    """The completion crosses the edge: position 256 begins a segment, 512 ends the context."""
    prompt = random_prompt(shaped, length, seed=length)
    params = dataclasses.replace(PARAMS, max_tokens=12)
    wanted = Arrangement().run(shaped, prompt, params, "f16", "int8")
    for arrangement in (
        Arrangement(use_cache=False, threads=2),
        Arrangement(token_budget=1, shuffled=True),
        Arrangement(token_budget=100, threads=3),
    ):
        assert_same(arrangement.run(shaped, prompt, params, "f16", "int8"), wanted, arrangement)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_context_of_several_segments(tmp_path: Path, kv_dtype: str) -> None:
    """From three segments on it would show if they were merged in another order."""
    model = tiny_model(tmp_path, seed=7, num_heads=3, num_kv_heads=1, head_dim=32, context_length=1100)
    prompt = random_prompt(model, 1020, seed=18)
    wanted = Arrangement().run(model, prompt, PARAMS, kv_dtype, "int8")
    for arrangement in (
        Arrangement(use_cache=False, threads=3),
        Arrangement(token_budget=1, threads=2, shuffled=True),
        Arrangement(token_budget=100, threads=3, shuffled=True),
    ):
        assert_same(arrangement.run(model, prompt, PARAMS, kv_dtype, "int8"), wanted, arrangement)


@pytest.mark.parametrize("seed", range(8))
def test_random_arrangements_with_sampling(tiny: LoadedModel, seed: int) -> None:
    """Lengths, budgets and settings by chance; tokens drawn at temperature 1 follow (seed, position) alone."""
    rng = np.random.default_rng(seed)
    prompt = random_prompt(tiny, int(rng.integers(1, 450)), seed)
    params = SamplingParams(max_tokens=int(rng.integers(1, 40)), temperature=1.0, top_p=0.9, seed=seed, ignore_eos=True)
    kv_types: tuple[KVDType, ...] = get_args(KVDType)
    kv_dtype = kv_types[seed % 3]
    wanted = Arrangement().run(tiny, prompt, params, kv_dtype, "int8")
    for _ in range(4):
        arrangement = Arrangement(
            token_budget=int(rng.integers(1, 300)),
            use_cache=bool(rng.integers(0, 2)),
            threads=int(rng.integers(1, 4)),
            shuffled=bool(rng.integers(0, 2)),
        )
        assert_same(arrangement.run(tiny, prompt, params, kv_dtype, "int8"), wanted, (seed, arrangement))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_every_position_of_a_prompt(shaped: LoadedModel, kv_dtype: str) -> None:
    prompt = random_prompt(shaped, 300, seed=12)
    wanted = prompt_logits(shaped, prompt, 300, kv_dtype, seed=0)
    assert wanted.shape == (300, shaped.decoder.spec.vocab_size)
    for seed, (chunk, threads) in enumerate(itertools.product((1, 7, 32, 33, 256), (1, 2)), start=1):
        logits = prompt_logits(with_ops(shaped, "int8", threads), prompt, chunk, kv_dtype, seed)
        np.testing.assert_array_equal(logits.view(np.uint32), wanted.view(np.uint32), f"chunk {chunk}, {threads}")


def test_logits_depend_on_every_token_before(tiny: LoadedModel) -> None:
    """The comparison above would also hold for a model that looks at nothing."""
    prompt = random_prompt(tiny, 70, seed=13)
    wanted = prompt_logits(tiny, prompt, 70, "f16", seed=0)
    for position in (0, 1, 31, 32, 60):
        other = [*prompt[:position], (prompt[position] + 1) % 320, *prompt[position + 1 :]]
        changed = (prompt_logits(tiny, other, 70, "f16", seed=0) != wanted).any(axis=1)
        assert not changed[:position].any()
        assert changed[position:].all()


def test_blocks_of_another_sequence_do_not_show(tiny: LoadedModel) -> None:
    """A pool that was full of other text a moment ago."""
    prompt = random_prompt(tiny, 90, seed=14)
    fresh = run(Engine(tiny), prompt, PARAMS)
    engine = Engine(tiny, EngineConfig(token_budget=50))
    for seed in range(4):
        run(engine, random_prompt(tiny, 400, seed), PARAMS)
        shuffle_free_blocks(engine, seed)
        assert_same(run(engine, prompt, PARAMS), fresh, seed)


TRAINED_ARRANGEMENTS = [
    Arrangement(use_cache=False, threads=2),
    Arrangement(token_budget=1, threads=2, shuffled=True),
    Arrangement(token_budget=7, threads=1),
    Arrangement(token_budget=32, threads=2),
    Arrangement(token_budget=33, threads=3, shuffled=True),
]


@pytest.mark.full
@pytest.mark.parametrize("arrangement", TRAINED_ARRANGEMENTS, ids=str)
@pytest.mark.parametrize(("seed", "length"), [(15, 40), (18, 34), (19, 65)])
def test_the_default_model(trained: LoadedModel, seed: int, length: int, arrangement: Arrangement) -> None:
    prompt = random_prompt(trained, length, seed)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    wanted = Arrangement(threads=2).run(trained, prompt, params, "f16", "int8")
    assert_same(arrangement.run(trained, prompt, params, "f16", "int8"), wanted, arrangement)


@pytest.mark.full
@pytest.mark.parametrize("chunk", [1, 7, 32, 33])
def test_every_prompt_logit_of_the_default_model(trained: LoadedModel, chunk: int) -> None:
    prompt = random_prompt(trained, 50, seed=20)
    whole = prompt_logits(trained, prompt, len(prompt), "f16", seed=0)
    np.testing.assert_array_equal(
        prompt_logits(trained, prompt, chunk, "f16", seed=1).view(np.uint32), whole.view(np.uint32)
    )


@pytest.mark.parametrize(("kv_dtype", "activations"), [("f32", "int8"), ("f16", "int16"), ("int8", "int8")])
def test_the_default_model_in_its_other_settings(
    trained: LoadedModel, kv_dtype: str, activations: ActivationDType
) -> None:
    prompt = trained.tokenizer.encode("The capital of France is")
    params = SamplingParams(max_tokens=4)
    wanted = Arrangement(threads=2).run(trained, prompt, params, kv_dtype, activations)
    assert "Paris" in wanted.sequence.text.text
    for arrangement in (Arrangement(use_cache=False, threads=1), Arrangement(token_budget=3, shuffled=True)):
        assert_same(arrangement.run(trained, prompt, params, kv_dtype, activations), wanted, arrangement)


@pytest.mark.parametrize(("activations", "tolerance"), [("int16", 0.01), ("int8", 0.15)])
@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[3:], ids=lambda shape: f"seed{shape['seed']}")
def test_the_reference_backend_agrees(
    tmp_path: Path, shape: dict[str, Any], activations: ActivationDType, tolerance: float
) -> None:
    """Logits have a standard deviation of 2. int16: rounding alone; int8: a tie may fall on the other side."""
    native = tiny_model(tmp_path, activations=activations, **shape)
    reference = tiny_reference_model(tmp_path, activations=activations, **shape)
    prompt = random_prompt(native, 45, seed=16)
    results = [run(Engine(model, EngineConfig(kv_dtype="f32")), prompt, PARAMS) for model in (native, reference)]
    assert results[0].token_ids == results[1].token_ids
    assert abs(results[0].logits - results[1].logits).max() < tolerance


def test_the_reference_backend_in_chunks(tmp_path: Path) -> None:
    """Its sums are in float64, so a prompt in chunks is the prompt at once but for a last bit."""
    model = tiny_reference_model(tmp_path, seed=6)
    prompt = random_prompt(model, 40, seed=17)
    whole = run(Engine(model), prompt, PARAMS)
    for engine, use_cache in ((Engine(model, EngineConfig(token_budget=7)), True), (Engine(model), False)):
        result = run(engine, prompt, PARAMS, use_cache=use_cache)
        assert result.token_ids == whole.token_ids
        assert abs(result.logits - whole.logits).max() < 0.01
