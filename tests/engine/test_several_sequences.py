"""Sequences beside and after each other on one engine: none shows in another, and what is handed on is not lost."""

from __future__ import annotations

import numpy as np
import pytest

from kvik.config import SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.sequence import Sequence
from kvik.errors import InvalidInput
from kvik.models.loader import LoadedModel
from models import assert_idle, num_common_tokens, random_prompt, run, run_sequence, shuffle_free_blocks

PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)
VOCAB = 320


def test_sequences_run_in_order_of_arrival_and_do_not_touch_each_other(tiny: LoadedModel) -> None:
    prompts = [random_prompt(tiny, length, seed=27 + length) for length in (33, 90, 64, 7)]
    alone = [run(Engine(tiny), prompt, PARAMS) for prompt in prompts]
    engine = Engine(tiny, token_budget=20)
    shuffle_free_blocks(engine, seed=1)
    sequences = [engine.new_sequence(prompt, PARAMS) for prompt in prompts]
    for sequence in sequences:
        engine.add(sequence)
    finished: list[Sequence] = []
    while engine.scheduler.running:
        result = engine.step()
        assert result is not None
        engine.scheduler.check(sequences)
        assert len(result.sequences) == len(result.logits) <= 1
        finished += [sequence for sequence in result.sequences if sequence.finish_reason is not None]
    assert finished == sequences
    for sequence, other in zip(sequences, alone, strict=True):
        assert sequence.completion_ids == other.token_ids
        engine.release(sequence)
    assert_idle(engine)


def test_a_previous_sequence_hands_its_blocks_on(tiny: LoadedModel) -> None:
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
        engine = Engine(tiny, token_budget=30)
        previous = run_sequence(engine, engine.new_sequence(first, PARAMS)).sequence
        shared = num_common_tokens(previous.token_ids[:-1], second)  # the last token has no key and value
        turn = run_sequence(engine, engine.new_sequence(second, PARAMS, previous=previous))
        assert previous.block_table == []
        fresh = run(Engine(tiny), second, PARAMS)
        assert turn.token_ids == fresh.token_ids
        np.testing.assert_array_equal(turn.logits.view(np.uint32), fresh.logits.view(np.uint32))
        stats = engine.completion(turn.sequence).stats
        assert stats.num_cached_tokens == min(shared, len(second) - 1)
        assert stats.num_computed_tokens == len(second) + 9 - stats.num_cached_tokens
        engine.release(turn.sequence)
        assert_idle(engine)


def test_blocks_of_an_aborted_sequence_can_be_handed_on(tiny: LoadedModel) -> None:
    """Only what was computed counts, wherever the abort came."""
    prompt = random_prompt(tiny, 100, seed=29)
    fresh = run(Engine(tiny), [*prompt, 9], PARAMS)
    for num_steps in range(6):
        engine = Engine(tiny, token_budget=30)
        previous = engine.new_sequence(prompt, PARAMS)
        engine.add(previous)
        for _ in range(num_steps):
            engine.step()
        engine.abort(previous)
        turn = run_sequence(engine, engine.new_sequence([*prompt, 9], PARAMS, previous=previous))
        assert turn.sequence.num_cached_tokens == min(30 * num_steps, 100)
        np.testing.assert_array_equal(turn.logits.view(np.uint32), fresh.logits.view(np.uint32))
        engine.release(turn.sequence)
        assert_idle(engine)


def test_a_refused_prompt_leaves_the_previous_sequence_as_it_was(tiny: LoadedModel) -> None:
    engine, prompt = Engine(tiny), random_prompt(tiny, 40, seed=21)
    previous = run_sequence(engine, engine.new_sequence(prompt, PARAMS)).sequence
    for bad in ([], [VOCAB], [1] * 512):
        with pytest.raises(InvalidInput):
            engine.new_sequence(bad, PARAMS, previous=previous)
    engine.scheduler.check([previous])
    turn = engine.new_sequence([*prompt, 1], PARAMS, previous=previous)
    assert turn.num_cached_tokens == len(prompt)
