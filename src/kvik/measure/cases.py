"""The cases of `kvik bench`: what each one runs, how long it took, and what work it was."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np

from kvik.config import TOKEN_BUDGET, SamplingParams
from kvik.engine.lease import Lease
from kvik.engine.request import HeldOptions
from kvik.engine.sequence import Sequence as TokenSequence
from kvik.errors import InvalidInput
from kvik.machine import available_memory_bytes
from kvik.measure.meter import Meter
from kvik.models.work import StepWork
from kvik.units import amount

if TYPE_CHECKING:
    from kvik.cache import KVCacheSpec
    from kvik.engine.llm import LLM

Kind = Literal["prefill", "seen", "decode"]

WARM_UP_TOKENS = 64


class Interrupted(Exception):
    """Ctrl-C came in the middle of a case, which has no figure for it."""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure.

    prefill: the first token of a prompt that nobody has seen; seen: of the same prompt once more; decode: `num_tokens`
    more tokens for each of `batch` sequences behind `depth` tokens of their own.
    """

    kind: Kind
    threads: int
    kv_dtype: str
    length: int  # of the prompt, or the depth
    num_tokens: int = 1  # written by each sequence
    batch: int = 1
    num_kv_heads: int | None = None  # of a variant with random weights; None: the model itself

    @property
    def name(self) -> str:
        """As in `decode 64 at depth 2,048`."""
        if self.kind == "decode":
            return f"decode {self.num_tokens:,} at depth {self.length:,}"
        return f"prefill {self.length:,}" + (", seen before" if self.kind == "seen" else "")

    @property
    def max_total_tokens(self) -> int:
        """Tokens of one of its sequences at the end."""
        return max(1, self.length) + self.num_tokens + (1 if self.kind == "decode" else 0)

    @property
    def processed_tokens(self) -> int:
        """Tokens that its time is for: the prompt's, or those written."""
        return self.batch * self.num_tokens if self.kind == "decode" else self.length

    def kv_bytes(self, spec: KVCacheSpec) -> int:
        """Bytes of keys and values that its sequences need."""
        return self.num_blocks(spec) * spec.written_bytes * spec.block_size

    def num_blocks(self, spec: KVCacheSpec) -> int:
        """Blocks that its sequences need."""
        return self.batch * spec.pool_blocks_for(self.max_total_tokens)


@dataclass(slots=True)
class Row:
    """What was measured of one case."""

    case: Case
    seconds: list[float] = field(default_factory=list)  # one a round
    work: StepWork = field(default_factory=StepWork)  # of a round; the same in each
    num_cached_tokens: int = 0  # of the prompt, found in the cache

    @property
    def median_s(self) -> float:
        """Seconds of a round."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_s(self) -> float:
        """By the median."""
        return self.case.processed_tokens / self.median_s


def make_cases(
    *,
    threads: Sequence[int],
    kv_dtypes: Sequence[str],
    prompts: Sequence[int],
    depths: Sequence[int],
    batches: Sequence[int],
    num_tokens: int,
    kv_heads: Sequence[int | None] = (None,),
) -> list[Case]:
    """Every combination, in the order in which a table shows them."""
    cases = []
    for heads, one_threads, kv_dtype in product(kv_heads, threads, kv_dtypes):
        for length in prompts:
            cases += [Case(kind, one_threads, kv_dtype, length, num_kv_heads=heads) for kind in ("prefill", "seen")]
        cases += [
            Case("decode", one_threads, kv_dtype, depth, num_tokens, batch, heads)
            for depth, batch in product(depths, batches)
        ]
    return cases


def check_cases(cases: Sequence[Case], context: int) -> None:
    """Raise `InvalidInput` for a case that the context does not hold."""
    longest = max(cases, key=lambda case: case.max_total_tokens)
    if longest.max_total_tokens > context:
        raise InvalidInput(
            f"{longest.name} takes {longest.max_total_tokens:,} tokens, the context holds {context:,}",
            hint="lower --depth, --prompt or --gen",
        )


class Bench:
    """Measures cases on engines that differ in threads and KV type, over the same weights or over variants of them."""

    def __init__(
        self,
        llm: LLM,
        cases: Sequence[Case],
        should_stop: Callable[[], bool] = lambda: False,
        variants: Mapping[int | None, LLM] | None = None,
    ) -> None:
        self._should_stop = should_stop
        self.llms: dict[int | None, LLM] = {None: llm, **(variants or {})}
        self._benches = {
            key: _EngineBench(
                self.llms[key[2]], [case for case in cases if _engine_of(case) == key], self._step_or_stop
            )
            for key in dict.fromkeys(map(_engine_of, cases))
        }
        self.rows = [Row(case) for case in cases]

    def run_round(self, advance: Callable[[int], None]) -> None:
        """Measure each case once, so that a slow spell of the machine hits all alike. Raises `Interrupted`."""
        for row in self.rows:
            self._benches[_engine_of(row.case)].measure(row)
            advance(1)

    def _step_or_stop(self, engine: Any) -> None:
        if self._should_stop():
            raise Interrupted
        engine.step()


def _engine_of(case: Case) -> tuple[int, str, int | None]:
    return case.threads, case.kv_dtype, case.num_kv_heads


@dataclass(frozen=True, slots=True)
class _Context:
    """What a decode case goes on from, in each round."""

    prompt: list[int]
    salt: str
    lease: Lease


class _EngineBench:
    """The cases of one engine."""

    def __init__(self, llm: LLM, cases: Sequence[Case], step: Callable[[Any], None]) -> None:
        spec = llm.model.decoder.spec.kv_spec(cases[0].kv_dtype)
        batch = max(case.batch for case in cases)
        self.engine = llm.new_engine(
            threads=cases[0].threads,
            kv_dtype=cases[0].kv_dtype,
            kv_memory=_kv_memory(llm, spec, cases),
            prefix_cache=True,
            max_running=max(llm.config.max_running, batch),
            token_budget=max(TOKEN_BUDGET, batch),
        )
        self._check_room(cases)
        self._step = step
        self._num_prompts = 0
        self._contexts: dict[Case, list[_Context]] = {}  # from round to round
        warm_up, _ = self._fresh(min(WARM_UP_TOKENS, llm.model.context - 1))
        self._run([self._new(warm_up, min(8, llm.model.context - len(warm_up)))])
        self._meter = Meter(self.engine)

    def measure(self, row: Row) -> None:
        """Add one round to the row."""
        if row.case.kind == "decode":
            seconds, work, cached = self._decode(row.case)
        else:
            seconds, work, cached = self._first_token(row.case)
        assert not row.seconds or (work, cached) == (row.work, row.num_cached_tokens), "rounds differ in their work"
        row.seconds.append(seconds)
        row.work, row.num_cached_tokens = work, cached

    def _first_token(self, case: Case) -> tuple[float, StepWork, int]:
        """A prompt that nobody has seen; or the same one again, of which the first run is not on the clock."""
        self._make_room(case)
        prompt, salt = self._fresh(case.length)
        if case.kind == "seen":
            self._run([self._new(prompt, 1, salt=salt)])
        self._meter.take()
        sequence = self._new(prompt, 1, salt=salt)
        started_s = time.perf_counter()
        self._run([sequence])
        seconds = time.perf_counter() - started_s
        num_cached = sequence.costs.num_cached_tokens
        assert case.kind == "seen" or num_cached == 0, "a cold prompt was found in the cache"
        return seconds, self._meter.take_work(), num_cached

    def _decode(self, case: Case) -> tuple[float, StepWork, int]:
        """All sequences write together, from the same place on: each has all but its context's last token computed."""
        if case not in self._contexts:
            self._make_room(case)
            self._contexts[case] = [self._context(max(1, case.length)) for _ in range(case.batch)]
        contexts = self._contexts[case]
        params = SamplingParams(max_tokens=case.num_tokens + 1, ignore_eos=True)
        requests = [
            self.engine.new_request(context.prompt, params, salt=context.salt, lease=context.lease)
            for context in contexts
        ]
        sequences = [self.engine.new_sequence(request) for request in requests]
        for sequence in sequences:
            self.engine.add(sequence)
        self._step(self.engine)  # the last token of each context, which brings the first token
        assert all(sequence.num_completion_tokens == 1 for sequence in sequences)
        self._meter.take()
        started_s = time.perf_counter()
        while self.engine.scheduler.has_work:
            self._step(self.engine)
        seconds = time.perf_counter() - started_s
        for sequence in sequences:
            _raise(sequence)
        return seconds, self._meter.take_work(), 0

    def _new(self, prompt: list[int], max_tokens: int, **options: Unpack[HeldOptions]) -> TokenSequence:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        return self.engine.new_sequence(self.engine.new_request(prompt, params, **options))

    def _context(self, length: int) -> _Context:
        """A prompt of so many tokens, computed."""
        prompt, salt = self._fresh(length)
        sequence = self._new(prompt, 1, salt=salt, hold=True)
        self._run([sequence])
        assert sequence.lease is not None
        return _Context(prompt, salt, sequence.lease)

    def _run(self, sequences: Sequence[TokenSequence]) -> None:
        for sequence in sequences:
            self.engine.add(sequence)
        while self.engine.scheduler.has_work:
            self._step(self.engine)
        for sequence in sequences:
            _raise(sequence)

    def _fresh(self, length: int) -> tuple[list[int], str]:
        """Random tokens, and a salt under which nothing is found that was computed before, not even by chance."""
        self._num_prompts += 1
        ids = np.random.default_rng(self._num_prompts).integers(0, self.engine.decoder.spec.vocab_size, length)
        return [int(token_id) for token_id in ids], f"bench {self._num_prompts}"

    def _make_room(self, case: Case) -> None:
        """Let go other cases' contexts where they stand in the way, and all that no case holds."""
        spec, pool = self.engine.kv_spec, self.engine.cache.pool
        needed = case.num_blocks(spec)
        for other in list(self._contexts):
            if pool.num_blocks - pool.num_held < needed:
                for context in self._contexts.pop(other):
                    context.lease.close()

    def _check_room(self, cases: Sequence[Case]) -> None:
        spec, pool = self.engine.kv_spec, self.engine.cache.pool
        largest = max(cases, key=lambda case: case.num_blocks(spec))
        needed, has = (
            count * spec.written_bytes * spec.block_size for count in (largest.num_blocks(spec), pool.num_blocks)
        )
        if needed > has:
            raise InvalidInput(
                f"{largest.name}, batch {largest.batch:,}, takes {amount(needed)} of keys and values,"
                f" the cache has {amount(has)}",
                hint=f"lower --batch or --depth, or raise --kv-memory to {-(-needed // 2**20):,}MiB",
            )


def _kv_memory(llm: LLM, spec: KVCacheSpec, cases: Sequence[Case]) -> int | str:
    """What the caller said; else room for every case's context, or where that is too much, for the largest case."""
    if llm.config.kv_memory != "auto":
        return llm.config.kv_memory
    warm_up = spec.pool_blocks_for(2 * WARM_UP_TOKENS) * spec.written_bytes * spec.block_size
    each = [case.kv_bytes(spec) for case in cases]
    return sum(each) + warm_up if sum(each) + warm_up <= available_memory_bytes() // 2 else max(*each, warm_up)


def _raise(sequence: TokenSequence) -> None:
    if sequence.error is not None:
        raise sequence.error
