"""Where a step's time goes: each op of a prefill or decode step, beside what the machine could do."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from kvik.config import SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.events import StepEvent
from kvik.engine.runner import ModelRunner
from kvik.engine.sequence import Sequence
from kvik.ops.native import NativeOps
from kvik.ops.program import MachineLimits, OpProfile


@dataclass(frozen=True, slots=True)
class StepProfile:
    """One step and each of its ops, beside what the machine could do."""

    title: str
    ops: list[OpProfile]  # one a kind, layers added up
    counts: list[int]  # ops of each kind
    limits: MachineLimits

    def exceeds(self, limits: MachineLimits) -> bool:
        """Whether an op was faster than these limits allow."""
        return any(op.least_seconds(limits) > op.seconds for op in self.ops)


def random_prompt(engine: Engine, num_tokens: int) -> list[int]:
    """Token ids of no meaning: the arithmetic does not depend on which."""
    ids = np.random.default_rng(0).integers(0, engine.decoder.spec.vocab_size, num_tokens)
    return [int(token_id) for token_id in ids]


@contextmanager
def sequence_at(engine: Engine, num_tokens: int) -> Iterator[Sequence]:
    """A sequence whose first `num_tokens` tokens are computed, ready to write; its blocks go back at the end."""
    params = SamplingParams(max_tokens=engine.model.context, ignore_eos=True)
    sequence = engine.new_sequence(engine.new_request(random_prompt(engine, max(1, num_tokens)), params))
    try:
        engine.add(sequence)
        _step_to(engine, sequence, min(num_tokens, 1))
        yield sequence
    finally:
        engine.abort(sequence)


def _step_to(engine: Engine, sequence: Sequence, num_completion_tokens: int) -> None:
    """Step until so many tokens are written; raises what ended the sequence before."""
    while sequence.num_completion_tokens < num_completion_tokens:
        engine.step()
        if sequence.error is not None:
            raise sequence.error


def profile_prefill(engine: Engine, num_tokens: int, *, rounds: int) -> StepProfile:
    """Where the time of one chunk of a prompt goes."""
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    num_tokens = min(num_tokens, engine.scheduler.token_budget)
    sequence = engine.new_sequence(engine.new_request(random_prompt(engine, num_tokens), params))
    try:
        engine.add(sequence)
        return _profile_next(engine, f"prefill, {num_tokens:,} tokens", rounds)
    finally:
        engine.abort(sequence)


def profile_decode(engine: Engine, *, depth: int, rounds: int) -> StepProfile:
    """Where the time of one decode step goes."""
    with sequence_at(engine, max(1, depth)):
        return _profile_next(engine, f"decode, one token at depth {depth:,}", rounds)


def _profile_next(engine: Engine, title: str, rounds: int) -> StepProfile:
    runner, ops = engine.runner, engine.decoder.ops
    assert isinstance(runner, ModelRunner)
    assert isinstance(ops, NativeOps)
    profiles: list[list[OpProfile]] = []

    def profile(event: StepEvent) -> None:
        # Computing a step again writes the same keys and values to the same slots.
        assert event.batch is not None
        profiles.extend(runner.profile(event.batch) for _ in range(rounds))

    engine.add_observer(profile)
    try:
        engine.step()
    finally:
        engine.remove_observer(profile)
    merged, counts = _by_kind(_median_profile(profiles))
    num_bytes = runner.step_bytes(1, 1)
    found = StepProfile(title, merged, counts, ops.limits(num_bytes))
    if found.exceeds(found.limits):
        found = replace(found, limits=found.limits.or_better(ops.limits(num_bytes)))
    return found


def _median_profile(profiles: list[list[OpProfile]]) -> list[OpProfile]:
    return [_with_seconds(same, statistics.median(op.seconds for op in same)) for same in zip(*profiles, strict=True)]


def _with_seconds(ops: tuple[OpProfile, ...], seconds: float) -> OpProfile:
    first = ops[0]
    return OpProfile(first.name, first.widths, seconds, first.bytes, first.operations, first.is_integer)


def _by_kind(ops: list[OpProfile]) -> tuple[list[OpProfile], list[int]]:
    """Ops of the same name and widths as one, in the order of their first."""
    kinds: dict[tuple[str, tuple[int, int]], list[OpProfile]] = {}
    for op in ops:
        kinds.setdefault((op.name, op.widths), []).append(op)
    merged = [
        OpProfile(
            name=name,
            widths=widths,
            seconds=sum(op.seconds for op in same),
            bytes=sum(op.bytes for op in same),
            operations=sum(op.operations for op in same),
            is_integer=same[0].is_integer,
        )
        for (name, widths), same in kinds.items()
    ]
    return merged, [len(same) for same in kinds.values()]
