"""Who computes how many tokens in the next step, and what a step leaves behind."""

from __future__ import annotations

import logging
import math
import time
from bisect import insort
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from itertools import chain

from kvik.cache import CacheManager, Hold, Match, MissReason, packed
from kvik.config import EngineConfig
from kvik.engine.batch import Scheduled, ScheduledBatch, build_batch
from kvik.engine.lease import Lease
from kvik.engine.request import Request
from kvik.engine.sequence import Sequence
from kvik.engine.store_tier import PUBLISH_S, StoreTier
from kvik.errors import CacheTooSmall, QueueFull

log = logging.getLogger(__name__)

PRIORITY_STEPS = 1000
"""Steps by which one level of priority comes earlier: low priorities wait longer, but not for ever."""

LOGIT_ROWS = 64
"""Most rows of logits that prompts may ask for in a step: a row is as long as the vocabulary."""


class _Step:
    """A step while it is put together."""

    def __init__(self, token_budget: int) -> None:
        self.budget = token_budget  # tokens that may still be computed
        self.num_rows_left = LOGIT_ROWS
        self.items: dict[Sequence, Scheduled] = {}
        self.gone: set[Sequence] = set()  # preempted or refused while it was put together


class Scheduler:
    """Chooses what each step computes: every running sequence something, as far as tokens and blocks go.

    waiting   queued, no blocks; in order of arrival, a level of priority being worth `PRIORITY_STEPS` steps
    loading   waiting, and its next blocks are being read from the store; others overtake it meanwhile
    running   some of its tokens computed, blocks for those

    When blocks are short, leases that are not pinned lose theirs first, then the running sequences that come last in
    the order; those wait again in their old place, and find most of what they had computed in the prefix tree. The
    first in the order always gets on, and every sequence was checked to fit when it came: so all of them end.
    """

    def __init__(self, cache: CacheManager, config: EngineConfig, make_lease: Callable[[Hold], Lease]) -> None:
        self.cache = cache
        self.token_budget = config.token_budget
        self.mixed_budget = config.mixed_budget
        self.max_running = min(config.max_running, config.token_budget)
        self.max_waiting = config.max_waiting
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.unfinished: dict[Sequence, None] = {}  # all that were added and have not ended
        self._begun: dict[Sequence, None] = {}  # since `take_news`
        self._ended: dict[Sequence, None] = {}
        self._preempted: dict[Sequence, None] = {}
        self.num_preemptions = 0
        self.tier: StoreTier | None = None  # where blocks are stored
        self._make_lease = make_lease
        self.num_steps = 0
        self._num_added = 0

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do."""
        return bool(self.waiting or self.running)

    @property
    def is_full(self) -> bool:
        """Whether no more sequences may be queued now."""
        return len(self.waiting) >= self.max_waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, unless it was aborted before it came. Raises `QueueFull`."""
        if sequence.finish_reason is not None:
            return
        if self.is_full:
            raise QueueFull(
                f"{len(self.waiting):,} requests wait, the engine takes {self.max_waiting:,}",
                hint="try again when some are done, or raise max_waiting",
            )
        for each in sequence.all_branches():
            self._num_added += 1
            each.place = (self.num_steps - PRIORITY_STEPS * each.request.priority, self._num_added)
            each.is_queued = True
            if each.costs.submitted_s is None:
                each.costs.submitted_s = time.perf_counter()
            self.unfinished[each] = None
        self._queue(sequence)

    def take_news(self) -> tuple[list[Sequence], list[Sequence], list[Sequence]]:
        """The sequences that have begun, those that have ended and those that were preempted since the last time."""
        news = list(self._begun), list(self._ended), list(self._preempted)
        for each in (self._begun, self._ended, self._preempted):
            each.clear()
        return news

    def schedule(self) -> ScheduledBatch | None:
        """Choose how many tokens each sequence computes in this step; `None` when nothing is to do.

        Short gaps first, for somebody waits for each token; then the prompts, in order, share what is left. Others do
        not wait for a mask that is late.
        """
        if self.tier is not None:
            self.tier.publish(PUBLISH_S if self.running else math.inf)
        while self.has_work:  # a round may do no more than refuse somebody, or make room for the others
            self.num_steps += 1
            step = _Step(self.token_budget)
            in_order = sorted(self.running, key=lambda each: (each.num_missing_tokens > 1, each.place))
            num_short = sum(sequence.num_missing_tokens == 1 for sequence in in_order)
            late = [each for each in in_order if each.matcher is not None and each.matcher.is_pending]
            for at, sequence in enumerate(in_order):
                if at == num_short:
                    self._begin_prompts(step)
                if step.budget > 0 and sequence not in step.gone and sequence not in late:
                    self._schedule_one(sequence, step)
            if num_short == len(in_order):
                self._begin_prompts(step)
            self._admit(step)
            if not step.items:  # there is nobody else, so that they are waited for
                for sequence in late:
                    if sequence not in step.gone:
                        self._schedule_one(sequence, step)
            if step.items:
                return build_batch(list(step.items.values()), len(self.cache.spec.groups))
            if self.tier is not None and self.tier.is_loading:
                return None
        return None

    def commit(self, batch: ScheduledBatch, *, weight_bytes: int) -> None:
        """Note what the step computed, after sampling: progress, sealed blocks, ends, branches that begin."""
        self.cache.end_copies()
        for item in batch.items:
            sequence = item.sequence
            costs = sequence.costs
            num_drafted, num_rejected = len(sequence.draft_ids), 0
            if num_drafted:
                # The last token that was accepted has no key and value yet, though its draft may have.
                num_kept = max(0, sequence.num_missing_tokens - item.num_tokens - 1)
                num_rejected = num_drafted - num_kept
                costs.num_drafted_tokens += num_drafted
                costs.num_accepted_tokens += num_kept
                assert sequence.drafts is not None
                sequence.drafts.note(num_drafted, num_kept)
                sequence.draft_ids = []
            sequence.num_computed_tokens += item.num_tokens + num_drafted - num_rejected
            costs.num_computed_tokens += item.num_tokens + num_drafted
            costs.weight_bytes += weight_bytes
            costs.kv_bytes = self.cache.held_bytes(sequence.table)
            if num_rejected:
                self.cache.release(sequence.table, sequence.num_computed_tokens)
            if sequence.request.use_cache and sequence.request.share:
                num_sealed = sequence.table.num_sealed
                self.cache.seal(sequence.table, sequence.token_ids, sequence.num_computed_tokens)
                if self.tier is not None:
                    self.tier.note_sealed(sequence.table, num_sealed)
            self.cache.slide(sequence.table, sequence.num_computed_tokens)
            if sequence.branches and item.closes_gap:
                self._begin_branches(sequence)
            if item.closes_gap and not sequence.request.use_cache:
                self._drop_blocks(sequence)
            if sequence.finish_reason is not None:
                self._leave(sequence)
                for branch in sequence.branches:  # it ended before they could begin
                    branch.finish("abort", sequence.error)
                    self._leave(branch)
                sequence.branches = []

    def fail(self, batch: ScheduledBatch, make_error: Callable[[], Exception]) -> None:
        """End the sequences of a step that failed. Their blocks may be half written: nobody goes on from them."""
        self.cache.end_copies()
        for item in batch.items:
            self._drop_blocks(item.sequence)
            for each in item.sequence.all_branches():
                each.finish("abort", make_error())  # one that ended in this very step keeps its reason
                self._leave(each)
            item.sequence.branches = []

    def abort(self, sequence: Sequence, error: Exception | None = None) -> None:
        """End a sequence that is not finished, and the branches of it that have not begun."""
        for each in sequence.all_branches():
            if each.finish_reason is None:
                each.finish("abort", error)
                self._leave(each)
        sequence.branches = []

    def reset(self, make_error: Callable[[], Exception]) -> None:
        """End everything after an interruption that may have left the accounts torn; the cache is reset beside it."""
        for sequence in list(chain(self.unfinished, self.waiting, self.running)):
            for each in sequence.all_branches():
                each.finish("abort", make_error())
                each.num_computed_tokens, each.draft_ids = 0, []
                self._ended[each] = None
            sequence.branches = []
        self.waiting, self.running, self.unfinished = [], [], {}
        if self.tier is not None:
            self.tier.reset()

    def check(self, others: Iterable[Sequence] = ()) -> None:
        """Prove that the cache's accounts agree with the tables of all sequences here, and of `others`."""
        holders = list(dict.fromkeys(chain(self.running, others)))
        loading = () if self.tier is None else self.tier.tables
        self.cache.check([*(sequence.table for sequence in holders), *loading])
        assert not any(sequence.table.block_ids for sequence in self.waiting), "a waiting sequence holds blocks"
        for sequence in self.running:
            assert self.cache.can_go_back(sequence.table, sequence.num_computed_tokens), "a window has lost blocks"
            wanted = self.cache.spec.num_blocks_for(sequence.num_computed_tokens)
            assert len(sequence.table.block_ids) == wanted, "between steps a sequence holds what it computed, no more"
        assert self.waiting == sorted(self.waiting, key=_place), "the queue is out of order"
        assert len(self.running) <= self.max_running, "more sequences run than may"
        assert all(sequence.finish_reason is None for sequence in chain(self.waiting, self.running, self.unfinished))
        known = {each for sequence in chain(self.waiting, self.running) for each in sequence.all_branches()}
        assert {each for each in known if each.finish_reason is None} == self.unfinished.keys(), "a sequence got lost"

    # Blocks for a step.

    def _begin_prompts(self, step: _Step) -> None:
        """What prompts may have of a step in which others wait for their next token."""
        if step.items:
            step.budget = min(step.budget, self.mixed_budget)

    def _schedule_one(self, sequence: Sequence, step: _Step) -> None:
        """Give a running sequence its tokens of this step, and the blocks."""
        missing = sequence.num_missing_tokens
        count = min(missing, step.budget)
        num_rows = 0
        if sequence.request.wants_prompt_logprobs:
            count = min(count, step.num_rows_left)
            step.num_rows_left -= count
            if count == 0:
                return
            num_rows = count if sequence.num_completion_tokens == 0 else 0
        num_computed = sequence.num_computed_tokens
        end = num_computed + count
        closes_gap = count == missing
        copies = None
        if closes_gap:
            # Half of the budget is not for guesses, and nobody is preempted for them.
            sequence.draft_ids = self._propose(sequence, step.budget - count - self.token_budget // 2)
            copies = self.cache.reserve(sequence.table, end + len(sequence.draft_ids), num_computed)
        if copies is None:
            sequence.draft_ids = []
            while (copies := self.cache.reserve(sequence.table, end, num_computed)) is None:
                if not self._make_room(sequence, step):
                    return
        num_drafted = len(sequence.draft_ids)
        num_logits, num_hidden = max(num_rows, 1 + num_drafted if closes_gap else 0), 0
        if sequence.request.kind == "embed":
            num_logits, num_hidden = 0, count if sequence.request.wants_all_hidden else int(closes_gap)
        step.items[sequence] = Scheduled(sequence, count, copies, closes_gap, num_logits, num_hidden)
        step.budget -= count + num_drafted

    def _propose(self, sequence: Sequence, max_drafts: int) -> list[int]:
        if sequence.drafts is None or sequence.num_completion_tokens == 0:
            return []
        max_drafts = min(max_drafts, sequence.request.max_total_tokens - sequence.num_tokens - 1)
        draft_ids = sequence.drafts.propose(sequence.token_ids, max(0, max_drafts))
        return draft_ids if sequence.matcher is None else draft_ids[: sequence.matcher.count_valid(draft_ids)]

    def _make_room(self, sequence: Sequence, step: _Step) -> bool:
        """Take blocks from whoever is least entitled to them; False where that is the sequence itself."""
        if self.cache.take_back(spared=_hold_of(sequence.request)):
            return True
        if self.tier is not None and self.tier.give_up():
            return True
        last = max(self.running, key=_place)
        if last is sequence and len(self.running) == 1:
            step.gone.add(sequence)
            self.abort(sequence, self._too_small(sequence))
            return False
        step.gone.add(last)
        step.items.pop(last, None)
        self._preempt(last)
        return last is not sequence

    def _preempt(self, sequence: Sequence) -> None:
        log.info("%s: preempted after %d tokens", sequence.request.request_id, sequence.num_tokens)
        self.running.remove(sequence)
        self._drop_blocks(sequence)
        sequence.costs.num_preemptions += 1
        self._preempted[sequence] = None
        self.num_preemptions += 1
        self._queue(sequence)

    # From waiting to running.

    def _admit(self, step: _Step) -> None:
        """Let waiting sequences begin, in order, while tokens and blocks last.

        A sequence waits on while another one computes the very block that it needs next, and those behind it go first.
        """
        if not self.waiting or step.budget <= 0 or len(self.running) >= self.max_running:
            return
        promised = sum(self._num_promised(sequence) for sequence in self.running)
        for sequence in self.waiting[: self.max_running]:
            if step.budget <= 0 or len(self.running) >= self.max_running:
                break
            match = self.match(sequence.request, sequence.token_ids)
            if self.cache.is_being_computed(match):
                continue
            while not (has_room := self.cache.has_room(match, sequence.num_tokens, promised)):
                if not self.cache.take_back(spared=_hold_of(sequence.request)):
                    break
                match = self.match(sequence.request, sequence.token_ids)
            if not has_room:
                if self.tier is not None and self.tier.give_up():
                    break  # what it held is free now; the next step looks again
                if self.running:
                    break  # nobody overtakes it
                self.abort(sequence, self._too_small(sequence))
                continue
            if self.tier is not None and self.tier.must_wait(sequence, match):
                continue
            self._begin(sequence, match)
            self._schedule_one(sequence, step)
            promised += self._num_promised(sequence)

    def match(self, request: Request, token_ids: SequenceOf[int]) -> Match:
        """What the cache has of a request's tokens; nothing for one that must compute all of them."""
        if not request.may_reuse:
            return self.cache.match((), request.salt)
        return self.cache.match(token_ids, request.salt, _hold_of(request))

    def _begin(self, sequence: Sequence, match: Match) -> None:
        """Let a waiting sequence run, with what is computed of it."""
        self.waiting.remove(sequence)
        self.running.append(sequence)
        if sequence.request.may_reuse:
            sequence.num_computed_tokens = self.cache.adopt(sequence.table, sequence.token_ids, match)
        if sequence.costs.num_preemptions:
            return  # what it finds is its own work
        self._begun[sequence] = None
        now_s = time.perf_counter()
        for each in sequence.all_branches():
            each.costs.begun_s = now_s
        if sequence.request.may_reuse:
            # One that is resumed may find some of its completion too.
            num_cached = min(sequence.num_computed_tokens, sequence.num_prompt_tokens - 1)
            sequence.costs.num_cached_tokens = num_cached
            sequence.costs.miss_reason = MissReason.DAMAGED if sequence.costs.stored_fault else match.miss_reason
            self.cache.stats.note(sequence.num_prompt_tokens - 1, num_cached)
            if self.tier is not None:
                self.tier.note_match(match)
        log.debug(
            "%s: begins, %d of %d prompt tokens cached (%s)",
            sequence.request.request_id,
            sequence.num_computed_tokens,
            sequence.num_prompt_tokens,
            sequence.costs.miss_reason,
        )

    def _num_promised(self, sequence: Sequence) -> int:
        """Blocks that a running sequence lacks for the tokens it has, and one for those to come."""
        return self.cache.num_missing(sequence.table, sequence.num_tokens) + 1

    def _too_small(self, sequence: Sequence) -> CacheTooSmall:
        needed = self.cache.spec.num_blocks_for(sequence.num_tokens)
        pool = self.cache.pool
        return CacheTooSmall(
            f"{sequence.num_tokens:,} tokens need {needed:,} blocks, of the cache's {pool.num_blocks:,} others hold"
            f" {pool.num_held - len(sequence.table.block_ids):,}",
            hint="unpin a session of this LLM, or give the cache more memory",
        )

    # Ends and beginnings.

    def _queue(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_place)

    def _leave(self, sequence: Sequence) -> None:
        """A finished sequence leaves the queue; its blocks are leased or given back."""
        self.unfinished.pop(sequence, None)
        if sequence in self.running:
            self.running.remove(sequence)
            sequence.costs.kv_bytes = max(sequence.costs.kv_bytes, self.cache.held_bytes(sequence.table))
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if self.tier is not None:
            self.tier.leave(sequence)
        if sequence.request.use_cache and sequence.request.share:
            self.cache.keep_end(sequence.table, sequence.token_ids, sequence.num_computed_tokens)
        if sequence.request.hold and sequence.table.block_ids:
            self.cache.release(sequence.table, sequence.num_computed_tokens)
            tokens = packed(sequence.token_ids[: sequence.num_computed_tokens])
            sequence.lease = self._make_lease(self.cache.keep(sequence.table, tokens))
        self._drop_blocks(sequence)
        self._ended[sequence] = None
        log.debug("%s: ends (%s)", sequence.request.request_id, sequence.error or sequence.finish_reason)

    def _drop_blocks(self, sequence: Sequence) -> None:
        self.cache.release(sequence.table)
        sequence.num_computed_tokens = 0
        sequence.draft_ids = []

    def _begin_branches(self, sequence: Sequence) -> None:
        """The prompt is computed, and each of its other branches has a first token by now: they go their ways."""
        for branch in sequence.branches:
            if branch.finish_reason is not None:
                self.unfinished.pop(branch, None)
                self._ended[branch] = None
                continue
            if branch.request.use_cache:
                branch.table = self.cache.fork(sequence.table, sequence.num_computed_tokens)
                branch.num_computed_tokens = branch.costs.num_cached_tokens = sequence.num_computed_tokens
            if len(self.running) < self.max_running:
                self.running.append(branch)
                self._begun[branch] = None
            else:
                self._drop_blocks(branch)
                self._queue(branch)
        sequence.branches = []


def _place(sequence: Sequence) -> tuple[int, int]:
    return sequence.place


def _hold_of(request: Request) -> Hold | None:
    held = request.held
    return held if held is not None and held.num_tokens else None
