"""Sequences beside and after each other on one engine: none shows in another, and what is handed on is not lost."""

from __future__ import annotations

import numpy as np
import pytest

from kvik.config import EngineConfig, SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.sequence import Sequence
from kvik.errors import InvalidInput
from kvik.models.loader import LoadedModel
from models import FloatArray, assert_idle, num_common_tokens, random_prompt, run, run_sequence, shuffle_free_blocks
from sequences import new_sequence

PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)
VOCAB = 320

pytestmark = pytest.mark.sanitize


@pytest.mark.tiny
def test_sequences_run_together_and_do_not_touch_each_other(tiny: LoadedModel) -> None:
    """Prompts share the steps' tokens in order of arrival; whoever has computed its own writes a token a step."""
    prompts = [random_prompt(tiny, length, seed=27 + length) for length in (33, 90, 64, 7)]
    alone = [run(Engine(tiny), prompt, PARAMS) for prompt in prompts]
    engine = Engine(tiny, EngineConfig(token_budget=20))
    shuffle_free_blocks(engine, seed=1)
    sequences = [new_sequence(engine, prompt, PARAMS) for prompt in prompts]
    for sequence in sequences:
        engine.add(sequence)
    rows: dict[Sequence, list[FloatArray]] = {sequence: [] for sequence in sequences}
    begun: dict[Sequence, None] = {}
    most_at_once = 0
    while engine.scheduler.has_work:
        result = engine.step()
        assert result is not None
        engine.scheduler.check()
        assert len(result.sequences) == len(result.logits)
        most_at_once = max(most_at_once, len(result.sequences))
        for sequence, row in zip(result.sequences, result.logits, strict=True):
            begun[sequence] = None
            rows[sequence].append(row)
    assert list(begun) == sequences
    assert most_at_once > 1
    for sequence, other in zip(sequences, alone, strict=True):
        assert sequence.completion_ids == other.token_ids
        np.testing.assert_array_equal(np.stack(rows[sequence]).view(np.uint32), other.logits.view(np.uint32))
        assert sequence.costs.num_computed_tokens == sequence.num_tokens - 1
    assert_idle(engine)


def test_a_lease_is_gone_on_from(tiny: LoadedModel) -> None:
    """Common tokens are not computed again, the last prompt token always is, and the bits are those of a fresh run."""
    first = random_prompt(tiny, 100, seed=28)
    other = (first[70] + 1) % VOCAB
    completion = run(Engine(tiny), first, PARAMS).token_ids
    for second in (
        [*first, 5, 6, 7],
        [*first, *completion, 5],
        [*first, *completion[:4], (completion[4] + 1) % VOCAB, 5],
        first,
        first[:50],
        first[:64],
        first[:65],
        [*first[:70], other, *first[71:]],
        [(first[0] + 1) % VOCAB, *first[1:]],
        first[:1],
    ):
        fresh = run(Engine(tiny), second, PARAMS)
        for prefix_cache in (False, True):
            engine = Engine(tiny, EngineConfig(token_budget=30, prefix_cache=prefix_cache))
            previous = run_sequence(engine, new_sequence(engine, first, PARAMS, hold=True)).sequence
            assert previous.lease is not None
            assert previous.lease.num_tokens == previous.num_tokens - 1, "the last token has no key and value"
            shared = num_common_tokens(previous.token_ids[:-1], second)
            turn = run_sequence(engine, new_sequence(engine, second, PARAMS, hold=True, lease=previous.lease))
            assert turn.sequence.lease is not None
            assert list(engine.cache.holds) == [previous.lease.hold, turn.sequence.lease.hold]
            assert turn.token_ids == fresh.token_ids
            np.testing.assert_array_equal(turn.logits.view(np.uint32), fresh.logits.view(np.uint32))
            stats = engine.completion(turn.sequence).stats
            assert stats.num_cached_tokens == min(shared, len(second) - 1)
            assert stats.num_computed_tokens == len(second) + 9 - stats.num_cached_tokens
            for lease in (previous.lease, turn.sequence.lease):
                lease.close()
            assert_idle(engine)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_blocks_of_an_aborted_sequence_can_be_handed_on(tiny: LoadedModel, prefix_cache: bool) -> None:
    """Only what was computed counts, wherever the abort came; without a lease the prefix tree has it."""
    prompt = random_prompt(tiny, 100, seed=29)
    fresh = run(Engine(tiny), [*prompt, 9], PARAMS)
    for num_steps in range(6):
        for hold in (True, False):
            engine = Engine(tiny, EngineConfig(token_budget=30, prefix_cache=prefix_cache))
            previous = new_sequence(engine, prompt, PARAMS, hold=hold)
            engine.add(previous)
            for _ in range(num_steps):
                engine.step()
            engine.abort(previous)
            turn = run_sequence(engine, new_sequence(engine, [*prompt, 9], PARAMS, lease=previous.lease))
            computed = min(30 * num_steps, 100)
            left = computed if hold or prefix_cache else 0
            assert turn.sequence.costs.num_cached_tokens == left
            np.testing.assert_array_equal(turn.logits.view(np.uint32), fresh.logits.view(np.uint32))
            if previous.lease is not None:
                previous.lease.close()
            assert_idle(engine)


def test_a_refused_prompt_leaves_the_previous_sequence_as_it_was(tiny: LoadedModel) -> None:
    engine, prompt = (
        Engine(tiny, EngineConfig(kv_memory=8 * Engine(tiny).kv_spec.block_bytes)),
        random_prompt(tiny, 40, seed=21),
    )
    previous = run_sequence(engine, new_sequence(engine, prompt, PARAMS, hold=True)).sequence
    for bad in ([], [VOCAB], [1] * 512, [1] * 300):
        with pytest.raises(InvalidInput):
            new_sequence(engine, bad, PARAMS, lease=previous.lease)
    with pytest.raises(InvalidInput):
        new_sequence(engine, prompt, PARAMS, lease=previous.lease, salt="")
    engine.scheduler.check()
    turn = run_sequence(engine, new_sequence(engine, [*prompt, 1], PARAMS, lease=previous.lease)).sequence
    assert turn.costs.num_cached_tokens == len(prompt)


def test_a_lease_of_a_sequence_that_was_aborted(tiny: LoadedModel) -> None:
    engine, prompt = Engine(tiny), random_prompt(tiny, 40, seed=21)
    previous = new_sequence(engine, prompt, PARAMS, hold=True)
    engine.add(previous)
    for _ in range(3):
        engine.step()
    engine.abort(previous)
    assert previous.lease is not None
    turn = new_sequence(engine, [*prompt, *previous.completion_ids, 7], PARAMS, lease=previous.lease)
    assert run_sequence(engine, turn).sequence.costs.num_cached_tokens == 42, "the third token has no key and value"
    previous.lease.close()
    assert_idle(engine)
