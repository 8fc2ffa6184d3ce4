"""Watches an engine: each of its steps runs as it always does, and then once more with every op noted."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvik.engine.engine import Engine
from kvik.engine.events import StepEvent
from kvik.engine.runner import ModelRunner
from kvik.engine.sampler_reference import token_logprobs
from kvik.explain.tracing_ops import OpCall, TracingOps, weight_names
from kvik.ops.base import Batch

FloatArray = npt.NDArray[np.float32]

NUM_CANDIDATES = 5
"""Most likely next tokens that are kept of each row of logits."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that might come next."""

    token_id: int
    probability: float
    logit: float


@dataclass(frozen=True, slots=True)
class TracedStep:
    """What one step computed."""

    first_position: int
    num_tokens: int
    started_s: float  # by time.perf_counter, as the engine ran it
    seconds: float
    slots: tuple[int, ...]  # of each token: block_id * block_size + offset
    candidates: tuple[Candidate, ...]  # the most likely first
    calls: tuple[OpCall, ...]


class Tracer:
    """An observer of an engine with one sequence.

    What an engine computes does not depend on who watches: the watched repetition writes the same keys and values into
    the same slots, and its logits are compared with the first ones, bit for bit. Rows that are computed again are
    compared with the first time as well.
    """

    def __init__(self, engine: Engine, layers: Collection[int]) -> None:
        assert isinstance(engine.runner, ModelRunner)
        self._runner = engine.runner
        self._names = weight_names(engine.decoder)
        self.layers = tuple(sorted(layers))  # whose queries are kept
        self.steps: list[TracedStep] = []
        self.keys = Rows(engine.decoder.spec.num_layers)
        self.values = Rows(engine.decoder.spec.num_layers)
        self.hidden = Rows(1)
        self.queries = Rows(len(self.layers))
        self.attended = Rows(len(self.layers))
        self.aside_s = 0.0  # spent on watching
        engine.add_observer(self)

    def clock(self) -> float:
        """Seconds, as `time.perf_counter`, without those spent on watching."""
        return time.perf_counter() - self.aside_s

    def __call__(self, event: StepEvent) -> None:
        """A step has run: it runs once more, watched."""
        if event.batch is None or event.result is None or event.result.error is not None:
            return
        started_s = time.perf_counter()
        batch = event.batch.arrays
        assert batch.num_sequences == 1, "one sequence is watched, not several"
        self._watch(batch, event.result.all_logits, event.run_started_s, event.run_s)
        self.aside_s += time.perf_counter() - started_s

    def _watch(self, batch: Batch, rows: FloatArray, started_s: float, seconds: float) -> None:
        decoder = self._runner.decoder
        ops = TracingOps(decoder.ops, self._names)
        again = decoder.ops.to_numpy(decoder.forward(batch, self._runner.kv_arrays, ops))
        assert np.array_equal(again.view(np.uint32), rows.view(np.uint32)), "watching changed the logits"
        first = int(batch.positions[0])
        assert ops.hidden is not None
        self.hidden.note(first, [ops.hidden])
        self.keys.note(first, ops.keys)
        self.values.note(first, ops.values)
        self.queries.note(first, [ops.queries[layer] for layer in self.layers])
        self.attended.note(first, [ops.attended[layer] for layer in self.layers])
        self.steps.append(
            TracedStep(
                first_position=first,
                num_tokens=len(batch.positions),
                started_s=started_s,
                seconds=seconds,
                slots=tuple(batch.groups[0].slot_mapping.tolist()),
                candidates=candidates(rows[-1]) if len(rows) else (),
                calls=tuple(ops.calls),
            )
        )


class Rows:
    """One row for each position, of several arrays, and how often a row that was there came again."""

    def __init__(self, num_arrays: int) -> None:
        self._parts: list[list[FloatArray]] = [[] for _ in range(num_arrays)]
        self.num_rows = 0  # of each array
        self.num_repeated = 0  # rows that came again, over all arrays
        self.num_same = 0  # of those, the same in every bit

    def __getitem__(self, index: int) -> FloatArray:
        """All rows of one array: (num_rows, ...)."""
        self._parts[index] = [np.concatenate(self._parts[index])]
        return self._parts[index][0]

    def note(self, first: int, arrays: Sequence[FloatArray]) -> None:
        """Rows from position `first` on: new ones are kept, known ones compared."""
        assert first <= self.num_rows, f"rows from {first} on behind {self.num_rows}"
        num_known = 0
        for index, array in enumerate(arrays):
            num_known = min(self.num_rows - first, len(array))
            if num_known:
                before = self[index][first : first + num_known]
                self.num_repeated += num_known
                self.num_same += same_rows(before, array[:num_known])
            self._parts[index].append(array[num_known:].copy())
        if arrays:
            self.num_rows += len(arrays[0]) - num_known


def same_rows(first: FloatArray, second: FloatArray) -> int:
    """Rows that agree in every bit."""
    if not first.size:
        return 0
    pairs = (np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint32) for array in (first, second))
    one, other = pairs
    return int((one == other).all(axis=1).sum())


def candidates(logits: FloatArray, count: int = NUM_CANDIDATES) -> tuple[Candidate, ...]:
    """The most likely tokens of a row of logits (vocab_size,), and their probabilities."""
    top = token_logprobs(logits, 0, count).top
    return tuple(Candidate(token_id, math.exp(logprob), float(logits[token_id])) for token_id, logprob in top.items())
