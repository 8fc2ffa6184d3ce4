"""A request while it runs: its tokens, its blocks, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvik.cache import BlockTable, Digest, MissReason
from kvik.config import SamplingParams
from kvik.engine.drafts import NgramDrafts
from kvik.engine.lease import Lease
from kvik.engine.mask_feed import MaskFeed
from kvik.engine.output import Embedding, Stats, TextStream, TokenLogprobs
from kvik.engine.pooling import PooledHidden
from kvik.engine.request import Request
from kvik.errors import InvalidInput
from kvik.store import Fault

FinishReason = Literal["stop", "length", "abort"]


@dataclass(slots=True)
class Costs:
    """What a sequence cost so far. Seconds are those of `time.perf_counter`."""

    num_cached_tokens: int = 0  # of the prompt, found in the cache when the request began
    miss_reason: MissReason | None = None  # why not more of it was found
    num_computed_tokens: int = 0  # put through the model, over all steps
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0  # of those, chosen
    num_preemptions: int = 0
    kv_bytes: int = 0  # of the blocks held when it last computed
    weight_bytes: int = 0  # that its steps went over
    submitted_s: float | None = None  # when it was queued, or given to the thread that does
    begun_s: float | None = None  # when it first had blocks
    num_stored_tokens: int = 0  # of the cached ones, read from the store
    load_s: float = 0.0  # that it waited for them
    saved_s: float | None = None  # that computing them would have taken; None: not known
    stored_fault: Fault | None = None  # why a stored block was not used
    first_token_s: float | None = None
    last_token_s: float | None = None


class Sequence:
    """One completion of a request: tokens, of which the first `num_computed_tokens` have keys and values in the cache.

    There is no prefill and no decode: a step closes part of the gap between the two counts, and the step that closes it
    samples one more token; or it ends the sequence, where the request asks for an embedding.
    """

    __slots__ = (
        "__weakref__",
        "branch",
        "branches",
        "costs",
        "draft_ids",
        "drafts",
        "error",
        "finish_reason",
        "hidden",
        "is_queued",
        "lease",
        "logprobs",
        "looked_for",
        "matcher",
        "num_computed_tokens",
        "place",
        "prompt_logprobs",
        "request",
        "seed",
        "table",
        "text",
        "token_ids",
    )

    def __init__(self, request: Request, branch: int, *, table: BlockTable, text: TextStream) -> None:
        params = request.params
        self.request = request
        self.branch = branch  # which of the request's completions
        self.seed = (request.seed + branch) % 2**64
        self.token_ids = list(request.prompt_ids)
        self.num_computed_tokens = 0
        self.table = table
        self.text = text
        self.matcher = None if request.constraint is None else MaskFeed(request.constraint)
        self.branches: list[Sequence] = []  # others of the same request, which begin with its first token
        self.is_queued = False  # whether the engine ever took it
        self.looked_for: Digest | None = None  # the stored block that it asked for last
        self.place = (0, 0)  # in the queue, the least first
        self.drafts = NgramDrafts() if params.speculate == "ngram" and request.use_cache else None
        self.draft_ids: list[int] = []  # guesses behind the last token, computed in the same step
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []  # of the prompt's second token and on
        self.hidden = PooledHidden(request.pooling) if request.kind == "embed" else None
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None  # why it was aborted, where it was not the caller who did
        self.lease: Lease | None = None  # what was computed, where the request asked to hold it
        self.costs = Costs()

    @property
    def params(self) -> SamplingParams:
        """How its tokens are chosen."""
        return self.request.params

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

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
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def completion_ids(self) -> list[int]:
        """The tokens that were sampled."""
        return self.token_ids[len(self.request.prompt_ids) :]

    def accept(self, token_id: int) -> None:
        """Add a sampled token, note the time, and see whether it ends the sequence."""
        self.token_ids.append(token_id)
        costs, request = self.costs, self.request
        costs.last_token_s = time.perf_counter()
        if costs.first_token_s is None:
            costs.first_token_s = costs.last_token_s
        if token_id in request.stop_token_ids:  # the text of an end-of-text token is not part of the completion
            self.text.skip()
            self.finish("stop")
            return
        self.text.add(token_id, may_stop=self.num_completion_tokens >= request.params.min_tokens)
        if self.matcher is not None:
            self.matcher.accept(token_id)
        if self.text.stopped or (self.matcher is not None and self.matcher.is_finished):
            self.finish("stop")
        elif len(self.token_ids) >= request.max_total_tokens:
            self.finish("length")

    def resume(self, token_ids: SequenceOf[int]) -> None:
        """Before it is queued: accept what another engine sampled for it. Raises `InvalidInput`."""
        for at, token_id in enumerate(token_ids):
            if self.finish_reason is not None:
                raise InvalidInput(
                    f"the completion has ended after {at:,} tokens, {len(token_ids):,} are given",
                    hint="give those that were sampled with the same params",
                )
            self.accept(token_id)
        self.costs.first_token_s = self.costs.last_token_s = None  # none of them was sampled here

    def finish_embedding(self) -> None:
        """Note the time: the prompt is computed, and that is all."""
        self.costs.first_token_s = self.costs.last_token_s = time.perf_counter()
        self.finish("stop")

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """No more tokens will come."""
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error
            self.matcher = None  # it may hold megabytes
            self.text.finish()

    def all_branches(self) -> Iterator[Sequence]:
        """The sequence itself, then the branches that have not begun."""
        yield self
        yield from self.branches

    def embedding(self) -> Embedding:
        """The result of a finished sequence whose request asked for one."""
        assert self.hidden is not None
        assert self.finish_reason is not None
        is_whole = self.finish_reason == "stop"
        vector = self.hidden.vector(normalize=self.request.normalize) if is_whole else np.empty(0, np.float32)
        return Embedding(vector, self.finish_reason, self.stats())

    def stats(self) -> Stats:
        """What it cost so far."""
        costs = self.costs
        first_s, last_s = costs.first_token_s, costs.last_token_s
        return Stats(
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=costs.num_cached_tokens,
            num_computed_tokens=costs.num_computed_tokens,
            num_completion_tokens=self.num_completion_tokens,
            time_to_first_token_s=0.0 if first_s is None or costs.submitted_s is None else first_s - costs.submitted_s,
            decode_s=0.0 if first_s is None or last_s is None else last_s - first_s,
            kv_bytes=costs.kv_bytes,
            weight_bytes=costs.weight_bytes,
            num_drafted_tokens=costs.num_drafted_tokens,
            num_accepted_tokens=costs.num_accepted_tokens,
            num_preemptions=costs.num_preemptions,
            miss_reason=costs.miss_reason,
            num_stored_tokens=costs.num_stored_tokens,
            load_s=costs.load_s,
            saved_s=costs.saved_s,
        )
