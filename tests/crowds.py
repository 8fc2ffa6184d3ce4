"""Many sequences in one engine, and the comparison of their bits with those of runs alone."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from kvik.config import SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.sequence import Sequence
from models import FloatArray, Run, assert_idle
from sequences import new_sequence

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
ARRANGEMENTS: list[dict[str, Any]] = [
    {},
    {"token_budget": 7},
    {"token_budget": 33, "max_running": 2},
    {"kv_memory": "small", "max_tokens": 60},
    {"speculate": "ngram"},
]
"""How the engine goes about the trained models."""


def add_all(engine: Engine, prompts: SequenceOf[list[int]], params: SequenceOf[SamplingParams]) -> list[Sequence]:
    sequences = [new_sequence(engine, prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    for sequence in sequences:
        engine.add(sequence)
    return sequences


def run_together(engine: Engine, sequences: SequenceOf[Sequence]) -> list[Run]:
    """Step to the end of all, proving the accounts after each step."""
    rows: dict[Sequence, list[FloatArray]] = {sequence: [] for sequence in sequences}
    while any(sequence.finish_reason is None for sequence in sequences):
        result = engine.step()
        engine.scheduler.check()
        assert result is not None
        assert len(result.sequences) == len(result.logits)
        for sequence, row in zip(result.sequences, result.logits, strict=True):
            rows[sequence].append(row)
    for sequence in sequences:
        assert sequence.error is None, sequence.error
    assert_idle(engine)
    return [Run(sequence, sequence.completion_ids, np.stack(rows[sequence])) for sequence in sequences]


def run_batch(engine: Engine, prompts: SequenceOf[list[int]], params: SamplingParams = PARAMS) -> list[Run]:
    return run_together(engine, add_all(engine, prompts, [params] * len(prompts)))


def assert_same(found: SequenceOf[Run], wanted: SequenceOf[Run], message: object = "") -> None:
    for index, (mine, other) in enumerate(zip(found, wanted, strict=True)):
        assert mine.token_ids == other.token_ids, (index, message)
        np.testing.assert_array_equal(mine.logits.view(np.uint32), other.logits.view(np.uint32), f"{index}: {message}")
