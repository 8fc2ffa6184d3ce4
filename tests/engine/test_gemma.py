"""The second trained model, Gemma 3 270M: as the default one, with windows, norms of queries and keys and one KV head.

Texts are longer than its windows of 512 tokens, so that blocks behind them are given back while it runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, TypeAlias

import numpy as np
import pytest

from arrangements import Arrangement, assert_same, prompt_logits
from crowds import ARRANGEMENTS, run_batch
from crowds import assert_same as assert_all_same
from kvik import _native
from kvik.config import ActivationDType, EngineConfig, KVDType, SamplingParams
from kvik.engine.engine import Engine
from kvik.models.loader import LoadedModel, load_model
from kvik.ops.native import NativeOps
from models import Run, run, shuffle_free_blocks
from subprocesses import python

pytestmark = pytest.mark.full

PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)
CONTEXT = 640
EDGE, BEYOND = 510, 600  # decoding and the prompt itself, respectively, leave the window of 512
NUM_BATCH_TOKENS = 8
DIGEST = """
import hashlib, sys
from pathlib import Path
from kvik.config import SamplingParams
from kvik.engine.engine import Engine
from kvik.models.loader import load_model
from kvik.ops.native import NativeOps
from models import run
model = load_model(Path(sys.argv[1]), NativeOps("int8", threads=2), context=640)
result = run(Engine(model), [int(word) for word in sys.argv[2:]], SamplingParams(max_tokens=2, ignore_eos=True))
print(hashlib.sha256(result.logits.tobytes()).hexdigest())
"""

Expected: TypeAlias = Callable[[int, KVDType, ActivationDType], Run]


@pytest.fixture(scope="module")
def gemma(gemma_path: Path) -> LoadedModel:
    return load_model(gemma_path, NativeOps("int8", threads=2), context=CONTEXT)


@pytest.fixture(scope="module")
def text(gemma: LoadedModel) -> list[int]:
    return gemma.tokenizer.encode(topics["with"] + topics["try"])


@pytest.fixture(scope="module")
def expected(gemma: LoadedModel, text: list[int]) -> Expected:
    """What the first tokens of the text give: all at once, two threads, the cache on."""

    @cache
    def run_once(length: int, kv_dtype: KVDType, activations: ActivationDType) -> Run:
        return Arrangement(token_budget=CONTEXT, threads=2).run(gemma, text[:length], PARAMS, kv_dtype, activations)

    return run_once


def test_it_has_what_it_is_here_for(gemma: LoadedModel) -> None:
    spec = gemma.decoder.spec
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (4, 1, 256, 262_144)
    assert (spec.qk_norm, spec.norm_places, spec.context_length) == ("head", "around", 32_768)
    assert [layer.window for layer in spec.layers].count(512) == 15


@pytest.mark.parametrize("length", [EDGE, BEYOND])
@pytest.mark.parametrize(
    "arrangement",
    [
        Arrangement(use_cache=False, threads=2),
        Arrangement(token_budget=7, threads=1),
        Arrangement(token_budget=33, threads=3, shuffled=True),
    ],
    ids=str,
)
def test_every_arrangement_gives_the_same_bits(
    gemma: LoadedModel, text: list[int], expected: Expected, length: int, arrangement: Arrangement
) -> None:
    result = arrangement.run(gemma, text[:length], PARAMS, "f16", "int8")
    assert_same(result, expected(length, "f16", "int8"), arrangement)


@pytest.mark.parametrize(("kv_dtype", "activations"), [("f32", "int8"), ("f16", "int16"), ("int8", "int8")])
def test_its_other_settings(
    gemma: LoadedModel, text: list[int], expected: Expected, kv_dtype: KVDType, activations: ActivationDType
) -> None:
    for arrangement in (Arrangement(use_cache=False), Arrangement(token_budget=50, threads=2, shuffled=True)):
        result = arrangement.run(gemma, text[:BEYOND], PARAMS, kv_dtype, activations)
        assert_same(result, expected(BEYOND, kv_dtype, activations), arrangement)


def test_every_prompt_logit(gemma: LoadedModel, text: list[int]) -> None:
    prompt = text[:50]
    whole = prompt_logits(gemma, prompt, len(prompt), "f16", seed=0)
    for chunk in (1, 7, 33):
        chunked = prompt_logits(gemma, prompt, chunk, "f16", seed=1)
        np.testing.assert_array_equal(chunked.view(np.uint32), whole.view(np.uint32), str(chunk))


@pytest.fixture(scope="module")
def prompts(gemma: LoadedModel, text: list[int]) -> list[list[int]]:
    """The first two begin alike, and beyond their windows; the third repeats itself, for drafts."""
    return [text[:560], text[:540] + text[700:710], gemma.tokenizer.encode("one two three " * 8), text[:3]]


@pytest.fixture(scope="module")
def alone(gemma: LoadedModel, prompts: list[list[int]]) -> list[Run]:
    engine = Engine(gemma, EngineConfig(prefix_cache=False))
    return [run(engine, prompt, dataclasses.replace(PARAMS, max_tokens=NUM_BATCH_TOKENS)) for prompt in prompts]


@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)
def test_batches_prefix_hits_preemption_and_drafts(
    gemma: LoadedModel, prompts: list[list[int]], alone: list[Run], arrangement: dict[str, Any]
) -> None:
    options = dict(arrangement)
    max_tokens = options.pop("max_tokens", NUM_BATCH_TOKENS)
    params = dataclasses.replace(PARAMS, speculate=options.pop("speculate", None), max_tokens=max_tokens)
    if "kv_memory" in options:
        options["kv_memory"] = bytes_of_blocks(gemma, 24)
    engine = Engine(gemma, EngineConfig(**options))
    shuffle_free_blocks(engine, seed=1)
    for _ in range(2):
        runs = run_batch(engine, prompts, params)
        firsts = [
            Run(each.sequence, each.token_ids[:NUM_BATCH_TOKENS], each.logits[:NUM_BATCH_TOKENS]) for each in runs
        ]
        assert_all_same(firsts, alone)
    assert engine.cache.stats.num_cached_tokens > 0
    if max_tokens > NUM_BATCH_TOKENS:
        assert engine.scheduler.num_preemptions > 0
    if params.speculate:
        assert sum(each.sequence.costs.num_accepted_tokens for each in runs) > 0


def bytes_of_blocks(model: LoadedModel, num_blocks: int) -> int:
    """A cache of so many blocks, of which one long prompt takes most: two of them cannot end side by side."""
    spec, config = model.decoder.spec.kv_spec("f16"), EngineConfig()
    return spec.pool_bytes(
        spec.pool_size(
            num_blocks, context=model.context, step_tokens=config.token_budget, max_running=config.max_running
        )
    )


SLOW = ("generic", "amx-emulated")


@pytest.mark.parametrize("isa", [isa for isa in _native.usable_isas() if isa != _native.isa])
def test_instruction_sets_give_the_same_bits(gemma: LoadedModel, text: list[int], isa: str) -> None:
    prompt = text[: 40 if isa in SLOW else 530]  # 530 tokens are longer than a window, and generic's a minute
    other = python("-c", DIGEST, str(gemma.path), *map(str, prompt), KVIK_ISA=isa)
    assert other.returncode == 0, other.stderr
    result = run(Engine(gemma), prompt, dataclasses.replace(PARAMS, max_tokens=2))
    assert other.stdout.strip() == hashlib.sha256(result.logits.tobytes()).hexdigest()
