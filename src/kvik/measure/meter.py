"""Counts what an engine really computes."""

from __future__ import annotations

import functools
import operator

from kvik.engine.engine import Engine
from kvik.engine.events import StepEvent
from kvik.models.work import StepWork, count_work
from kvik.ops.base import Batch


class Meter:
    """An observer that notes each batch an engine runs from now on; counting is done by `take`, off anybody's clock."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._batches: list[Batch] = []
        engine.add_observer(self)

    def __call__(self, event: StepEvent) -> None:
        """A step has run."""
        if event.batch is not None and event.result is not None and event.result.error is None:
            self._batches.append(event.batch.arrays)

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
