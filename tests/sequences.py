"""Sequences for tests that step an engine by hand."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Unpack

from kvik.config import SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.request import HeldOptions
from kvik.engine.sequence import Sequence


def new_sequence(
    engine: Engine, prompt_ids: SequenceOf[int], params: SamplingParams, **options: Unpack[HeldOptions]
) -> Sequence:
    """A checked request as the sequence that `Engine.add` takes."""
    return engine.new_sequence(engine.new_request(prompt_ids, params, **options))
