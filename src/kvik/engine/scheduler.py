"""Who computes how many tokens in the next step, and what a step leaves behind."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from itertools import chain

from kvik.cache import CacheManager, Match, MissReason
from kvik.engine.batch import Scheduled, ScheduledBatch, build_batch
from kvik.engine.sequence import Sequence
from kvik.errors import CacheTooSmall, QueueFull

PRIORITY_STEPS = 1000
"""Steps by which one level of priority comes earlier: low priorities wait longer, but not for ever."""

LOGIT_ROWS = 64
"""Most rows of logits that prompts may ask for in a step: a row is as long as the vocabulary."""


class Scheduler:
    """Chooses what each step computes: every running sequence something, as far as tokens and blocks go.

    waiting   queued, no blocks; in order of arrival, a level of priority being worth `PRIORITY_STEPS` steps
    running   some of its tokens computed, blocks for those
    parked    finished, its blocks kept for a turn that follows, as long as nobody else needs them

    When blocks are short, parked sequences lose theirs first, then the running ones that come last in the order; they
    wait again in their old place, and find most of what they had computed in the prefix tree. The first in the order
    always gets on, and every sequence was checked to fit when it came: so all of them end.
    """

    def __init__(self, cache: CacheManager, *, token_budget: int, max_running: int, max_waiting: int) -> None:
        self.cache = cache
        self.token_budget = token_budget
        self.max_running = min(max_running, token_budget)
        self.max_waiting = max_waiting
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.parked: dict[Sequence, None] = {}  # the oldest first
        self.num_preemptions = 0
        self._num_steps = 0
        self._num_rows_left = LOGIT_ROWS
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
            each.place = (self._num_steps - PRIORITY_STEPS * each.priority, self._num_added)
        self._queue(sequence)

    def schedule(self) -> ScheduledBatch | None:
        """Choose how many tokens each sequence computes in this step; `None` when nothing is to do.

        Short gaps first, for somebody waits for each token; then the prompts, in order, share what is left.
        """
        self._num_steps += 1
        self._num_rows_left = LOGIT_ROWS
        items: dict[Sequence, Scheduled] = {}
        budget = self.token_budget
        for sequence in sorted(self.running, key=lambda each: (each.num_missing_tokens > 1, each.place)):
            if budget > 0 and sequence in self.running:
                budget -= self._schedule_one(sequence, budget, items)
        budget = self._admit(budget, items)
        if items:
            return build_batch(list(items.values()))
        return self.schedule() if self.has_work else None  # somebody was refused or made room for the others

    def record(self, batch: ScheduledBatch, *, weight_bytes: int) -> None:
        """Note what the step computed, after sampling: progress, sealed blocks, ends, branches that begin."""
        self.cache.end_copies()
        for item in batch.items:
            sequence = item.sequence
            num_drafted, num_rejected = len(sequence.draft_ids), 0
            if num_drafted:
                # The last token that was accepted has no key and value yet, though its draft may have.
                num_kept = max(0, sequence.num_missing_tokens - item.num_tokens - 1)
                num_rejected = num_drafted - num_kept
                sequence.num_drafted_tokens += num_drafted
                sequence.num_accepted_tokens += num_kept
                assert sequence.drafts is not None
                sequence.drafts.note(num_drafted, num_kept)
                sequence.draft_ids = []
            sequence.num_computed_tokens += item.num_tokens + num_drafted - num_rejected
            sequence.total_computed_tokens += item.num_tokens + num_drafted
            sequence.weight_bytes += weight_bytes
            sequence.kv_bytes = self.cache.held_bytes(sequence.table)
            if num_rejected:
                self.cache.release(sequence.table, sequence.num_computed_tokens)
            if sequence.keep_cache:
                self.cache.seal(sequence.table, sequence.token_ids, sequence.num_computed_tokens)
            self.cache.slide(sequence.table, sequence.num_computed_tokens)
            if sequence.branches and item.closes_gap:
                self._begin_branches(sequence)
            if item.closes_gap and not sequence.keep_cache:
                self._drop_blocks(sequence)
            if sequence.finish_reason is not None:
                self._leave(sequence)

    def abort(self, sequence: Sequence, error: Exception | None = None) -> None:
        """End a sequence that is not finished, and the branches of it that have not begun."""
        for each in sequence.all_branches():
            if each.finish_reason is None:
                each.finish("abort", error)
                self._leave(each)
        sequence.branches = []

    def release(self, sequence: Sequence) -> None:
        """Give back the blocks that a finished sequence still holds."""
        self.parked.pop(sequence, None)
        self._drop_blocks(sequence)

    def fork(self, sequence: Sequence, copy: Sequence) -> None:
        """Let `copy`, whose tokens begin like those of a parked sequence, share its blocks and be parked beside it."""
        if sequence not in self.parked:
            return
        self.cache.release(sequence.table, sequence.num_computed_tokens)
        copy.table = self.cache.fork(sequence.table, sequence.num_computed_tokens)
        copy.num_computed_tokens = sequence.num_computed_tokens
        self.parked[copy] = None

    def check(self, others: Iterable[Sequence] = ()) -> None:
        """Prove that the cache's accounts agree with the tables of all sequences here, and of `others`."""
        holders = list(dict.fromkeys(chain(self.running, self.parked, others)))
        self.cache.check(sequence.table for sequence in holders)
        assert not any(sequence.table.block_ids for sequence in self.waiting), "a waiting sequence holds blocks"
        for sequence in chain(self.running, self.parked):
            assert self.cache.can_go_back(sequence.table, sequence.num_computed_tokens), "a window has lost blocks"
            wanted = self.cache.spec.num_blocks_for(sequence.num_computed_tokens)
            assert len(sequence.table.block_ids) == wanted, "between steps a sequence holds what it computed, no more"
        assert not any(sequence.table.claims for sequence in self.parked), "others wait for what nobody computes"
        assert self.waiting == sorted(self.waiting, key=_place), "the queue is out of order"
        assert len(self.running) <= self.max_running, "more sequences run than may"
        assert all(sequence.finish_reason is None for sequence in chain(self.waiting, self.running))

    # Blocks for a step.

    def _schedule_one(self, sequence: Sequence, budget: int, items: dict[Sequence, Scheduled]) -> int:
        """Give a running sequence its tokens of this step, and the blocks; returns what of the budget it takes."""
        missing = sequence.num_missing_tokens
        count = min(missing, budget)
        if sequence.wants_prompt_logprobs:
            count = min(count, self._num_rows_left)
            self._num_rows_left -= count
            if count == 0:
                return 0
        num_computed = sequence.num_computed_tokens
        end = num_computed + count
        closes_gap = count == missing
        copies = None
        if closes_gap:
            # Half of the budget is not for guesses, and nobody is preempted for them.
            sequence.draft_ids = self._propose(sequence, budget - count - self.token_budget // 2)
            copies = self.cache.reserve(sequence.table, end + len(sequence.draft_ids), num_computed)
        if copies is None:
            sequence.draft_ids = []
            while (copies := self.cache.reserve(sequence.table, end, num_computed)) is None:
                if not self._make_room(sequence, items):
                    return 0
        items[sequence] = Scheduled(sequence, count, copies, closes_gap)
        return count + len(sequence.draft_ids)

    def _propose(self, sequence: Sequence, most: int) -> list[int]:
        if sequence.drafts is None or sequence.num_completion_tokens == 0:
            return []
        most = min(most, sequence.most_tokens - sequence.num_tokens - 1)
        return sequence.drafts.propose(sequence.token_ids, max(0, most))

    def _make_room(self, sequence: Sequence, items: dict[Sequence, Scheduled]) -> bool:
        """Take blocks from whoever is least entitled to them; False where that is the sequence itself."""
        if self.parked:
            self._reclaim()
            return True
        last = max(self.running, key=_place)
        if last is sequence and len(self.running) == 1:
            self.abort(sequence, self._too_small(sequence))
            return False
        items.pop(last, None)
        self._preempt(last)
        return last is not sequence

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._drop_blocks(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._queue(sequence)

    def _reclaim(self) -> None:
        """Take the blocks of the sequence that was parked longest ago."""
        self.release(next(iter(self.parked)))

    # From waiting to running.

    def _admit(self, budget: int, items: dict[Sequence, Scheduled]) -> int:
        """Let waiting sequences begin, in order, while tokens and blocks last; returns what is left of the budget.

        A sequence waits on while another one computes the very block that it needs next, and those behind it go first.
        """
        promised = sum(self._num_promised(sequence) for sequence in self.running)
        for sequence in self.waiting[: self.max_running]:
            if budget <= 0 or len(self.running) >= self.max_running:
                break
            match = self.match(sequence)
            if sequence.previous is None and self.cache.is_being_computed(match):
                continue
            while self.parked and not self.cache.has_room(match, sequence.num_tokens, promised):
                self._reclaim()
            if not self.cache.has_room(match, sequence.num_tokens, promised):
                if self.running:
                    break  # nobody overtakes it
                self.abort(sequence, self._too_small(sequence))
                continue
            self._begin(sequence, match)
            budget -= self._schedule_one(sequence, budget, items)
            promised += self._num_promised(sequence)
        return budget

    def match(self, sequence: Sequence) -> Match:
        """What the prefix cache has of a sequence; nothing for one that must compute all of its tokens."""
        token_ids = sequence.token_ids if self._may_reuse(sequence) else []
        return self.cache.match(token_ids, sequence.table.namespace.salt)

    def _may_reuse(self, sequence: Sequence) -> bool:
        return sequence.keep_cache and not sequence.wants_prompt_logprobs

    def _begin(self, sequence: Sequence, match: Match) -> None:
        """Let a waiting sequence run, with what is computed of it: by the turn before it, or by whoever sealed it."""
        self.waiting.remove(sequence)
        self.running.append(sequence)
        stop: MissReason | None = None
        num_shared = self._take_over(sequence, match.num_cached_tokens)
        if num_shared is not None:
            stop = MissReason.ALL if num_shared == sequence.num_tokens - 1 else MissReason.DIFFERS
        elif self._may_reuse(sequence):
            num_shared, stop = self.cache.adopt(sequence.table, sequence.token_ids, match), match.stop
        sequence.num_computed_tokens = num_shared or 0
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
            sequence.miss_reason = stop

    def _take_over(self, sequence: Sequence, num_matched: int) -> int | None:
        """The blocks of the parked turn before pass on, if they hold more than the prefix tree found."""
        previous, sequence.previous = sequence.previous, None
        if previous is None or previous not in self.parked:
            return None
        num_shared = 0
        # The last prompt token is always computed: its logits choose the first new token.
        computed = previous.token_ids[: previous.num_computed_tokens]
        for mine, other in zip(sequence.token_ids[:-1], computed, strict=False):
            if mine != other:
                break
            num_shared += 1
        is_other = previous.table.namespace != sequence.table.namespace or not self._may_reuse(sequence)
        if num_shared <= num_matched or is_other or not self.cache.can_go_back(previous.table, num_shared):
            self.release(previous)
            return None
        del self.parked[previous]
        self.cache.release(previous.table, num_shared)
        sequence.table, previous.table = previous.table, sequence.table
        previous.num_computed_tokens = 0
        self.cache.stats.note(sequence.num_tokens - 1, num_shared)
        return num_shared

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
        """A finished sequence leaves the queue; its blocks are parked or given back."""
        if sequence in self.running:
            self.running.remove(sequence)
            sequence.kv_bytes = max(sequence.kv_bytes, self.cache.held_bytes(sequence.table))
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.previous = None
        if sequence.park and sequence.table.block_ids:
            self.cache.withdraw_claims(sequence.table)
            self.parked[sequence] = None
        else:
            self._drop_blocks(sequence)

    def _drop_blocks(self, sequence: Sequence) -> None:
        self.cache.release(sequence.table)
        sequence.num_computed_tokens = 0
        sequence.draft_ids = []

    def _begin_branches(self, sequence: Sequence) -> None:
        """The prompt is computed, and each of its other branches has a first token by now: they go their ways."""
        for branch in sequence.branches:
            if branch.finish_reason is not None:
                continue
            if branch.keep_cache:
                branch.table = self.cache.fork(sequence.table, sequence.num_computed_tokens)
                branch.num_computed_tokens = branch.num_cached_tokens = sequence.num_computed_tokens
            if len(self.running) < self.max_running:
                self.running.append(branch)
            else:
                self._drop_blocks(branch)
                self._queue(branch)
        sequence.branches = []


def _place(sequence: Sequence) -> tuple[int, int]:
    return sequence.place
