"""One request inside the engine: its tokens, its blocks, and how far it is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from kvik.config import SamplingParams
from kvik.engine.output import Stats, TextStream, TokenLogprobs
from kvik.errors import KvikError

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
    keep_cache: bool = True  # False: forget everything computed after each token, as naive decoding does
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the cache when the request came
    block_table: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: KvikError | None = None  # why it was aborted, where it was not the caller who did
    # What it cost.
    total_computed_tokens: int = 0
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
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_completion_tokens(self) -> int:
        """Tokens that were sampled."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def completion_ids(self) -> list[int]:
        """The tokens that were sampled."""
        return self.token_ids[self.num_prompt_tokens :]

    def append(self, token_id: int) -> None:
        """Add a sampled token and note the time."""
        self.token_ids.append(token_id)
        self.last_token_s = time.perf_counter()
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s

    def stats(self, *, block_bytes: int) -> Stats:
        """What the request cost so far."""
        first, last = self.first_token_s, self.last_token_s
        return Stats(
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_computed_tokens=self.total_computed_tokens,
            num_completion_tokens=self.num_completion_tokens,
            time_to_first_token_s=0.0 if first is None else first - self.started_s,
            decode_s=0.0 if first is None or last is None else last - first,
            kv_bytes=len(self.block_table) * block_bytes,
            weight_bytes=self.weight_bytes,
        )
