"""Masks that take long: nobody else waits for them, and a completion that asks too much of them ends alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import pytest

from constraints import RandomConstraint, RandomMatcher
from kvik.config import SamplingParams
from kvik.engine import mask_feed
from kvik.engine.engine import Engine
from kvik.errors import GrammarFailed
from kvik.models.loader import LoadedModel
from models import assert_idle
from sequences import new_sequence

PARAMS = SamplingParams(max_tokens=12, seed=3, temperature=1.0)


@dataclass(frozen=True, eq=False)
class GatedConstraint(RandomConstraint):
    """One whose masks but the first wait for a gate."""

    gate: threading.Event | None = None

    def new_matcher(self) -> RandomMatcher:
        return GatedMatcher(self)


class GatedMatcher(RandomMatcher):
    @property
    def is_finished(self) -> bool:
        return False

    def masks(self, draft_ids: SequenceOf[int] = ()) -> list[bytes]:
        assert isinstance(self.constraint, GatedConstraint)
        if self.token_ids and self.constraint.gate is not None:
            assert self.constraint.gate.wait(60)
        return super().masks(draft_ids)


def gated(model: LoadedModel, gate: threading.Event | None = None) -> GatedConstraint:
    return GatedConstraint(model.tokenizer, model.decoder.spec.vocab_size, seed=5, gate=gate)


def alone(model: LoadedModel, constraint: RandomConstraint | None) -> list[int]:
    engine = Engine(model)
    sequence = new_sequence(engine, model.tokenizer.encode("Hello"), PARAMS, constraint=constraint)
    engine.add(sequence)
    while engine.step() is not None:
        pass
    return sequence.completion_ids


def test_others_go_on_while_a_mask_takes_long(trained: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And both write what they write alone."""
    expected = alone(trained, gated(trained)), alone(trained, None)
    monkeypatch.setattr(mask_feed, "SLOW_MASK_S", 0.0)
    gate = threading.Event()
    engine = Engine(trained)
    prompt = trained.tokenizer.encode("Hello")
    slow = new_sequence(engine, prompt, PARAMS, constraint=gated(trained, gate))
    mate = new_sequence(engine, prompt, PARAMS)
    engine.add(slow)
    engine.add(mate)
    while mate.finish_reason is None:
        assert engine.step() is not None
    assert slow.num_completion_tokens == 1
    gate.set()
    while engine.step() is not None:
        engine.scheduler.check()
    assert (slow.completion_ids, mate.completion_ids) == expected
    assert_idle(engine)


def test_a_completion_whose_masks_cost_too_much_ends_alone(
    trained: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(trained, None)
    monkeypatch.setattr(mask_feed, "FREE_MASKS_S", 0.02)
    monkeypatch.setattr(mask_feed, "MAX_MEAN_MASK_S", 0.0)
    engine = Engine(trained)
    prompt = trained.tokenizer.encode("Hello")
    constraint = gated(trained)
    costly = new_sequence(engine, prompt, SamplingParams(max_tokens=2000, ignore_eos=True), constraint=constraint)
    mate = new_sequence(engine, prompt, PARAMS)
    engine.add(costly)
    engine.add(mate)
    while engine.step() is not None:
        pass
    assert isinstance(costly.error, GrammarFailed)
    assert "too costly" in costly.error.message
    assert costly.num_completion_tokens < 2000
    assert mate.completion_ids == expected
    assert_idle(engine)
