"""One request inside the engine: its tokens, its blocks, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from kvik.cache import BlockTable, MissReason
from kvik.config import SamplingParams
from kvik.engine.drafts import NgramDrafts
from kvik.engine.output import Stats, TextStream, TokenLogprobs

FinishReason = Literal["stop", "length", "abort"]


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence of tokens, of which the first `num_computed_tokens` have their keys and values in the cache.

    There is no prefill and no decode: a step closes part of the gap between the two counts, and the step that closes it
    samples one more token.
    """

    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int  # of this request's draws
    stop_token_ids: frozenset[int]  # the caller's, and the model's own unless they are ignored
    text: TextStream
    table: BlockTable
    most_tokens: int  # of prompt and completion
    priority: int = 0
    keep_cache: bool = True  # False: forget everything computed after each token, as naive decoding does
    park: bool = False  # keep the blocks after the end, for a turn that follows
    previous: Sequence | None = None  # a parked turn before this one, whose blocks it takes over when it begins
    branches: list[Sequence] = field(
        default_factory=list
    )  # others of the same prompt, which begin with its first token
    place: tuple[int, int] = (0, 0)  # in the queue, the least first
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the cache when the request began
    miss_reason: MissReason | None = None  # why not more of it was found
    drafts: NgramDrafts | None = None
    draft_ids: list[int] = field(default_factory=list)  # guesses behind the last token, computed in the same step
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt's second token and on
    finish_reason: FinishReason | None = None
    error: Exception | None = None  # why it was aborted, where it was not the caller who did
    # What it cost.
    total_computed_tokens: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0  # of those, chosen
    num_preemptions: int = 0
    kv_bytes: int = 0  # of the blocks held when it last computed
    weight_bytes: int = 0
    started_s: float = 0.0  # when it was queued
    first_token_s: float | None = None
    last_token_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.token_ids)

    @property
    def num_missing_tokens(self) -> int:
        """Tokens whose keys and values are not in the cache: the gap that steps close."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_completion_tokens(self) -> int:
        """Tokens that were sampled."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def completion_ids(self) -> list[int]:
        """The tokens that were sampled."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether each prompt token's logits are asked for, so that none can come from the prefix cache."""
        return self.params.echo and self.params.logprobs is not None

    def accept(self, token_id: int) -> None:
        """Add a sampled token, note the time, and see whether it ends the sequence."""
        self.token_ids.append(token_id)
        self.last_token_s = time.perf_counter()
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s
        ended = token_id in self.stop_token_ids
        if not ended:  # the text of an end-of-text token is not part of the completion
            self.text.add(token_id, may_stop=self.num_completion_tokens >= self.params.min_tokens)
        if ended or self.text.stopped:
            self.finish("stop")
        elif self.num_tokens >= self.most_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """No more tokens will come."""
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error
            self.text.finish()

    def all_branches(self) -> Iterator[Sequence]:
        """The sequence itself, then the branches that have not begun."""
        yield self
        yield from self.branches

    def stats(self) -> Stats:
        """What the request cost so far."""
        first, last = self.first_token_s, self.last_token_s
        return Stats(
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_computed_tokens=self.total_computed_tokens,
            num_completion_tokens=self.num_completion_tokens,
            time_to_first_token_s=0.0 if first is None else first - self.started_s,
            decode_s=0.0 if first is None or last is None else last - first,
            kv_bytes=self.kv_bytes,
            weight_bytes=self.weight_bytes,
            num_drafted_tokens=self.num_drafted_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            num_preemptions=self.num_preemptions,
            miss_reason=self.miss_reason,
        )
