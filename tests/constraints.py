"""A constraint without a grammar: what may come next is a hash of what came, as random as its seed."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from kvik.text.constraint import Constraint, Matcher, allows
from kvik.text.tokenizer import Tokenizer


class CannotGoOn(Exception):
    """What a matcher raises where its constraint was asked to fail."""


@dataclass(frozen=True, eq=False)
class RandomConstraint(Constraint):
    """Allows one token, half of them or most; a text is finished at a random token, or fails there where it `fails`."""

    tokenizer: Tokenizer
    vocab_size: int
    seed: int
    fails: bool = False

    def new_matcher(self) -> RandomMatcher:
        return RandomMatcher(self)


@dataclass
class RandomMatcher(Matcher):
    constraint: RandomConstraint
    token_ids: list[int] = field(default_factory=list)

    def _random(self, token_ids: SequenceOf[int]) -> random.Random:
        return random.Random(f"{self.constraint.seed} {token_ids}")

    @property
    def is_finished(self) -> bool:
        return bool(self.token_ids) and self._random(self.token_ids).random() < 0.03

    def masks(self, draft_ids: SequenceOf[int] = ()) -> list[bytes]:
        found = [self._mask(self.token_ids)]
        for count, token_id in enumerate(draft_ids, start=1):
            if not allows(found[-1], token_id):
                break
            try:
                found.append(self._mask([*self.token_ids, *draft_ids[:count]]))
            except CannotGoOn:  # the draft may not be chosen
                break
        return found

    def accept(self, token_id: int) -> None:
        assert allows(self._mask(self.token_ids), token_id), "a token that was not allowed"
        self.token_ids.append(token_id)

    def count_valid(self, token_ids: SequenceOf[int]) -> int:
        """Sometimes too many, as an estimate may say, and sometimes too few."""
        return self._random(self.token_ids).randrange(len(token_ids) + 1)

    def _mask(self, token_ids: SequenceOf[int]) -> bytes:
        rng = self._random(token_ids)
        if rng.random() < 0.05 and self.constraint.fails:
            raise CannotGoOn
        size = self.constraint.vocab_size
        density = rng.choice((0.0, 0.5, 0.5, 0.9))  # 0: there is no choice
        allowed = [rng.random() < density for _ in range(size)]
        allowed[rng.randrange(size)] = True
        bits = sum(1 << token_id for token_id, is_allowed in enumerate(allowed) if is_allowed)
        return bits.to_bytes((size + 7) // 8, "little")
