"""A runner that tests look into, or make fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from kvik.config import EngineConfig
from kvik.engine.batch import ScheduledBatch
from kvik.engine.engine import Engine
from kvik.engine.runner import ModelRunner, StepOutput
from kvik.models.loader import LoadedModel


class WatchedRunner(ModelRunner):
    """Calls `before` with each batch, which may raise, and then runs it."""

    before: Callable[[ScheduledBatch], None] | None = None

    def run(self, batch: ScheduledBatch) -> StepOutput:
        if self.before is not None:
            self.before(batch)
        return super().run(batch)


def watched_engine(model: LoadedModel, config: EngineConfig | None = None) -> tuple[Engine, WatchedRunner]:
    """An engine, and the runner that it has."""
    engine = Engine(model, config, make_runner=WatchedRunner)
    return engine, cast(WatchedRunner, engine.runner)


def failing(error: BaseException, after: int = 0, times: int = 1) -> Callable[[Any], None]:
    """What raises `error` the first `times` times it is called after `after` calls."""
    calls = 0

    def fail(_: Any) -> None:
        nonlocal calls
        calls += 1
        if after < calls <= after + times:
            raise error

    return fail
