"""Guesses of the next tokens, to be checked by the model in one step (prompt lookup decoding, Saxena, 2023)."""

from __future__ import annotations

from collections.abc import Sequence

FIRST_WANTED = 4
MAX_WANTED = 8
FAILURES_BEFORE_PAUSE = 3
FIRST_PAUSE = 8
LONGEST_PAUSE = 64
NUM_REMEMBERED = 8


class NgramDrafts:
    """Guesses a sequence's next tokens from what followed the same tokens before.

    A guess costs a row of a step and never changes a token: the sampler chooses, and a draft that differs is dropped.
    So only how many are right matters, and `note` draws the conclusions: more after a success, fewer after a failure,
    none for some steps after several failures.
    """

    def __init__(self) -> None:
        self._forget()
        self._num_wanted = FIRST_WANTED
        self._num_failures = 0  # drafts in a row of which nothing was accepted
        self._pause = FIRST_PAUSE  # steps, the next time
        self._num_paused = 0  # steps still to go

    @property
    def num_wanted(self) -> int:
        """The most tokens that `propose` drafts at present; 0 during a pause."""
        return 0 if self._num_paused else self._num_wanted

    def propose(self, token_ids: Sequence[int], max_drafts: int) -> list[int]:
        """What may follow `token_ids`: at most `max_drafts` and `num_wanted` tokens, none where nothing is known.

        The last three tokens, or else the last two, are looked up where they occurred last before, and what followed
        them there is the draft. It may run on into itself: so a text that repeats itself is continued for as long as is
        wanted, however short its period.

        Call it once a step, since that is how a pause ends, with all the sequence's tokens and no drafts among them.
        Only tokens that are new since the last call are indexed; a sequence that was cut back is indexed anew. (One
        that was cut back and has grown beyond its old length since is noticed by its last few indexed tokens.)
        """
        if self._num_paused:
            self._num_paused -= 1
            return []
        count = min(max_drafts, self._num_wanted)
        if count <= 0:
            return []
        self._index(token_ids)
        start = self._lookup(token_ids)
        if start is None:
            return []
        draft = list(token_ids[start : start + count])
        for index in range(count - len(draft)):
            draft.append(draft[index])
        return draft

    def note(self, num_drafted: int, num_accepted: int) -> None:
        """Learn how many of a draft's tokens were right. No draft teaches nothing."""
        assert 0 <= num_accepted <= num_drafted
        if num_drafted == 0:
            return
        if num_accepted == num_drafted:
            self._num_wanted = min(2 * self._num_wanted, MAX_WANTED)
        else:
            self._num_wanted = min(num_accepted + 1, MAX_WANTED)
        if num_accepted:
            self._num_failures, self._pause = 0, FIRST_PAUSE
            return
        self._num_failures += 1
        if self._num_failures >= FAILURES_BEFORE_PAUSE:  # and from then on, after each
            self._num_paused = self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _forget(self) -> None:
        # n-gram to the position after its last occurrence. Those that end with the last token are not in it yet:
        # nothing follows them, and it is what comes before them that is looked for.
        self._after_two: dict[tuple[int, ...], int] = {}
        self._after_three: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0  # n-grams that end before this position are in the index
        self._remembered: list[int] = []  # the tokens up to that position, the last few

    def _index(self, token_ids: Sequence[int]) -> None:
        known, end = self._num_indexed, len(token_ids) - 1
        if end < known or list(token_ids[known - len(self._remembered) : known]) != self._remembered:
            self._forget()
            known = 0
        if end <= known:
            return
        for size, index in ((2, self._after_two), (3, self._after_three)):
            first = max(known + 1, size)  # the position after the first n-gram that is new
            if first > end:
                continue
            columns = [token_ids[first - size + column : end - size + column + 1] for column in range(size)]
            index.update(zip(zip(*columns, strict=True), range(first, end + 1), strict=True))
        self._num_indexed = end
        self._remembered = list(token_ids[max(0, end - NUM_REMEMBERED) : end])

    def _lookup(self, token_ids: Sequence[int]) -> int | None:
        last = tuple(token_ids[-3:])
        found = self._after_three.get(last)
        return self._after_two.get(last[-2:]) if found is None else found
