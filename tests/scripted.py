"""A constraint that has a model write one text, token by token, within what another constraint allows."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvik.server.preparing import constraint_of
from kvik.text.constraint import Constraint, Matcher, allows, num_mask_bytes
from kvik.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Script(Constraint):
    """These tokens and no others; where the `inner` constraint would not have one, the request fails."""

    tokenizer: Tokenizer
    vocab_size: int
    token_ids: SequenceOf[int]
    inner: Constraint | None = None

    def new_matcher(self) -> ScriptMatcher:
        return ScriptMatcher(self, None if self.inner is None else self.inner.new_matcher())


@dataclass
class ScriptMatcher(Matcher):
    script: Script
    inner: Matcher | None
    written: list[int] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return len(self.written) == len(self.script.token_ids)

    def masks(self, draft_ids: SequenceOf[int] = ()) -> list[bytes]:
        wanted = self.script.token_ids[len(self.written)]
        if self.inner is not None:
            assert not self.inner.is_finished, f"nothing may follow {self.written}"
            assert allows(self.inner.masks()[0], wanted), f"{wanted} may not follow {self.written}"
        return [(1 << wanted).to_bytes(num_mask_bytes(self.script.vocab_size), "little")]

    def accept(self, token_id: int) -> None:
        self.written.append(token_id)
        if self.inner is not None:
            self.inner.accept(token_id)
            assert not self.is_finished or self.inner.is_finished, "the text is not whole"

    def count_valid(self, token_ids: SequenceOf[int]) -> int:
        return 0


def have_written(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Every answer of a server of this process is the text, in which control tokens are written by name."""

    def scripted(served: Any, *arguments: Any) -> Script:
        inner = constraint_of(served, *arguments)
        tokenizer = served.llm.model.tokenizer
        token_ids = tokenizer.encode(text, add_special=False)
        return Script(tokenizer, served.llm.model.decoder.spec.vocab_size, token_ids, inner)

    monkeypatch.setattr("kvik.server.openai.chat.constraint_of", scripted)
