"""Marked text: text in which a half of a surrogate pair, which no decoded text can hold, stands for a control token."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from kvik.text.detokenizer import Detokenizer
from kvik.text.tokenizer import Tokenizer

FIRST_MARK, ID_CHARACTER, OTHER_TOKEN = "\ud800", "\udffe", "\udfff"
MAX_MARKS = 64
MARKS = re.compile("[\ud800-\udfff]")


class TooManyMarksError(Exception):
    """A text has more different control tokens than marks are for."""


class Marker:
    """Marks the control tokens of one tokenizer, in the order in which they are met; those given have marks already."""

    def __init__(self, tokenizer: Tokenizer, marked_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.marked_ids = list(marked_ids)

    def read(self, text: str) -> str:
        """The marked text of a template's text, in which control tokens are written by name."""
        detokenizer = Detokenizer(self.tokenizer, continues_text=True)
        control = self.tokenizer.special_token_ids | self.tokenizer.eos_token_ids
        ids = self.tokenizer.encode(text, add_special=False)
        return "".join(self.mark(i) if i in control else detokenizer.add(i) for i in ids)

    def mark(self, token_id: int) -> str:
        """What stands for a control token. Raises TooManyMarksError."""
        if token_id not in self.marked_ids:
            if len(self.marked_ids) == MAX_MARKS:
                raise TooManyMarksError
            self.marked_ids.append(token_id)
        return mark_of(token_id, self.marked_ids)

    def id_of(self, mark: str) -> int:
        """The control token that a mark stands for."""
        return self.marked_ids[ord(mark) - ord(FIRST_MARK)]


def mark_of(token_id: int, marked_ids: Sequence[int]) -> str:
    """What stands for a control token where these have marks."""
    return chr(ord(FIRST_MARK) + marked_ids.index(token_id)) if token_id in marked_ids else OTHER_TOKEN


class MarkedStream:
    """The marked text of tokens whose text becomes certain later than they come, as under stop strings."""

    def __init__(self, tokenizer: Tokenizer, marked_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._marked_ids = marked_ids
        # Only for how many characters stand before a control token.
        self._detokenizer = Detokenizer(tokenizer, continues_text=True)
        self._num_written = 0
        self._num_certain = 0
        self._marks: deque[tuple[int, str]] = deque()

    def add(self, token_id: int, text: str) -> str:
        """What is known with one more token; `text` is what became certain with it."""
        if token_id in self._tokenizer.eos_token_ids:
            pass  # it ends the answer, and is no part of it
        elif token_id in self._tokenizer.special_token_ids:
            self._marks.append((self._num_written, mark_of(token_id, self._marked_ids)))
        else:
            self._num_written += len(self._detokenizer.add(token_id))
        return "".join(self._woven(text))

    def _woven(self, text: str) -> Iterator[str]:
        at, self._num_certain = self._num_certain, self._num_certain + len(text)
        while self._marks and self._marks[0][0] <= self._num_certain:
            place, mark = self._marks.popleft()
            yield text[: place - at] + mark
            text, at = text[place - at :], place
        yield text


def overlap(text: str, literal: str) -> int:
    """Length of the longest end of `text` that begins `literal` and is not all of it."""
    longest = min(len(text), len(literal) - 1)
    return next((size for size in range(longest, 0, -1) if literal.startswith(text[-size:])), 0)


def ranges_lark(token_ids: Iterable[int]) -> str:
    """The ids as ranges in llguidance's Lark."""
    ids = sorted(token_ids)
    firsts = [ids[0]] if ids else []
    lasts = []
    for left, right in pairwise(ids):
        if right != left + 1:
            lasts.append(left)
            firsts.append(right)
    lasts += ids[-1:]
    return ",".join(f"{first}-{last}" for first, last in zip(firsts, lasts, strict=True))
