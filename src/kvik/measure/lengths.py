"""One token at each of several lengths, computed whole and computed with the cache: prefill against decode."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvik.measure.meter import Meter
from kvik.measure.passes import sequence_at
from kvik.models.work import StepWork

if TYPE_CHECKING:
    from kvik.engine.llm import LLM

LATER_TOKENS = 5  # that are written behind each length; the median of them counts


@dataclass(slots=True)
class LengthCost:
    """Behind `length` tokens: the next one computed from all of them, and later ones from what is kept."""

    length: int
    first_token_s: list[float] = field(default_factory=list)  # one a round
    later_token_s: list[float] = field(default_factory=list)
    first_work: StepWork = field(default_factory=StepWork)
    later_work: StepWork = field(default_factory=StepWork)  # of the first of the later tokens

    @property
    def median_first_s(self) -> float:
        """Seconds to the first token: what each token costs without the cache."""
        return statistics.median(self.first_token_s)

    @property
    def median_later_s(self) -> float:
        """Seconds of a later token."""
        return statistics.median(self.later_token_s)


def measure_lengths(
    llm: LLM, lengths: Sequence[int], rounds: int, should_stop: Callable[[], bool] = lambda: False
) -> list[LengthCost]:
    """Measure all lengths round by round; what was measured when `should_stop` said so. Tokens are random.

    Length 1 is always among them.
    """
    engine = llm.new_engine(prefix_cache=False)  # so each first token is a cold one
    meter = Meter(engine)
    costs = [LengthCost(length) for length in sorted({1, *lengths})]
    for _ in range(rounds):
        for cost in costs:
            if should_stop():
                return [known for known in costs if known.later_token_s]
            meter.take()
            started_s = time.perf_counter()
            with sequence_at(engine, cost.length) as sequence:
                cost.first_token_s.append(time.perf_counter() - started_s)
                assert sequence.costs.num_cached_tokens == 0
                cost.first_work = meter.take_work()
                steps = []
                for index in range(LATER_TOKENS):
                    started_s = time.perf_counter()
                    engine.step()
                    steps.append(time.perf_counter() - started_s)
                    if index == 0:
                        cost.later_work = meter.take_work()
                cost.later_token_s.append(statistics.median(steps))
    return costs


def whole_text_s(costs: Sequence[LengthCost], length: int) -> tuple[float, float]:
    """Seconds to write all tokens of a text from its first to `length`, without the cache and with it.

    Each token's cost lies on the straight line between the measured lengths around it.
    """
    every = np.arange(1, length + 1)
    measured = [cost.length for cost in costs]
    without = np.interp(every, measured, [cost.median_first_s for cost in costs])
    with_cache = np.interp(every, measured, [cost.median_later_s for cost in costs])
    return float(without.sum()), float(with_cache.sum())
