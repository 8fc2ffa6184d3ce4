"""Counts what an engine really computes: between it and its forward pass stands a meter."""

from __future__ import annotations

import functools
import operator
from typing import Any

from kvik.engine.engine import Engine
from kvik.models.work import StepWork, count_work
from kvik.ops.base import Batch


class Meter:
    """Notes each batch that an engine runs from now on; counting them is done by `take`, off anybody's clock."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._forward = engine.forward
        self._batches: list[Batch] = []
        engine.forward = self

    def __call__(self, batch: Batch) -> Any:
        """Run the step."""
        self._batches.append(batch)
        return self._forward(batch)

    def take(self) -> list[Batch]:
        """The batches since the last time."""
        batches, self._batches = self._batches, []
        return batches

    def take_work(self) -> StepWork:
        """What they had to compute and to read, added up."""
        return functools.reduce(operator.add, map(self.count, self.take()), StepWork())

    def count(self, batch: Batch) -> StepWork:
        """The work of one of this engine's batches."""
        return count_work(self._engine.decoder, self._engine.kv_spec, batch)
