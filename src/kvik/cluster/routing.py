"""What a routing policy is told: the request, and each replica as the router knows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvik.cluster.contents import Name

RUNNING_SHARE = 0.02
"""By how much a sequence that decodes slows prompts down: its row in each step, beside a chunk of some 128 tokens."""


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """A request as far as routing looks at it."""

    names: Sequence[Name]  # of its prompt's whole blocks, chained from a root that the salt is part of
    num_tokens: int  # of its prompt
    block_size: int  # tokens of a block
    key: bytes | None = None  # its session or `prompt_cache_key`, digested with the salt

    def work_tokens(self, num_held: int, num_stored: int, load_share: float) -> float:
        """What a replica has to do that holds so many of its first blocks, in tokens that it would compute meanwhile.

        `num_stored` of the first blocks are in a store, from where a token is read in `load_share` of the time that
        computing it takes. The last token is always computed.
        """
        num_loaded = max(0, num_stored - num_held) * self.block_size
        num_computed = max(1, self.num_tokens - num_held * self.block_size - num_loaded)
        return num_computed + load_share * num_loaded


@dataclass(slots=True, eq=False)
class Replica:
    """One server, and the work that was sent to it."""

    id: str
    slot: int  # its bit in `Contents`
    prefill_tokens_s: float  # as measured so far
    is_open: bool = True  # takes requests: neither draining nor dead
    waiting_tokens: float = 0.0  # of work before the first token of the last request that waits
    num_waiting: int = 0  # requests without a first token
    num_running: int = 0  # requests with one

    @property
    def num_in_flight(self) -> int:
        """Requests that it has."""
        return self.num_waiting + self.num_running

    @property
    def token_s(self) -> float:
        """Seconds for a prompt's token now."""
        return (1 + RUNNING_SHARE * self.num_running) / self.prefill_tokens_s

    @property
    def queue_s(self) -> float:
        """Seconds until a request that is sent now is begun."""
        return self.waiting_tokens * self.token_s
