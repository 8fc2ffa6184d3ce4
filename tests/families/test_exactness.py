"""Bits that must not change, over every family: cache, chunks, batch mates, threads, captured or eager."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arrangements import Arrangement, assert_same
from families.cases import CASES
from families.family_digests import digests
from families.goldens import golden_of
from kvik import _native
from kvik.config import EngineConfig, SamplingParams
from kvik.engine.engine import Engine
from kvik.explain.tracing_ops import TracingOps, weight_names
from kvik.models.loader import LoadedModel, load_model
from kvik.ops.base import Batch
from kvik.ops.native import NativeOps
from kvik.ops.program import CapturedStep
from models import Run, random_prompt, run
from sequences import new_sequence
from subprocesses import python

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
ARRANGEMENTS = (
    Arrangement(token_budget=1, threads=2, shuffled=True),
    Arrangement(token_budget=5, threads=3),
    Arrangement(token_budget=16, threads=1, shuffled=True),
    Arrangement(token_budget=64, threads=2),
    Arrangement(use_cache=False, threads=3),
    Arrangement(token_budget=16, use_cache=False, shuffled=True),
)


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = golden_of(request.param).write_folder(tmp_path_factory.mktemp(request.param))
    return load_model(folder, NativeOps("int8", threads=1))


def test_every_arrangement_gives_the_same_bits(model: LoadedModel) -> None:
    prompt = random_prompt(model, 75, seed=11)  # three windows and more
    wanted = Arrangement().run(model, prompt, PARAMS, "f16", "int8")
    assert np.isfinite(wanted.logits).all()
    for arrangement in ARRANGEMENTS:
        assert_same(arrangement.run(model, prompt, PARAMS, "f16", "int8"), wanted, arrangement)


def test_what_was_cached_before_does_not_show(model: LoadedModel) -> None:
    """The same prompt again, a beginning of it, and one that goes on from it; windows have left its first blocks."""
    prompt = random_prompt(model, 150, seed=13)
    engine = Engine(model, EngineConfig(token_budget=40))
    for wanted_prompt in (prompt, prompt, prompt[:70], [*prompt, *random_prompt(model, 20, seed=14)]):
        assert_same(run(engine, wanted_prompt, PARAMS), run(Engine(model), wanted_prompt, PARAMS), len(wanted_prompt))
    assert engine.cache.stats.num_cached_tokens > 0


def assert_together_as_alone(model: LoadedModel, engine: Engine, prompts: list[list[int]]) -> None:
    """Sequences of one engine at once give what each gives alone."""
    alone = [run(Engine(model), prompt, PARAMS) for prompt in prompts]
    sequences = [new_sequence(engine, prompt, PARAMS) for prompt in prompts]
    for sequence in sequences:
        engine.add(sequence)
    rows: dict[int, list[np.ndarray]] = {id(sequence): [] for sequence in sequences}
    while any(sequence.finish_reason is None for sequence in sequences):
        result = engine.step()
        assert result is not None
        for owner, row in zip(result.sequences, result.logits, strict=True):
            rows[id(owner)].append(row)
    for sequence, wanted in zip(sequences, alone, strict=True):
        together = Run(sequence, sequence.completion_ids, np.stack(rows[id(sequence)]))
        assert_same(together, wanted, len(wanted.sequence.token_ids))


def test_batch_mates_do_not_show(model: LoadedModel) -> None:
    prompts = [random_prompt(model, length, seed=length) for length in (75, 3, 40)]
    assert_together_as_alone(model, Engine(model, EngineConfig(token_budget=50)), prompts)


def test_branches_of_what_was_computed_do_not_show(model: LoadedModel) -> None:
    """Two part inside a block while a third goes on with it, as forks do."""
    prompt = random_prompt(model, 70, seed=17)
    engine = Engine(model, EngineConfig(token_budget=30))
    run(engine, prompt, PARAMS)
    assert_together_as_alone(model, engine, [[*prompt, 1, 2, 3], [*prompt, 4], prompt])
    assert engine.cache.stats.num_cached_tokens > 0


FUSED = ("ministral3", "exaone4", "glm4", "hunyuan_v1_dense", "cohere2", "apertus", "arcee")


@pytest.mark.parametrize("name", FUSED)
def test_queries_keys_and_values_are_one_op(name: str, tmp_path: Path) -> None:
    decoder = load_model(golden_of(name).write_folder(tmp_path), NativeOps("int8", threads=1)).decoder
    spec = decoder.spec.kv_spec("f32")
    step = decoder.capture(decoder.ops.allocate_kv(spec, spec.pool_blocks_for(60)))
    assert isinstance(step, CapturedStep)
    names = [call.name for call in step.ops]
    assert names.count("norm_qkv") == names.count("attend") == decoder.spec.num_layers
    assert "rope" not in names


def test_a_recorded_pass_gives_the_bits_of_an_eager_one(model: LoadedModel) -> None:
    decoder, num_tokens = model.decoder, 60
    spec = decoder.spec.kv_spec("f32")
    num_blocks = spec.pool_blocks_for(num_tokens)
    positions = np.arange(num_tokens, dtype=np.int32)
    batch = Batch.in_blocks(
        token_ids=np.asarray(random_prompt(model, num_tokens, seed=12), np.int32),
        positions=positions,
        sequence_index=np.zeros(num_tokens, np.int32),
        block_tables=np.arange(num_blocks, dtype=np.int32)[None],
        logit_rows=positions,
        hidden_rows=positions[::-7],
        num_groups=len(spec.groups),
    )
    ops = TracingOps(decoder.ops, weight_names(decoder))
    eager = decoder.ops.to_numpy(decoder.forward(batch, decoder.ops.allocate_kv(spec, num_blocks), ops))
    captured, hidden = decoder.capture(decoder.ops.allocate_kv(spec, num_blocks)).with_hidden(batch)
    np.testing.assert_array_equal(captured.view(np.uint32), eager.view(np.uint32))
    assert ops.hidden is not None
    np.testing.assert_array_equal(hidden.view(np.uint32), ops.hidden[::-7].view(np.uint32))


@pytest.mark.full
@pytest.mark.parametrize("isa", [isa for isa in _native.usable_isas() if isa != _native.isa])
def test_instruction_sets_give_the_same_bits(isa: str) -> None:
    other = python("-m", "families.family_digests", KVIK_ISA=isa)
    assert other.returncode == 0, other.stderr
    assert dict(line.split() for line in other.stdout.splitlines()) == digests()
