"""What an engine tells whoever watches it: one event a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvik.cache import BlockEvents
from kvik.engine.batch import ScheduledBatch
from kvik.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step brought: a sequence for each token that was chosen, and the logits it was chosen from."""

    sequences: list[Sequence]
    rows: list[int]  # of `all_logits`, one for each
    all_logits: npt.NDArray[np.float32]  # (R, vocab_size), those of the prompt that were asked for among them
    error: Exception | None = None  # why the step failed

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """Those that the tokens were chosen from (tokens, vocab_size)."""
        return self.all_logits[self.rows]


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One step as it went. Times are those of `time.perf_counter`; sequences carry their requests and their costs."""

    started_s: float
    schedule_s: float  # seconds of each part
    run_s: float
    sample_s: float
    commit_s: float
    batch: ScheduledBatch | None  # None where nothing ran, and sequences had ended since the step before
    result: StepResult | None
    begun: list[Sequence]  # those that run since this step
    ended: list[Sequence]  # since the step before
    preempted: list[Sequence]  # which lost their blocks, and wait again
    blocks: BlockEvents

    @property
    def run_started_s(self) -> float:
        """When the model began."""
        return self.started_s + self.schedule_s


class StepClock:
    """The times at which the parts of a step ended."""

    def __init__(self) -> None:
        self.times_s = [time.perf_counter()]

    def lap(self) -> None:
        """Another part has ended."""
        self.times_s.append(time.perf_counter())

    @property
    def last_s(self) -> float:
        """Seconds of the part that has ended."""
        return self.times_s[-1] - self.times_s[-2]

    def so_far_s(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.times_s[0]

    def parts_s(self) -> tuple[float, float, float, float]:
        """Seconds of each part; 0 for those that a failed step never came to."""
        started_s, scheduled_s, *ends_s = self.times_s
        run_s, sampled_s, ended_s = (*ends_s, *[ends_s[-1]] * 2)[:3]
        return scheduled_s - started_s, run_s - scheduled_s, sampled_s - run_s, ended_s - sampled_s


Observer: TypeAlias = Callable[[StepEvent], None]
"""Called by the engine's thread after each step, with the engine's lock held: it must not call the engine."""
