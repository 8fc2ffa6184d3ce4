"""The loop at the centre: schedule, run the model, sample, record."""

from __future__ import annotations

import math
import os
import reprlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvik.cache import BLOCKS_PER_SUPERBLOCK, BlockTable, CacheManager, KVCacheSpec, PoolSize
from kvik.config import TOKEN_BUDGET, KVDType, SamplingParams
from kvik.engine.batch import ScheduledBatch
from kvik.engine.drafts import NgramDrafts
from kvik.engine.output import Completion, TextStream
from kvik.engine.sampler import Sampled, SampleRow, make_sampler, sample_rows
from kvik.engine.scheduler import Scheduler
from kvik.engine.sequence import Sequence
from kvik.errors import CacheTooSmall, InvalidInput, ModelError, NotEnoughMemory, PromptTooLong
from kvik.machine import available_memory_bytes
from kvik.models.loader import LoadedModel

AUTO_CONTEXTS = 16
"""Whole contexts that a cache of automatic size holds, memory permitting."""

LONG_CHUNK = 32
"""Tokens of one prompt from which on a step tells what a prompt token costs."""

KEPT_SUPERBLOCKS = 2
"""Unused ones whose memory an idle engine keeps, so that the next request need not have it made anew."""

MOST_SALT_BYTES = 256
MOST_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step brought: a sequence for each token that was chosen, and the logits it was chosen from."""

    sequences: list[Sequence]
    logits: npt.NDArray[np.float32]  # (tokens, vocab_size)


class Engine:
    """Runs sequences of one model over one pool of blocks.

    Threads may share it: a step, and whatever else changes sequences or blocks, holds `lock`; so does whoever wants to
    read a sequence that another thread may be stepping.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        kv_dtype: KVDType = "f16",
        token_budget: int = TOKEN_BUDGET,
        kv_memory: int | str = "auto",
        prefix_cache: bool = True,
        max_running: int = 64,
        max_waiting: int = 1024,
    ) -> None:
        self.model = model
        self.decoder = model.decoder
        self.kv_spec = model.decoder.spec.kv_spec(kv_dtype)
        size = choose_pool_size(
            self.kv_spec, model.context, kv_memory, token_budget=token_budget, max_running=max_running
        )
        self.cache = CacheManager(
            self.kv_spec,
            size.num_blocks,
            window_blocks=size.window_blocks,
            prefix_cache=prefix_cache,
            step_tokens=token_budget,
        )
        self.kv_arrays = model.decoder.ops.allocate_kv(self.kv_spec, size.num_blocks, size.window_blocks)
        self.forward = model.decoder.record(self.kv_arrays)
        self.sampler = make_sampler(model.decoder.ops)
        self.scheduler = Scheduler(
            self.cache, token_budget=token_budget, max_running=max_running, max_waiting=max_waiting
        )
        self.lock = threading.RLock()
        self._depth = 0  # of calls that change something, by the thread that holds the lock
        self._forgotten: deque[tuple[Sequence | None, BlockTable | None]] = deque()
        self.prefill_token_s: float | None = None  # a prompt token's share of a step's time, of the newest long chunk
        weights = model.decoder.weights
        self._step_bytes = {wanted: weights.step_bytes(with_logits=wanted) for wanted in (False, True)}

    def new_sequence(
        self,
        token_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        keep_cache: bool = True,
        park: bool = False,
        previous: Sequence | None = None,
        priority: int = 0,
        salt: str | None = None,
    ) -> Sequence:
        """A checked request, to be given to `add`.

        `park` keeps its blocks after its end, for a turn that follows. `previous` is such a turn, aborted here if it
        still runs: the tokens that both begin with are not computed again. A higher `priority` is served earlier. With
        a `salt` nothing is shared with requests of another salt, or of none. Raises `InvalidInput`, `PromptTooLong`,
        `CacheTooSmall`.
        """
        if not isinstance(params, SamplingParams):
            raise InvalidInput(f"params is {reprlib.repr(params)}", hint="give SamplingParams(...)")
        self._check_prompt(token_ids)
        _check_route(priority, salt)
        stop_token_ids = self._stop_token_ids(params)
        seed = int.from_bytes(os.urandom(8)) if params.seed is None else params.seed
        prompt_text = self.model.tokenizer.decode(list(token_ids)) if params.echo else ""
        branches = [
            Sequence(
                token_ids=list(token_ids),
                num_prompt_tokens=len(token_ids),
                params=params,
                seed=(seed + index) % 2**64,
                stop_token_ids=stop_token_ids,
                text=TextStream(self.model.tokenizer, params.stop, prompt_text),
                table=self.cache.new_table(salt),
                most_tokens=min(len(token_ids) + params.max_tokens, self.model.context),
                priority=priority,
                keep_cache=keep_cache,
                park=park,
                drafts=NgramDrafts() if params.speculate == "ngram" and keep_cache else None,
            )
            for index in range(params.n)
        ]
        sequence = branches[0]
        sequence.branches = branches[1:]
        with self._exclusive():
            self._check_room(sequence)
            if previous is not None:
                self.scheduler.abort(previous)
                sequence.previous = previous
        return sequence

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence and start its clock. Raises `QueueFull`."""
        with self._exclusive():
            for branch in sequence.all_branches():
                branch.started_s = time.perf_counter()
            self.scheduler.add(sequence)

    def step(self) -> StepResult | None:
        """Advance by one step; `None` when nothing is to do."""
        with self._exclusive():
            batch = self.scheduler.schedule()
            if batch is None:
                self._trim()
                return None
            logits = self._run(batch)
            result = self._sample(batch, logits)
            self.scheduler.record(batch, weight_bytes=self._step_bytes[len(logits) > 0])
            self._trim()
            return result

    def abort(self, sequence: Sequence) -> None:
        """Stop a sequence that is not finished; a finished one stays as it is."""
        with self._exclusive():
            self.scheduler.abort(sequence)
            self._trim_idle()

    def release(self, sequence: Sequence) -> None:
        """Give back the blocks of a parked sequence."""
        with self._exclusive():
            self.scheduler.release(sequence)
            self._trim_idle()

    def forget(self, sequence: Sequence | None, pin: BlockTable | None) -> None:
        """Abort and release a sequence and its pin, now or after the step that is going on.

        For finalisers: Python may run one anywhere, in the middle of a step too.
        """
        self._forgotten.append((sequence, pin))
        if self._depth == 0 and self.lock.acquire(blocking=False):
            try:
                with self._exclusive():
                    pass
            finally:
                self.lock.release()

    def fork(self, sequence: Sequence) -> Sequence:
        """A finished sequence once more, parked beside the first if that one is: it costs no block until it goes on."""
        with self._exclusive():
            assert sequence.finish_reason is not None
            copy = replace(
                sequence, token_ids=list(sequence.token_ids), table=self.cache.new_table(sequence.table.namespace.salt)
            )
            copy.num_computed_tokens = 0
            self.scheduler.fork(sequence, copy)
            return copy

    def pin(self, sequence: Sequence) -> BlockTable:
        """Keep the full blocks of a parked sequence until `unpin`. Raises `CacheTooSmall`.

        It is refused where a request that waits or runs could no longer be served.
        """
        with self._exclusive():
            pin = self.cache.pin(sequence.table)
            for other in (*self.scheduler.waiting, *self.scheduler.running):
                try:
                    self._check_room(other)
                except CacheTooSmall as error:
                    self.cache.unpin(pin)
                    raise CacheTooSmall(
                        f"with {len(pin.block_ids):,} blocks pinned, a request under way no longer fits:"
                        f" {error.message}",
                        hint="pin when it is done, or give the cache more memory",
                    ) from None
            return pin

    def unpin(self, pin: BlockTable) -> None:
        """Let go what `pin` kept."""
        with self._exclusive():
            self.cache.unpin(pin)

    def clear_cache(self) -> None:
        """Forget every block that nobody holds, and give the memory of free ones back."""
        with self._exclusive():
            self.cache.clear()
            self._give_back(self.cache.take_idle(most_kept=0))

    def completion(self, sequence: Sequence) -> Completion:
        """The result of a finished sequence."""
        assert sequence.finish_reason is not None
        wants_logprobs = sequence.params.logprobs is not None
        return Completion(
            text=sequence.text.text,
            token_ids=sequence.completion_ids,
            finish_reason=sequence.finish_reason,
            stats=sequence.stats(),
            seed=sequence.seed,
            logprobs=sequence.logprobs if wants_logprobs else None,
            prompt_logprobs=[None, *sequence.prompt_logprobs] if sequence.wants_prompt_logprobs else None,
        )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the lock to change something; what finalisers wanted meanwhile is done at the end."""
        with self.lock:
            self._depth += 1
            try:
                yield
                while self._depth == 1 and self._forgotten:
                    sequence, pin = self._forgotten.popleft()
                    if pin is not None:
                        self.cache.unpin(pin)
                    if sequence is not None:
                        self.scheduler.abort(sequence)
                        self.scheduler.release(sequence)
            finally:
                self._depth -= 1

    # The four statements of a step.

    def _run(self, batch: ScheduledBatch) -> npt.NDArray[np.float32]:
        try:
            for group, copies in batch.copies.items():
                self.decoder.ops.copy_blocks(self.kv_arrays, copies, group)
            started_s = time.perf_counter()
            logits = self.decoder.ops.to_numpy(self.forward(batch.arrays))
            if any(item.num_tokens >= LONG_CHUNK for item in batch.items):
                self.prefill_token_s = (time.perf_counter() - started_s) / len(batch.arrays.token_ids)
            return logits
        except BaseException as error:
            # Blocks may be half written: nobody may go on from them. The caller learns of it, and so do those who wait.
            self.cache.end_copies()
            for item in batch.items:
                cause = error if isinstance(error, Exception) else RuntimeError(f"the step was interrupted: {error!r}")
                item.sequence.park = False
                self.scheduler.abort(item.sequence, cause)
            raise

    def _sample(self, batch: ScheduledBatch, logits: npt.NDArray[np.float32]) -> StepResult:
        """Choose tokens, all in one call; a draft's successor counts only where the draft was chosen itself."""
        to_sample: list[SampleRow] = []
        first = 0
        for item in batch.items:
            first += item.num_logits
            if item.closes_gap:
                to_sample += sample_rows(item.sequence, first - 1 - len(item.sequence.draft_ids))
        chosen: list[Sequence] = []
        rows: list[int] = []
        try:
            sampled = iter(self.sampler.sample(logits, to_sample))
        except Exception as error:  # noqa: BLE001  # whatever it was, only requests of this step can be its reason
            for item in batch.items:
                for branch in item.sequence.all_branches():
                    branch.finish("abort", error)
            return StepResult(chosen, logits[:0])
        first = 0
        for item in batch.items:
            sequence, end = item.sequence, first + item.num_logits
            at = end - 1 - len(sequence.draft_ids)
            own = [next(sampled) for _ in range(len(sequence.branches) + end - at)] if item.closes_gap else []
            try:
                if sequence.wants_prompt_logprobs and item.num_logits:
                    self._note_prompt(sequence, logits[first:end])
                if own:
                    for branch, result in zip(sequence.branches, own, strict=False):
                        branch.prompt_logprobs = sequence.prompt_logprobs
                        self._accept(branch, result)
                        chosen.append(branch)
                        rows.append(at)
                    for draft_id, result in zip(
                        (*sequence.draft_ids, None), own[len(sequence.branches) :], strict=True
                    ):
                        self._accept(sequence, result)
                        chosen.append(sequence)
                        rows.append(at)
                        if result.token_id != draft_id or sequence.finish_reason is not None:
                            break
                        at += 1
            except Exception as error:  # noqa: BLE001  # whatever it was, it is this request's alone
                for branch in sequence.all_branches():
                    branch.finish("abort", error)
            first = end
        whole = len(rows) == len(logits) and rows == list(range(len(rows)))
        return StepResult(chosen, logits if whole else logits[rows])

    def _accept(self, sequence: Sequence, sampled: Sampled) -> None:
        if sampled.token_id < 0:
            raise self._no_numbers(sequence)
        if sampled.logprobs is not None:
            sequence.logprobs.append(sampled.logprobs)
        sequence.accept(sampled.token_id)

    def _note_prompt(self, sequence: Sequence, rows: npt.NDArray[np.float32]) -> None:
        """Logprobs of the prompt's tokens that follow the rows; some are known if the prompt begins again."""
        start = sequence.num_computed_tokens
        skipped = max(0, len(sequence.prompt_logprobs) - start)
        next_ids = sequence.token_ids[start + skipped + 1 : sequence.num_prompt_tokens][: max(0, len(rows) - skipped)]
        num_top = sequence.params.logprobs
        assert num_top is not None
        if next_ids:
            found = self.sampler.prompt_logprobs(rows[skipped : skipped + len(next_ids)], next_ids, num_top)
            if any(math.isnan(each.logprob) for each in found):
                raise self._no_numbers(sequence)
            sequence.prompt_logprobs += found

    def _trim(self) -> None:
        """Memory that stays unused goes back to the system; little is kept once nothing runs."""
        self._give_back(self.cache.take_idle(None if self.scheduler.has_work else KEPT_SUPERBLOCKS))

    def _trim_idle(self) -> None:
        """The same where no step may follow that would do it."""
        if not self.scheduler.has_work:
            self._trim()

    def _give_back(self, superblocks_by_group: list[list[int]]) -> None:
        for group, superblocks in enumerate(superblocks_by_group):
            if superblocks and (group or self.kv_spec.block_bytes):
                self.decoder.ops.discard_blocks(self.kv_arrays, superblocks, group)

    # What is refused.

    def _check_prompt(self, token_ids: SequenceOf[int]) -> None:
        if not token_ids:
            raise InvalidInput("the prompt is empty", hint="give at least one token of text")
        self._check_token_ids("the prompt's token id", token_ids)
        if len(token_ids) >= self.model.context:
            raise PromptTooLong(
                f"the prompt has {len(token_ids):,} tokens, the context holds {self.model.context:,} with the answer",
                hint=self._context_hint(),
            )

    def _check_room(self, sequence: Sequence) -> None:
        """Refuse what could never fit, whatever the others give back. The last token of all needs no place."""
        spec = self.kv_spec
        needed = spec.num_blocks_for(sequence.most_tokens - 1)
        has = self.cache.num_blocks_within_reach(self.scheduler.match(sequence))
        if needed <= has:
            return
        room = has * spec.block_size + 1 - sequence.num_prompt_tokens
        advice = f"lower max_tokens to {room:,} or less, or " if room > 0 else ""
        wanted = spec.pool_bytes(
            spec.pool_size(
                spec.pool_blocks_for(sequence.most_tokens),
                context=self.model.context,
                step_tokens=self.cache.step_tokens,
                max_running=self.scheduler.max_running,
            )
        )
        raise CacheTooSmall(
            f"prompt and answer need {needed:,} blocks ({sequence.most_tokens:,} tokens), the cache has {has:,}"
            + (f" besides {self.cache.num_pinned:,} pinned ones" if self.cache.num_pinned else ""),
            hint=f"{advice}raise kv_memory (`--kv-memory`) to {-(-wanted // 2**20):,} MiB or more",
        )

    def _context_hint(self) -> str:
        limit = self.decoder.spec.context_length
        return (
            f"shorten the prompt, or raise the context, up to {limit}" if self.model.context < limit else "shorten it"
        )

    def _no_numbers(self, sequence: Sequence) -> ModelError:
        return ModelError(
            f"{self.model.path.name}: the logits after {sequence.num_tokens:,} tokens are no finite numbers",
            hint="the file's weights are damaged; download it again",
        )

    def _check_token_ids(self, what: str, token_ids: Iterable[int]) -> None:
        vocab_size = self.decoder.spec.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidInput(
                    f"{what} {token_id} is not in the vocabulary", hint=f"ids go from 0 to {vocab_size - 1}"
                )

    def _stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        self._check_token_ids("stop_token_ids:", params.stop_token_ids)
        self._check_token_ids("logit_bias: token id", (token_id for token_id, _ in params.biases))
        ends = frozenset() if params.ignore_eos else self.model.tokenizer.eos_token_ids
        stop_token_ids = ends.union(params.stop_token_ids)
        if params.min_tokens and len(stop_token_ids) == self.decoder.spec.vocab_size:
            raise InvalidInput(
                f"min_tokens is {params.min_tokens}, but every token is one that ends the text",
                hint="set min_tokens to 0, or leave some tokens out of stop_token_ids",
            )
        return stop_token_ids


def choose_pool_size(
    spec: KVCacheSpec, context: int, kv_memory: int | str, *, token_budget: int, max_running: int
) -> PoolSize:
    """The size of a cache of `kv_memory` bytes, or of "auto": some whole contexts, in half of the memory that is free.

    Raises `NotEnoughMemory` where one context does not fit ("auto") or the machine has less than was asked for.
    """
    load = {"context": context, "step_tokens": token_budget, "max_running": max_running}
    available = available_memory_bytes()
    one_context = spec.pool_blocks_for(context)
    least = spec.pool_bytes(spec.pool_size(BLOCKS_PER_SUPERBLOCK, **load))
    least_mib = -(-least // 2**20)
    if isinstance(kv_memory, int):
        size = spec.pool_size_within(kv_memory, **load)
        if size.num_blocks == 0:
            raise InvalidInput(
                f"kv_memory is {kv_memory:,} bytes, less than the least of {least:,}",
                hint=f"set it to {least_mib:,} MiB or more",
            )
    else:
        most = spec.pool_size_within(available // 2, **load).num_blocks
        size = spec.pool_size(max(one_context, min(AUTO_CONTEXTS * one_context, most)), **load)
    num_bytes = spec.pool_bytes(size)
    if num_bytes > available:
        fits = max(available * 3 // 4, least)
        fits_mib = max(fits // 2**20, least_mib)
        advice = []
        if kv_memory == "auto" and fits <= available:
            context = spec.pool_size_within(fits, **load).num_blocks * spec.block_size
            advice.append(f"the context to {context} or less (`--context`)")
        if fits_mib * 2**20 <= available:
            advice.append(f"kv_memory to {fits_mib:,} MiB or less")
        raise NotEnoughMemory(
            f"a cache of {size.num_blocks:,} blocks takes {num_bytes / 2**30:,.1f} GiB,"
            f" the machine has {available / 2**30:,.1f} GiB available",
            hint=f"set {', or '.join(advice)}" if advice else f"free some: the least cache takes {least_mib:,} MiB",
        )
    return size


def _check_route(priority: int, salt: str | None) -> None:
    if type(priority) is not int or abs(priority) > MOST_PRIORITY:
        raise InvalidInput(
            f"priority is {reprlib.repr(priority)}",
            hint=f"give a whole number from {-MOST_PRIORITY} to {MOST_PRIORITY}; more is earlier",
        )
    if salt is None:
        return
    if not isinstance(salt, str) or not salt.isprintable() or not 1 <= len(salt.encode()) <= MOST_SALT_BYTES:
        raise InvalidInput(
            f"the salt is {reprlib.repr(salt)}", hint=f"give 1 to {MOST_SALT_BYTES} bytes of printable text"
        )
