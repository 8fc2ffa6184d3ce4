"""The masks of one completion, computed beside the model's steps, so that a costly grammar costs its own request."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

from kvik.errors import GrammarFailed
from kvik.text.constraint import Constraint, Matcher

SLOW_MASK_S = 0.002
"""Of processor time. Behind a mask that takes longer the next is not waited for: its completion misses steps."""

FREE_MASKS_S = 1.0
MAX_MEAN_MASK_S = 0.005
"""Processor time that all masks of a completion may take, and how much each may on average when that is spent."""


class MaskFeed:
    """Follows a grammar through one completion as its `Matcher` does, and keeps account of what that costs.

    Only one thread at a time uses it: that of the engine, or where masks are under way the one that computes them.
    """

    __slots__ = (
        "_asked",
        "_constraint",
        "_draft_ids",
        "_error",
        "_found",
        "_matcher",
        "_num_masks",
        "_spent_s",
        "is_slow",
    )

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint
        self._matcher: Matcher | None = None  # made when it is needed: those who wait need no memory
        self._found: list[bytes] | None = None
        self._draft_ids: list[int] = []  # that the masks were found with
        self._error: Exception | None = None
        self._asked: Future[None] | None = None
        self._spent_s = 0.0
        self._num_masks = 0
        self.is_slow = False  # whether its next mask is computed ahead, and not waited for

    @property
    def is_finished(self) -> bool:
        """See Matcher."""
        return self._matcher is not None and self._matcher.is_finished

    @property
    def is_ahead(self) -> bool:
        """Whether its next mask was asked for ahead."""
        return self._asked is not None

    @property
    def is_pending(self) -> bool:
        """Whether masks are under way that need not be waited for."""
        return self._asked is not None and not self._asked.done()

    def ask_ahead(self) -> None:
        """Compute the next mask of a slow one beside all steps."""
        if self.is_slow and self._found is None and self._error is None and not self.is_finished:
            self._asked = _pool("slow", os.getpid()).submit(self.compute)

    def compute(self, draft_ids: Sequence[int] = ()) -> None:
        """Find the masks, or what is wrong, for `masks` to give."""
        if self._found is not None or self._error is not None:
            return
        begun_s = time.thread_time()
        try:
            self._draft_ids, self._found = list(draft_ids), self._following().masks(draft_ids)
        except Exception as error:  # noqa: BLE001  # whatever it was, `masks` raises it
            self._error = error
        self._num_masks += 1
        spent_s = time.thread_time() - begun_s
        self._spent_s += spent_s
        self.is_slow = spent_s > SLOW_MASK_S
        mean_s = self._spent_s / self._num_masks
        if self._spent_s > FREE_MASKS_S and mean_s > MAX_MEAN_MASK_S and self._error is None:
            self._error = GrammarFailed(
                f"the grammar is too costly: {self._num_masks:,} masks took {mean_s * 1000:.1f} ms each, more than"
                f" {MAX_MEAN_MASK_S * 1000:g}",
                hint="make it simpler: fewer alternatives, shorter repeats, longer lexemes",
            )

    def masks(self, draft_ids: Sequence[int] = ()) -> list[bytes]:
        """See Matcher; waits for what is under way."""
        asked, self._asked = self._asked, None
        if asked is not None:
            asked.result()
        if self._found is not None and self._draft_ids != list(draft_ids):
            self._found = None
        self.compute(draft_ids)
        if self._error is not None:
            raise self._error
        assert self._found is not None
        return self._found

    def accept(self, token_id: int) -> None:
        """See Matcher."""
        self._found = None
        self._following().accept(token_id)

    def count_valid(self, token_ids: Sequence[int]) -> int:
        """See Matcher; none while a mask is under way."""
        return 0 if self.is_ahead or self._matcher is None else self._matcher.count_valid(token_ids)

    def _following(self) -> Matcher:
        if self._matcher is None:
            self._matcher = self._constraint.new_matcher()
        return self._matcher


def compute_beside(feeds: Iterable[tuple[MaskFeed, Sequence[int]]]) -> Future[None] | None:
    """Have masks computed while the model runs; None where there are none to compute."""
    due = [(feed, draft_ids) for feed, draft_ids in feeds if not feed.is_ahead]
    return _pool("step", os.getpid()).submit(_compute_all, due) if due else None


def _compute_all(due: list[tuple[MaskFeed, Sequence[int]]]) -> None:
    for feed, draft_ids in due:
        feed.compute(draft_ids)


@cache
def _pool(kind: str, process_id: int) -> ThreadPoolExecutor:
    """One thread for the masks of steps, and one for slow ones; a process that was forked off has its own."""
    return ThreadPoolExecutor(1, thread_name_prefix=f"kvik-masks-{kind}")
