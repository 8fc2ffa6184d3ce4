"""The loop at the centre: schedule, run the model, sample, commit."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias, Unpack
from weakref import ref

import numpy as np

from kvik.cache import BlockEvents, CacheManager, Digest, Hold, Identity, KVCacheSpec, PoolSize
from kvik.cache.sizing import choose_pool_size
from kvik.config import EngineConfig, Pooling, SamplingParams
from kvik.engine.admission import Admission
from kvik.engine.batch import ScheduledBatch
from kvik.engine.events import Observer, StepClock, StepEvent, StepResult
from kvik.engine.interrupts import OwnedLock, is_uninterrupted, uninterrupted
from kvik.engine.lease import Lease
from kvik.engine.output import Completion, TextStream
from kvik.engine.request import HeldOptions, Request
from kvik.engine.runner import ModelRunner, Runner
from kvik.engine.scheduler import Scheduler
from kvik.engine.sequence import Sequence
from kvik.engine.step_computing import StepComputing
from kvik.engine.store_tier import StoreTier, payload_bytes
from kvik.errors import CacheTooSmall, EngineDead, InvalidInput, KvikError, StepFailed
from kvik.models.loader import LoadedModel
from kvik.store import Store

log = logging.getLogger(__name__)

LONG_CHUNK = 32
"""Smallest prefill chunk used to estimate the cost of a prompt token."""

KEPT_SUPERBLOCKS = 2
"""Superblocks an idle engine keeps committed, so the next request does not page-fault."""

MAX_FAILED_STEPS = 3
"""Steps that may fail one after the other before the engine ends."""

IDLE_SAVE_S = 0.005
"""That copying blocks may hold the lock where nothing runs."""

LOAD_WAIT_S = 0.02
"""That a step waits for stored blocks where nothing else is to do."""

MakeRunner: TypeAlias = Callable[[LoadedModel, KVCacheSpec, PoolSize], Runner]
OpenStore: TypeAlias = Callable[[Digest, int], Store]
"""The store of blocks of so many bytes that this digest of model, format and numerics names."""


class Engine:
    """Runs sequences of one model over one pool of blocks.

    Threads may share it: a step, and whatever else changes sequences or blocks, holds `lock`; so does whoever wants to
    read a sequence that another thread may be stepping. `new_request` and `new_sequence` need no lock.

    A step that fails ends its own sequences, whose `error` says why, and the engine goes on; `MAX_FAILED_STEPS` of them
    in a row end the engine (`EngineDead`).
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig | None = None,
        *,
        make_runner: MakeRunner = ModelRunner,
        observers: SequenceOf[Observer] = (),
        identity: Identity = Identity(),  # noqa: B008  # it is frozen
        open_store: OpenStore | None = None,
    ) -> None:
        self.model = model
        self.config = config = config or EngineConfig()
        self.decoder = model.decoder
        self.kv_spec = model.decoder.spec.kv_spec(config.kv_dtype)
        size = choose_pool_size(
            self.kv_spec,
            model.context,
            config.kv_memory,
            token_budget=config.token_budget,
            max_running=config.max_running,
        )
        self.cache = CacheManager(
            self.kv_spec,
            size,
            prefix_cache=config.prefix_cache,
            step_tokens=config.token_budget,
            identity=identity,
        )
        self.runner = make_runner(model, self.kv_spec, size)
        self._computing = StepComputing(self.runner, model.path.name)
        self.scheduler = Scheduler(self.cache, config, partial(Lease, ref(self)))
        self.admission = Admission(model, self.cache, self.scheduler.max_running)
        self.tier = None if open_store is None else self._new_tier(open_store)
        self.scheduler.tier = self.tier
        self._only_loads = False  # the last step had nothing to do but to wait for stored blocks
        self.lock = OwnedLock()
        self.prefill_token_s: float | None = None  # a prompt token's share of a step's time, of the newest long chunk
        self.death: Exception | None = None  # why no step will run any more
        self.observers: tuple[Observer, ...] = ()
        self._forgotten: deque[Hold] = deque()
        self._num_failed_steps = 0  # in a row
        self._is_torn = False  # something is being changed, or was when it was interrupted
        self._is_telling = False  # observers are being called
        for observer in observers:
            self.add_observer(observer)

    # What is asked of it.

    def new_request(
        self, prompt_ids: SequenceOf[int], params: SamplingParams, **options: Unpack[HeldOptions]
    ) -> Request:
        """A request, checked as far as it can be without the lock; its options are those of `HeldOptions`.

        Raises `InvalidInput`, `PromptTooLong`, `CacheTooSmall`.
        """
        return self.admission.new_request(prompt_ids, params, **options)

    def new_embed_request(
        self, prompt_ids: SequenceOf[int], pooling: Pooling, normalize: bool, **options: Unpack[HeldOptions]
    ) -> Request:
        """The same of a prompt that is to become a vector, its finished sequence's `embedding`."""
        return self.admission.new_embed_request(prompt_ids, pooling, normalize, **options)

    def new_sequence(self, request: Request) -> Sequence:
        """What `add` takes: the request's first completion, and the others as its branches."""
        tokenizer, params = self.model.tokenizer, request.params
        before = tokenizer.decode(list(request.prompt_ids)) if params.echo else ""
        branches = [
            Sequence(
                request,
                branch,
                table=self.cache.new_table(request.salt),
                text=TextStream(tokenizer, params.stop, before),
            )
            for branch in range(params.n)
        ]
        branches[0].branches = branches[1:]
        return branches[0]

    def resumed_sequences(self, request: Request, written: SequenceOf[SequenceOf[int]]) -> list[Sequence]:
        """The request's completions, each to go on behind the tokens that another engine sampled for it.

        All of them stand alone, to be added one by one; of those that have begun none can wait for another's prompt.
        Raises `InvalidInput`.
        """
        self.admission.check_written(request, written)
        first = self.new_sequence(request)
        branches = list(first.all_branches())
        first.branches = []
        for branch, token_ids in zip(branches, written, strict=True):
            branch.resume(token_ids)
        return branches

    def check_room(self, request: Request) -> None:
        """Raise `CacheTooSmall` for a request that what is pinned leaves no room for."""
        with self._exclusive():
            self._check_room(request)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence and start its clock. Raises `CacheTooSmall`, `QueueFull`, `EngineDead`."""
        with self._exclusive():
            self._check_alive()
            self._check_room(sequence.request)
            with self._changing():
                self.scheduler.add(sequence)

    def step(self) -> StepResult | None:
        """Advance by one step; `None` when nothing is to do, or not yet. Raises `EngineDead`."""
        self._wait_for_loads()
        with self._exclusive():
            self._check_alive()
            clock = StepClock()
            with self._changing():
                batch = self.scheduler.schedule()
                clock.lap()
                result = None if batch is None else self._advance(batch, clock)
                self._trim()
                self._store_behind(batch, clock)
            self._tell(clock, batch, result)
            return result

    def abort(self, *sequences: Sequence, error: Exception | None = None) -> None:
        """Stop those that are not finished, because of the error where there is one; a finished one stays as it is."""
        with self._exclusive(), self._changing():
            for sequence in sequences:
                self.scheduler.abort(sequence, error)
            self._trim_idle()

    def completion(self, sequence: Sequence) -> Completion:
        """The result of a finished sequence."""
        assert sequence.finish_reason is not None
        request = sequence.request
        return Completion(
            text=sequence.text.text,
            token_ids=sequence.completion_ids,
            finish_reason=sequence.finish_reason,
            stats=sequence.stats(),
            seed=sequence.seed,
            logprobs=None if request.params.logprobs is None else sequence.logprobs,
            prompt_logprobs=[None, *sequence.prompt_logprobs] if request.wants_prompt_logprobs else None,
        )

    def clear_cache(self) -> None:
        """Forget every block that nobody holds, and give the memory of free ones back."""
        with self._exclusive(), self._changing():
            self.cache.clear()
            self._give_back(self.cache.take_idle(max_kept=0))

    # Stored blocks.

    def store_lease(self, lease: Lease) -> list[Digest]:
        """Have the full blocks of a lease written to the store; their names, of which `flush_store` makes sure."""
        assert self.tier is not None
        with self._exclusive():
            return self.tier.keep(lease.hold.table)

    def flush_store(self, seconds: float) -> bool:
        """Wait until all that is to be stored is; False where that takes longer. Nothing to do is soon done."""
        tier, end_s = self.tier, time.monotonic() + seconds
        if tier is None:
            return True
        while tier.has_pending and time.monotonic() < end_s:
            with self._exclusive():
                tier.save(math.inf)
            tier.flush(end_s - time.monotonic())
        return tier.flush(max(0.0, end_s - time.monotonic()))

    def close_store(self, seconds: float = 10.0) -> None:
        """Write what is to be stored, waiting so many seconds for that, and use the store no more."""
        tier = self.tier
        if tier is not None:
            if not self.flush_store(seconds):
                log.warning("the store did not take every block within %g s: the rest is not stored", seconds)
            with self._exclusive(), self._changing():
                tier.close()
                self.tier = self.scheduler.tier = None

    def _wait_for_loads(self) -> None:
        """Where the last step had nothing else to do; without the lock."""
        tier = self.tier
        if tier is not None and self._only_loads:
            tier.wait(LOAD_WAIT_S)

    def _store_behind(self, batch: ScheduledBatch | None, clock: StepClock) -> None:
        """Copy some of what is to be stored, or have it copied while nothing runs."""
        if self.tier is not None:
            self._only_loads = batch is None and self.tier.is_loading
            self.tier.after_step(clock.so_far_s(), None if self.scheduler.has_work else self._save_when_idle)

    def _new_tier(self, open_store: OpenStore) -> StoreTier:
        store = open_store(self.cache.scope, sum(payload_bytes(self.cache, self.runner).values()))
        return StoreTier(store, self.cache, self.runner, self.config.store_policy)

    def _save_when_idle(self) -> bool:
        """In the writer's thread: copy what the last step left to be stored; whether there is more."""
        with self._exclusive():
            # A step does so itself, within its bounds.
            if self.tier is None or self.scheduler.has_work:
                return False
            self.tier.save(IDLE_SAVE_S)
            return self.tier.has_pending

    # Leases.

    def fork_lease(self, lease: Lease) -> Lease:
        """Another lease of the same blocks."""
        with self._exclusive(), self._changing():
            return Lease(ref(self), self.cache.keep(lease.hold.table, lease.hold.tokens))

    def pin_lease(self, lease: Lease, num_tokens: int | None = None) -> Lease:
        """Another lease, of the full blocks, which nobody's need takes away. Raises `CacheTooSmall`.

        With `num_tokens` it is one of the first so many tokens, the block that they end in included; in a model whose
        layers have windows, of the full blocks among them. It is refused where a request that waits or runs could no
        longer be served.
        """
        needs_full = num_tokens is None or bool(self.cache.twins.groups)
        if needs_full and (
            not lease.hold.table.num_sealed or (num_tokens is not None and num_tokens < self.kv_spec.block_size)
        ):
            raise InvalidInput(
                "there is no full block to pin",
                hint="pin more than 32 tokens" if self.cache.prefix_cache else "pins need the prefix cache",
            )
        with self._exclusive(), self._changing():
            if num_tokens is not None and not 1 <= num_tokens <= lease.num_tokens:
                raise InvalidInput(
                    f"num_tokens is {num_tokens:,}, the lease has {lease.num_tokens:,}", hint="pin fewer tokens"
                )
            pin = self.cache.keep(lease.hold.table, lease.hold.tokens, is_pinned=True, num_pinned_tokens=num_tokens)
            for other in (*self.scheduler.waiting, *self.scheduler.running):
                try:
                    self._check_room(other.request, other)
                except CacheTooSmall as error:
                    self.cache.let_go(pin)
                    raise CacheTooSmall(
                        f"with {len(pin.table.block_ids):,} blocks pinned, a request under way no longer fits:"
                        f" {error.message}",
                        hint="pin when it is done, or give the cache more memory",
                    ) from None
            return Lease(ref(self), pin)

    def close_lease(self, lease: Lease) -> None:
        """Give the blocks of a lease back."""
        with self._exclusive(), self._changing():
            self.cache.let_go(lease.hold)
            self._trim_idle()

    def forget_lease(self, hold: Hold) -> None:
        """The same for finalisers: now, or after the step that is going on."""
        self._forgotten.append(hold)
        # Not where this very thread is in the middle of something that it must finish first.
        if not is_uninterrupted() and self.lock.try_to_take():
            with self._exclusive():
                pass

    # Watching.

    def add_observer(self, observer: Observer) -> None:
        """Call `observer` after each step from now on, with the lock held: it must not call the engine."""
        with self._exclusive():
            self.observers = (*self.observers, observer)
            self.cache.events = self.cache.events or BlockEvents()

    def remove_observer(self, observer: Observer) -> None:
        """Call it no more."""
        with self._exclusive():
            self.observers = tuple(other for other in self.observers if other is not observer)
            if not self.observers:
                self.cache.events = None

    # The parts of a step.

    def _advance(self, batch: ScheduledBatch, clock: StepClock) -> StepResult:
        """Run the model, sample, commit; a step that fails ends its own sequences."""
        try:
            output = self._computing.run(batch)
            clock.lap()
            self._note_prefill(batch, clock.last_s)
            if len(output.hidden):
                self._computing.pool(batch, output.hidden)
            result = self._computing.sample(batch, output.logits)
            clock.lap()
        except Exception as error:  # noqa: BLE001  # whatever it was, the sequences of this step get it
            return self._fail(batch, error)
        weight_bytes = self.runner.step_bytes(len(batch.arrays.token_ids), len(output.logits))
        self.scheduler.commit(batch, weight_bytes=weight_bytes)
        self._num_failed_steps = 0
        return result

    def _note_prefill(self, batch: ScheduledBatch, run_s: float) -> None:
        if any(item.num_tokens >= LONG_CHUNK for item in batch.items):
            self.prefill_token_s = run_s / len(batch.arrays.token_ids)
            if self.tier is not None:
                self.tier.note_prefill(self.prefill_token_s)

    def _fail(self, batch: ScheduledBatch, error: Exception) -> StepResult:
        """End the step's sequences; after several such steps, the engine."""
        names = ", ".join(dict.fromkeys(item.sequence.request.request_id for item in batch.items))
        log.error("a step failed, and with it %s", names, exc_info=error)
        self.scheduler.fail(batch, lambda: _failure(f"the step that computed it failed: {error!r}", error))
        self._count_failure(error)
        return StepResult([], [], np.empty((0, self.decoder.spec.vocab_size), np.float32), error)

    def _count_failure(self, error: Exception) -> None:
        self._num_failed_steps += 1
        if self._num_failed_steps < MAX_FAILED_STEPS or self.death is not None:
            return
        self.death = error
        log.critical("the engine ends: %d steps failed, one after the other", self._num_failed_steps)
        for sequence in list(self.scheduler.unfinished):
            self.scheduler.abort(sequence, self._dead())

    def _tell(self, clock: StepClock, batch: ScheduledBatch | None, result: StepResult | None) -> None:
        """Call all observers; then an error of theirs is the caller's, and tears nothing."""
        begun, ended, preempted = self.scheduler.take_news()
        if not self.observers or (batch is None and not begun and not ended and not preempted):
            return
        clock.lap()
        schedule_s, run_s, sample_s, commit_s = clock.parts_s()
        blocks, self.cache.events = self.cache.events or BlockEvents(), BlockEvents()
        event = StepEvent(
            started_s=clock.times_s[0],
            schedule_s=schedule_s,
            run_s=run_s,
            sample_s=sample_s,
            commit_s=commit_s,
            batch=batch,
            result=result,
            begun=begun,
            ended=ended,
            preempted=preempted,
            blocks=blocks,
        )
        errors: list[Exception] = []
        self._is_telling = True
        try:
            for observer in self.observers:
                try:
                    observer(event)
                except Exception as error:  # noqa: BLE001  # raised when the others know too
                    errors.append(error)
        finally:
            self._is_telling = False
        if errors:
            raise errors[0]

    # Accounts that an interruption does not tear.

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Have the lock, with nothing torn; Ctrl-C waits for the end. Releases deferred by finalizers are run."""
        if self._is_telling and self.lock.is_owned:
            raise RuntimeError("an observer must not call the engine that it watches")
        with self.lock.take(), uninterrupted():
            if self._is_torn:
                self._recover(None)
            self._let_go_forgotten()
            yield
            self._let_go_forgotten()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change the accounts, all of it or nothing that anybody trusts.

        What ends this half way, an error that refuses it aside, leaves accounts that are torn: then everything is
        forgotten, here or, if that is interrupted too, by whoever comes next.
        """
        self._is_torn = True
        try:
            yield
        except KvikError:  # raised by a check, before anything was changed
            self._is_torn = False
            raise
        except BaseException as error:
            self._recover(error)
            raise
        self._is_torn = False

    def _let_go_forgotten(self) -> None:
        if self._forgotten:
            with self._changing():
                while self._forgotten:
                    self.cache.let_go(self._forgotten.popleft())

    def _recover(self, cause: BaseException | None) -> None:
        """Forget all sequences and blocks: what is left is an engine as it was made."""
        log.error("a step was interrupted half way; all requests end, and the cache is empty", exc_info=cause)
        self.scheduler.reset(lambda: _failure("the engine was interrupted in the middle of a step", cause))
        self.cache.reset()
        self._give_back(self.cache.all_superblocks())
        self._is_torn = False
        if isinstance(cause, Exception):  # accounts that break are a fault of kvik's, and will break again
            self._count_failure(cause)

    def _trim(self) -> None:
        """Return the memory of superblocks that stay unused, nearly all of it once nothing runs."""
        self._give_back(self.cache.take_idle(None if self.scheduler.has_work else KEPT_SUPERBLOCKS))

    def _trim_idle(self) -> None:
        """The same where no step may follow that would do it."""
        if not self.scheduler.has_work:
            self._trim()

    def _give_back(self, superblocks_by_group: list[list[int]]) -> None:
        for group, superblocks in enumerate(superblocks_by_group):
            if superblocks:
                self.runner.discard_blocks(superblocks, group)

    # What is refused.

    def _check_room(self, request: Request, sequence: Sequence | None = None) -> None:
        token_ids = request.prompt_ids if sequence is None else sequence.token_ids
        self.admission.check_room(request, self.scheduler.match(request, token_ids))

    def _check_alive(self) -> None:
        if self.death is not None:
            raise self._dead()

    def _dead(self) -> EngineDead:
        error = EngineDead(
            f"{self._num_failed_steps} steps failed, one after the other: {self.death!r}", hint="load the model again"
        )
        error.__cause__ = self.death
        return error


def _failure(message: str, cause: BaseException | None) -> StepFailed:
    """An error for one request. The traceback is in the log: kept here, it would keep the step's logits too."""
    error = StepFailed(message, hint="send the request again; nothing else is lost")
    error.__cause__ = None if cause is None else cause.with_traceback(None)
    return error
