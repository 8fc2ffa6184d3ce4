"""What one engine has done, in plain counters: an observer that costs a fraction of a microsecond a token."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from kvik.engine.engine import Engine
from kvik.engine.events import StepEvent
from kvik.engine.sequence import Sequence
from kvik.errors import KvikError

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper ends of the buckets of all histograms."""


class Histogram:
    """How often a time fell into each bucket."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total_s += seconds

    def buckets(self) -> list[tuple[str, int]]:
        """Each upper end, and how many lie below it."""
        found, total = [], 0
        for end, count in zip((*map(str, SECONDS), "+Inf"), self.counts, strict=True):
            total += count
            found.append((end, total))
        return found


class EngineMeter:
    """The observer. The engine's thread writes, anybody reads.

    Of a prompt that is completed several times there is one sample of the time in the queue and of the prefill; each
    completion that ends well has one of the other times, and of the time between tokens one less than it has tokens.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.num_steps = 0
        self.step_s = {"schedule": 0.0, "run": 0.0, "sample": 0.0, "commit": 0.0}
        self.num_cached_tokens = 0  # of prompts
        self.num_computed_tokens = 0  # of prompts
        self.num_generated_tokens = 0
        self.num_drafted_tokens = 0
        self.num_accepted_tokens = 0
        self.misses: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.num_aborted = 0
        self.time_to_first_token = Histogram()
        self.inter_token = Histogram()
        self.end_to_end = Histogram()
        self.queue = Histogram()
        self.prefill = Histogram()
        self.decode = Histogram()
        self.last_token_s: float | None = None  # by `time.perf_counter`
        self._newest_s: dict[Sequence, float] = {}  # when each that has a token got its newest
        engine.add_observer(self)

    @property
    def is_decoding(self) -> bool:
        """Whether a completion that has begun is not whole yet."""
        return bool(self._newest_s)

    def __call__(self, event: StepEvent) -> None:
        """Count one step."""
        if event.batch is not None:
            self.num_steps += 1
            parts = (event.schedule_s, event.run_s, event.sample_s, event.commit_s)
            for name, part_s in zip(self.step_s, parts, strict=True):
                self.step_s[name] += part_s
        for sequence in event.begun:
            self._begin(sequence)
        if event.result is not None and event.result.sequences:
            self._count_tokens(event.result.sequences)
        for sequence in event.ended:
            self._end(sequence)

    def _begin(self, sequence: Sequence) -> None:
        if sequence.branch:
            return
        costs = sequence.costs
        self.num_cached_tokens += costs.num_cached_tokens
        self.num_computed_tokens += sequence.num_prompt_tokens - costs.num_cached_tokens
        if costs.miss_reason is not None:
            self.misses[costs.miss_reason.name.lower()] += 1

    def _count_tokens(self, sequences: list[Sequence]) -> None:
        newest, inter_token = self._newest_s, self.inter_token
        for sequence in sequences:
            costs = sequence.costs
            now_s = costs.last_token_s
            assert now_s is not None
            before_s = newest.get(sequence)
            newest[sequence] = now_s
            if before_s is not None:
                inter_token.add(now_s - before_s)
            elif costs.submitted_s is not None:
                self.time_to_first_token.add(now_s - costs.submitted_s)
        self.num_generated_tokens += len(sequences)
        self.last_token_s = now_s

    def _end(self, sequence: Sequence) -> None:
        self._newest_s.pop(sequence, None)
        costs = sequence.costs
        self.num_drafted_tokens += costs.num_drafted_tokens
        self.num_accepted_tokens += costs.num_accepted_tokens
        if sequence.finish_reason == "abort":
            if sequence.error is None:
                self.num_aborted += 1
            else:
                kind = type(sequence.error)
                self.failed[kind.__name__ if issubclass(kind, KvikError) else "other"] += 1
            return
        self.finished[sequence.finish_reason or "stop"] += 1
        submitted_s, begun_s, first_s, last_s = (
            costs.submitted_s,
            costs.begun_s,
            costs.first_token_s,
            costs.last_token_s,
        )
        if submitted_s is None or begun_s is None or first_s is None or last_s is None:
            return
        if not sequence.branch:
            self.queue.add(begun_s - submitted_s)
            self.prefill.add(first_s - begun_s)
        self.end_to_end.add(last_s - submitted_s)
        self.decode.add(last_s - first_s)
