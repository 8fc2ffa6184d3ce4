"""Thousands of random workloads on the real engine with the model of `simulation.py`; each replays from its seed.

KVIK_SIMULATION_SEED=n runs that one alone, KVIK_SIMULATIONS=n so many; tiers.py says how many else.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from constraints import CannotGoOn, RandomConstraint
from kvik.cache import MissReason
from kvik.config import Pooling, SamplingParams
from kvik.engine.lease import Lease
from kvik.engine.request import HeldOptions
from kvik.engine.sequence import Sequence
from kvik.errors import CacheTooSmall, InvalidInput, QueueFull, StepFailed
from simulation import (
    ALL,
    CONTEXT,
    VOCAB,
    SimulatedEngine,
    SimulatedFailure,
    expected_prompt_logprobs,
    expected_sequence,
    expected_vector,
)
from tiers import simulation_groups

# Of the layers: that all see all tokens in every second workload.
WINDOWS = (ALL, (None, 40), ALL, (24,), ALL, (5, None, 70), ALL, (130, 33))
CODED = (1, 2, 6)  # of these, those whose layers that see all tokens keep codes
SALTS = (None, None, None, "ada", "bob")


@dataclass
class Happened:
    """What makes a workload worth running, counted over many."""

    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_copied_blocks: int = 0
    num_evicted_blocks: int = 0
    num_accepted_tokens: int = 0
    num_refused: int = 0
    num_reclaimed: int = 0  # leases that lost their blocks to others
    num_aborted: int = 0
    num_failed: int = 0  # steps
    num_evicted_twins: int = 0  # blocks of windows
    num_embeddings: int = 0
    num_cached_tokens_of_embeddings: int = 0
    num_constrained_tokens: int = 0  # of drafts of constrained requests, accepted
    num_grammars_ended: int = 0  # texts that their grammar ended
    num_grammars_failed: int = 0
    num_short_windows: int = 0  # matches that ended where a window reaches back to blocks that are gone


@dataclass
class Workload:
    """A random engine, and what random clients do to it."""

    seed: int
    rng: random.Random = field(init=False)
    engine: SimulatedEngine = field(init=False)
    requests: list[tuple[Sequence, list[int], str | None]] = field(default_factory=list)  # each branch, prompt and salt
    leases: list[tuple[Lease, list[int], str | None]] = field(default_factory=list)  # each with its tokens and salt
    pins: list[tuple[Lease, list[int], str | None]] = field(default_factory=list)
    num_refused: int = 0
    num_reclaimed: int = 0
    num_failed: int = 0
    failed_last: bool = False

    def __post_init__(self) -> None:
        self.rng = rng = random.Random(self.seed)
        is_coded = self.seed % len(WINDOWS) in CODED
        self.engine = SimulatedEngine(
            num_blocks=8 * rng.choice((1, 1, 2, 2, 3, 8)),
            windows=WINDOWS[self.seed % len(WINDOWS)],
            kv_dtype="k4v4" if is_coded else "f32",
            least_sequences=rng.choice((1, 2, 8)),
            token_budget=rng.choice((1, 5, 16, 33, 64, 200)),
            mixed_budget=rng.choice((1, 8, 40, 256)),
            prefix_cache=rng.random() < 0.9,
            max_running=rng.choice((1, 2, 4, 8)),
            max_waiting=rng.choice((2, 50)),
        )
        self.beginnings = [self._tokens(rng.randrange(1, 300 if is_coded else 120)) for _ in range(3)]

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(VOCAB) for _ in range(count)]

    def run(self) -> None:
        rng = self.rng
        for _ in range(rng.randrange(5, 25)):
            action = rng.choices(
                (
                    self.submit,
                    self.step,
                    self.abort,
                    self.fork,
                    self.release,
                    self.pin,
                    self.unpin,
                    self.clear,
                    self.fail,
                    self.press,
                ),
                (20, 24, 4, 4, 4, 2, 2, 2, 1, 8 if self.engine.cache.twins.groups else 0),
            )[0]
            action()
            self.engine.scheduler.check()
        while self.pins:
            self.unpin()
        for _ in range(20_000):
            if not self.engine.scheduler.has_work:
                break
            self.step()
        self.finish()

    def submit(self) -> None:
        rng, engine = self.rng, self.engine
        beginning = rng.choice(self.beginnings)
        lease, leased_salt = None, None
        if (leases := self.leases + self.pins) and rng.random() < 0.4:
            lease, beginning, leased_salt = rng.choice(leases)
        prompt = beginning[: rng.randrange(1, len(beginning) + 1)] if rng.random() < 0.5 else list(beginning)
        prompt = (prompt + self._tokens(rng.choice((0, 0, 1, 5, 40))))[: CONTEXT - 1]
        salt = leased_salt if lease and rng.random() < 0.8 else rng.choice(SALTS)
        params = SamplingParams(
            max_tokens=rng.choice((1, 2, 10, 40, 80, 120)),
            temperature=rng.choice((0.0, 0.0, 1.0)),
            seed=rng.randrange(1000),
            n=rng.choice((1, 1, 1, 2, 3)),
            ignore_eos=rng.random() < 0.7,
            stop=rng.choice(((), (), ("aba",))),
            speculate=rng.choice((None, "ngram")),
            logprobs=rng.choice((None, 2)),
            echo=rng.random() < 0.2,
        )
        # Computing all tokens for each new one, one a step, would take most of the test's time.
        options: HeldOptions = {
            "use_cache": rng.random() < 0.9 or engine.scheduler.token_budget < 16 or params.max_tokens > 10,
            "hold": rng.random() < 0.4,
            "lease": lease,
            "share": rng.random() < 0.9,
            "priority": rng.choice((0, 0, 0, 1, -1)),
            "salt": salt,
        }
        pooling: Pooling | None = rng.choice((None, None, None, "last", "mean"))
        # With numbers of its own, so that all else happens as it would without.
        chance = random.Random(f"{self.seed} {len(self.requests)}")
        if pooling is None and chance.random() < 0.4:
            fails = chance.random() < 0.3
            options["constraint"] = RandomConstraint(
                engine.model.tokenizer, VOCAB, seed=chance.randrange(1000), fails=fails
            )
            params = dataclasses.replace(params, min_tokens=min(params.max_tokens, chance.choice((0, 0, 5))))
        try:
            request = (
                engine.new_request(prompt, params, **options)
                if pooling is None
                else engine.new_embed_request(prompt, pooling, rng.random() < 0.5, **options)
            )
            sequence = engine.new_sequence(request)
            branches = list(sequence.all_branches())
            engine.add(sequence)
        except (CacheTooSmall, QueueFull):
            self.num_refused += 1
            return
        if lease is not None and rng.random() < 0.5:  # whether it has begun or not
            self.leases = [each for each in self.leases if each[0] is not lease]
            self.pins = [each for each in self.pins if each[0] is not lease]
            lease.close()
        self.requests += [(branch, prompt, salt) for branch in branches]

    def step(self) -> None:
        result = self.engine.step()
        self.engine.scheduler.check()
        self.failed_last = result is not None and result.error is not None
        if result is not None and result.error is not None:
            assert isinstance(result.error, SimulatedFailure)
            self.num_failed += 1
        self._take_leases()

    def _take_leases(self) -> None:
        for sequence, _, salt in self.requests:
            lease, sequence.lease = sequence.lease, None
            if lease is not None:
                self.leases.append((lease, sequence.token_ids, salt))
        kept = [each for each in self.leases if each[0].num_tokens]
        self.num_reclaimed += len(self.leases) - len(kept)
        self.leases = kept

    def abort(self) -> None:
        unfinished = [sequence for sequence, _, _ in self.requests if sequence.finish_reason is None]
        if unfinished and self.rng.random() < 0.8:
            self.engine.abort(self.rng.choice(unfinished))
        elif self.requests:
            self.engine.abort(self.rng.choice(self.requests)[0])
        self._take_leases()

    def fork(self) -> None:
        if self.leases:
            lease, tokens, salt = self.rng.choice(self.leases)
            self.leases.append((lease.fork(), tokens, salt))

    def release(self) -> None:
        if self.leases:
            lease, _, _ = self.leases.pop(self.rng.randrange(len(self.leases)))
            if self.rng.random() < 0.5:
                lease.close()  # else the finaliser does

    def pin(self) -> None:
        if self.leases:
            lease, tokens, salt = self.rng.choice(self.leases)
            count = self.rng.randrange(1, lease.num_tokens + 1) if self.rng.random() < 0.5 else None
            try:
                self.pins.append((lease.pin(count), tokens, salt))
            except InvalidInput:  # too small, or without a full block
                self.num_refused += 1

    def unpin(self) -> None:
        if self.pins:
            self.pins.pop()[0].close()

    def fail(self) -> None:
        """The next step stops half way; what it ran has ended."""
        self.engine.runner.fails = not self.failed_last  # several in a row would end the engine

    def clear(self) -> None:
        self.engine.clear_cache()

    def press(self) -> None:
        """Others need blocks of a window, so that known ones are evicted whose tokens are not."""
        for group in self.engine.cache.twins.groups:
            most = group.pool.num_available
            taken = group.take(self.rng.choice((most, self.rng.randint(0, most))), None)
            assert taken is not None
            group.pool.release(taken)

    def finish(self) -> None:
        engine = self.engine
        assert not engine.scheduler.has_work, "it never ends"
        for sequence, prompt, salt in self.requests:
            assert sequence.error is None or isinstance(sequence.error, StepFailed | CannotGoOn), sequence.error
            if sequence.hidden is not None:
                self._finish_embedding(sequence, prompt)
                continue
            constraint = sequence.request.constraint
            wanted = expected_sequence(engine, prompt, sequence.params, sequence.seed, salt, constraint)
            if sequence.finish_reason == "abort":
                assert wanted.token_ids[: sequence.num_tokens] == sequence.token_ids
                continue
            assert sequence.token_ids == wanted.token_ids
            assert sequence.finish_reason == wanted.finish_reason
            assert (
                sequence.text.text.removeprefix("" if not sequence.params.echo else self._text(prompt))
                == wanted.text.text
            )
            if sequence.params.logprobs is not None:
                assert sequence.logprobs == wanted.logprobs
            if sequence.request.wants_prompt_logprobs:
                assert engine.completion(sequence).prompt_logprobs == expected_prompt_logprobs(
                    engine, prompt, sequence, salt
                )
        self._take_leases()
        for lease, _, _ in self.leases:
            lease.close()
        engine.clear_cache()
        engine.scheduler.check()
        for pool in (engine.cache.pool, *(group.pool for group in engine.cache.twins.groups)):
            assert pool.num_free == pool.num_blocks, "blocks were lost"
        assert engine.cache.committed_bytes == 0, "memory was kept"

    def _finish_embedding(self, sequence: Sequence, prompt: list[int]) -> None:
        embedding = sequence.embedding()
        assert sequence.token_ids == prompt
        assert embedding.finish_reason in ("stop", "abort")
        wanted = expected_vector(self.engine, sequence)
        if embedding.finish_reason == "abort":
            wanted = wanted[:0]
        np.testing.assert_array_equal(embedding.vector.view(np.uint32), wanted.view(np.uint32))

    def count(self, happened: Happened) -> None:
        """Add up what this workload saw."""
        stats = self.engine.cache.stats
        happened.num_preemptions += self.engine.scheduler.num_preemptions
        happened.num_cached_tokens += stats.num_cached_tokens
        happened.num_copied_blocks += stats.num_copied_blocks
        happened.num_evicted_blocks += stats.num_evicted_blocks
        happened.num_accepted_tokens += sum(sequence.costs.num_accepted_tokens for sequence, _, _ in self.requests)
        happened.num_aborted += sum(sequence.finish_reason == "abort" for sequence, _, _ in self.requests)
        happened.num_refused += self.num_refused
        happened.num_reclaimed += self.num_reclaimed
        happened.num_failed += self.num_failed
        happened.num_evicted_twins += sum(group.num_evicted for group in self.engine.cache.twins.groups)
        constrained = [sequence for sequence, _, _ in self.requests if sequence.request.constraint is not None]
        happened.num_constrained_tokens += sum(sequence.costs.num_accepted_tokens for sequence in constrained)
        happened.num_grammars_failed += sum(isinstance(sequence.error, CannotGoOn) for sequence in constrained)
        happened.num_grammars_ended += sum(
            sequence.finish_reason == "stop" and sequence.token_ids[-1] not in sequence.request.stop_token_ids
            for sequence in constrained
            if not sequence.params.stop
        )
        all_costs = [sequence.costs for sequence, _, _ in self.requests]
        embeddings = [sequence.costs for sequence, _, _ in self.requests if sequence.hidden is not None]
        happened.num_embeddings += len(embeddings)
        happened.num_cached_tokens_of_embeddings += sum(costs.num_cached_tokens for costs in embeddings)
        happened.num_short_windows += sum(costs.miss_reason is MissReason.WINDOW for costs in all_costs)

    def _text(self, prompt: list[int]) -> str:
        return str(self.engine.model.tokenizer.decode(prompt))


@pytest.mark.parametrize("group", simulation_groups())
def test_every_workload_writes_what_the_model_defines(group: range) -> None:
    for seed in group:
        try:
            Workload(seed).run()
        except BaseException:
            print(f"replay with KVIK_SIMULATION_SEED={seed}")  # noqa: T201
            raise


def test_everything_that_can_go_on_does() -> None:
    """A simulation in which nobody is ever preempted, say, would prove nothing about preemption."""
    happened = Happened()
    for seed in range(300):
        workload = Workload(seed)
        workload.run()
        workload.count(happened)
    rare = {"num_short_windows": 3}  # tests/unit/test_windows.py has more of them
    for name, count in dataclasses.asdict(happened).items():
        assert count >= rare.get(name, 10), happened
