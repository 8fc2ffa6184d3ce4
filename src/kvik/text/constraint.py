"""What a constraint is to the engine: which tokens may come next, told before each token is chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from kvik.text.tokenizer import Tokenizer


class Matcher(ABC):
    """Follows one completion: it is told each token, and says which may come next. Not for several threads at once."""

    @property
    @abstractmethod
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing can be added to it."""

    @abstractmethod
    def masks(self, draft_ids: Sequence[int] = ()) -> list[bytes]:
        """What may come next, then what may come after the first draft, after the second, and so on.

        It ends early at a draft that may not come, or behind which the matcher would fail. Each mask has a bit for each
        token, as in `SampleRow.mask`, and allows at least one. The matcher stays where it was, and what it looked at
        for a draft never shows in what it says later. Whatever is raised ends its own sequence.
        """

    @abstractmethod
    def accept(self, token_id: int) -> None:
        """Go on by a token that was chosen, and that does not end the text. Whatever is raised ends its sequence."""

    @abstractmethod
    def count_valid(self, token_ids: Sequence[int]) -> int:
        """At most how many of the tokens may come next, one after the other; a cheap estimate that never raises."""


class Constraint(ABC):
    """A grammar ready to be followed by any number of completions, from any thread."""

    tokenizer: Tokenizer  # whose tokens the masks are about
    vocab_size: int  # of the model, which may exceed the tokenizer's

    @abstractmethod
    def new_matcher(self) -> Matcher:
        """One that stands at the beginning of a text. What other matchers went through does not show in it."""


def without(mask: bytes, token_ids: Iterable[int]) -> bytes:
    """The mask without these tokens, unless it would allow nothing: then the mask as it is."""
    left = bytearray(mask)
    for token_id in token_ids:
        left[token_id // 8] &= ~(1 << token_id % 8)
    return bytes(left) if any_allowed(left) else mask


def any_allowed(mask: bytes | bytearray) -> bool:
    """Whether the mask allows a token."""
    return mask.count(0) < len(mask)


def allows(mask: bytes, token_id: int) -> bool:
    """Whether the mask allows this token."""
    return bool(mask[token_id // 8] >> token_id % 8 & 1)


def num_mask_bytes(vocab_size: int) -> int:
    """Bytes of a mask."""
    return (vocab_size + 7) // 8
