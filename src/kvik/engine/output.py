"""What comes back: pieces of text as they are written, and at the end the completion and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvik.cache import MissReason
from kvik.text.detokenizer import Detokenizer
from kvik.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Stats:
    """What one request cost. Seconds, bytes and counts of tokens."""

    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, read back instead of computed
    num_computed_tokens: int  # put through the model, over all steps
    num_completion_tokens: int
    time_to_first_token_s: float
    decode_s: float  # from the first token to the last
    kv_bytes: int  # of the blocks that the request held at its end
    weight_bytes: int  # that its steps read, each weight counted once a step
    num_drafted_tokens: int = 0  # draft tokens of speculation that were computed
    num_accepted_tokens: int = 0  # draft tokens that were accepted
    num_preemptions: int = 0  # times that the request was preempted
    miss_reason: MissReason | None = (
        None  # why no more of the prompt was found in the cache; None where it was not asked
    )
    num_stored_tokens: int = 0  # of the cached ones, read from the store
    load_s: float = 0.0  # that the request waited for them
    saved_s: float | None = None  # that computing them would have taken; None: none were read, or it is not known

    @property
    def time_per_output_token_s(self) -> float:
        """Mean time between tokens after the first; 0 where there is only one."""
        return self.decode_s / (self.num_completion_tokens - 1) if self.num_completion_tokens > 1 else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens after the first by the time they took; 0 where there is only one."""
        return 1 / self.time_per_output_token_s if self.time_per_output_token_s else 0.0

    @property
    def total_s(self) -> float:
        """From the request to its last token."""
        return self.time_to_first_token_s + self.decode_s


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log of the model's own probabilities, before penalties and temperature."""

    token_id: int
    logprob: float
    top: dict[int, float]  # token id to logprob, most likely first


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop", "length" or "abort"
    stats: Stats
    seed: int  # repeats the text with the same params and prompt
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # with `echo`; the first token has none


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """The vector of a prompt, and its cost; of the times only `Stats.total_s` applies."""

    vector: npt.NDArray[np.float32]  # (hidden_size,); none (0,) of one that was aborted
    finish_reason: str  # "stop" or "abort"
    stats: Stats

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.stats.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of a stream, and the text that is now certain (it may be empty).

    The last piece of each completion has its `finish_reason`, and carries it whole.
    """

    text: str
    token_id: int
    completion: Completion | None = None
    index: int = 0  # which of the `n` completions it belongs to
    logprobs: TokenLogprobs | None = None  # where they were asked for
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a prompt has come, in tokens, and the seconds since it was begun."""

    num_total: int
    num_cached: int
    num_processed: int  # the cached ones among them
    elapsed_s: float


class TextStream:
    """Turns tokens into text as they come: whole characters only, and nothing that a stop string may yet swallow."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: str = "") -> None:
        self._detokenizer = Detokenizer(tokenizer, continues_text=True)
        self._stop = stop
        self._pending = ""  # decoded, and perhaps the beginning of a stop string
        self._before = before
        self.parts: list[str] = []  # what each token made certain; the first one also what stands before it
        self.stopped_by: str | None = None  # the stop string that ended the text

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self.stopped_by is not None

    @property
    def text(self) -> str:
        """All that is certain."""
        return "".join(self.parts) if self.parts else self._before

    def add(self, token_id: int, *, may_stop: bool = True) -> None:
        """Take one token; `stopped` tells whether a stop string is complete. `may_stop` False only collects text."""
        self.parts.append("" if self.parts else self._before)
        self._accept(self._detokenizer.add(token_id), may_stop=may_stop)

    def skip(self) -> None:
        """Count one token that has no text, such as one that ends it."""
        self.parts.append("" if self.parts else self._before)

    def finish(self) -> None:
        """No more tokens will come: what was held back is text."""
        if not self.stopped:
            self._accept(self._detokenizer.finish(), may_stop=True)
        if not self.stopped:
            self._append(self._pending)
            self._pending = ""

    def _append(self, text: str) -> None:
        if self.parts:
            self.parts[-1] += text
        else:
            self._before += text

    def _accept(self, text: str, *, may_stop: bool) -> None:
        if not may_stop or not self._stop:
            self._append(text)
            return
        self._pending += text
        found = [(at, stop) for stop in self._stop if (at := self._pending.find(stop)) >= 0]
        if found:
            first, self.stopped_by = min(found, key=lambda each: each[0])
            self._append(self._pending[:first])
            self._pending = ""
            return
        held = max((_overlap(self._pending, stop) for stop in self._stop), default=0)
        certain = len(self._pending) - held
        self._append(self._pending[:certain])
        self._pending = self._pending[certain:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if stop.startswith(text[-size:])), 0)
