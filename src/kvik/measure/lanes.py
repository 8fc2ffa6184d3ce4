"""The race itself, without its drawing: two lanes over the same weights, one of which forgets what it computed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvik.config import SamplingParams
from kvik.measure.meter import Meter
from kvik.models.work import StepWork
from kvik.ops.base import KVIndex

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvik.engine.engine import Engine
    from kvik.engine.llm import LLM
    from kvik.engine.sequence import Sequence
    from kvik.ops.base import Batch


@dataclass(frozen=True, slots=True)
class TokenCost:
    """What it took to write a token, or several that were guessed: the first one's cost is that of the whole prompt."""

    length: int  # tokens of the sequence that it was chosen after
    num_tokens: int
    seconds: float
    work: StepWork
    repeated: StepWork  # the part of it that had been computed before


@dataclass(slots=True, eq=False)
class RaceLane:
    """One engine answering the prompt, its clock, and what tells the logits that each token was chosen from."""

    name: str
    engine: Engine
    sequence: Sequence
    meter: Meter
    elapsed_s: float = 0.0  # in steps of its own
    time_to_first_token_s: float | None = None
    digests: list[bytes] = field(default_factory=list)  # of the logits' bits, 32 bytes in place of a row for each token
    costs: list[TokenCost] = field(default_factory=list)
    clock: Callable[[], float] = time.perf_counter  # an observer's stands still while it looks
    _seconds: float = 0.0  # since the last token, and the work
    _work: StepWork = field(default_factory=StepWork)
    _repeated: StepWork = field(default_factory=StepWork)
    _num_known: int = 0  # tokens that were computed at some time

    @property
    def is_done(self) -> bool:
        """Whether it has written all it will."""
        return self.sequence.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self.sequence.num_completion_tokens

    @property
    def tokens_per_s(self) -> float:
        """Tokens written by the time taken, the prompt's included."""
        return self.num_tokens / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def kv_kept_bytes(self) -> int:
        """Bytes of the blocks whose keys and values the next token will not compute again."""
        lease = self.sequence.lease  # once it has ended
        num_kept = self.sequence.num_computed_tokens if lease is None else lease.num_tokens
        return self.engine.kv_spec.held_bytes(num_kept)

    def step(self) -> None:
        """Advance by one step, on this lane's clock."""
        started_s = self.clock()
        result = self.engine.step()
        step_s = self.clock() - started_s
        self.elapsed_s += step_s
        assert result is not None
        self._seconds += step_s
        for batch in self.meter.take():
            self._work += self.meter.count(batch)
            self._repeated += self.meter.count(_computed_before(batch, self._num_known))
            self._num_known = max(self._num_known, int(batch.positions.max()) + 1)
        for row in result.logits:
            self.digests.append(digest(row))
            if self.time_to_first_token_s is None:
                self.time_to_first_token_s = self.elapsed_s
        if result.sequences:
            length = self.sequence.num_tokens - len(result.sequences)
            self.costs.append(TokenCost(length, len(result.sequences), self._seconds, self._work, self._repeated))
            self._seconds, self._work, self._repeated = 0.0, StepWork(), StepWork()

    def close(self) -> None:
        """Stop where it is."""
        self.engine.abort(self.sequence)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where two lanes differ: numbers of tokens, counted from 1, or None."""

    num_compared: int  # tokens that both have
    token_difference: int | None
    logits_difference: int | None

    @property
    def is_same(self) -> bool:
        """Whether every token and every bit of the logits agree."""
        return self.token_difference is None and self.logits_difference is None


def make_lanes(llm: LLM, prompt_ids: list[int], params: SamplingParams, **changes: Any) -> tuple[RaceLane, RaceLane]:
    """Two lanes at the start, without and with the cache, each with an engine of its own; they draw with one seed.

    Neither reads or writes stored blocks: both begin with nothing. `changes` are those of `LLM.new_engine`.
    """
    if params.seed is None:
        params = replace(params, seed=int.from_bytes(os.urandom(8)))
    lanes = []
    for name, use_cache in (("without the cache", False), ("with the cache", True)):
        engine = llm.new_engine(store=None, **changes)
        request = engine.new_request(prompt_ids, params, use_cache=use_cache, hold=True)
        sequence = engine.new_sequence(request)
        _warm_up(engine, prompt_ids[:1])
        _assert_cold(engine)
        engine.add(sequence)
        lanes.append(RaceLane(name, engine, sequence, Meter(engine)))
    return lanes[0], lanes[1]


def run_race(
    lanes: tuple[RaceLane, RaceLane], show: Callable[[], None], should_stop: Callable[[], bool] = lambda: False
) -> bool:
    """Step the lanes until both are done, and tell whether they are; `should_stop` is asked before each step.

    The next step goes to the lane whose clock shows less, so both are seen at the same moment of their race.
    """
    while racing := [lane for lane in lanes if not lane.is_done]:
        if should_stop():
            for lane in lanes:
                lane.close()
            return False
        min(racing, key=lambda lane: lane.elapsed_s).step()
        show()
    return True


def digest(logits: npt.NDArray[np.float32]) -> bytes:
    """A cryptographic hash of the bits: two rows with the same one are the same."""
    import hashlib

    return hashlib.blake2b(logits.tobytes(), digest_size=32).digest()


def compare(first: RaceLane, second: RaceLane) -> Verdict:
    """Compare what both lanes have, token by token and bit by bit."""
    num_compared = min(first.num_tokens, second.num_tokens)
    token_difference = logits_difference = None
    for index in reversed(range(num_compared)):
        if first.sequence.completion_ids[index] != second.sequence.completion_ids[index]:
            token_difference = index + 1
        if first.digests[index] != second.digests[index]:
            logits_difference = index + 1
    return Verdict(num_compared, token_difference, logits_difference)


def _warm_up(engine: Engine, token_ids: list[int]) -> None:
    """Touch all weights once, so that no lane's clock pays for their first use."""
    request = engine.new_request(token_ids, SamplingParams(max_tokens=1), use_cache=False)
    sequence = engine.new_sequence(request)
    engine.add(sequence)
    while sequence.finish_reason is None:
        engine.step()


def _assert_cold(engine: Engine) -> None:
    """Nothing that the race will ask for is there already."""
    pool, stats = engine.cache.pool, engine.cache.stats
    assert pool.num_free == pool.num_blocks, f"{pool.num_blocks - pool.num_free} blocks hold something"
    assert stats.num_cached_tokens == 0, f"{stats.num_cached_tokens} tokens came from the cache"


def _computed_before(batch: Batch, num_known: int) -> Batch:
    """The tokens of the batch among the sequence's first `num_known`, without their logits."""
    known = batch.positions < num_known
    return replace(
        batch,
        token_ids=batch.token_ids[known],
        positions=batch.positions[known],
        kv_index=batch.kv_index[known],
        kv_bounds=batch.kv_bounds[known],
        sequence_index=batch.sequence_index[known],
        logit_rows=np.empty(0, np.int32),
        groups=tuple(KVIndex(group.slot_mapping[known], group.block_tables) for group in batch.groups),
    )
