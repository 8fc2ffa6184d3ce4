"""Policies: which of the open replicas a request goes to. They know no sockets and no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Protocol

from kvik.cluster.routing import Replica, RoutedRequest

HASHED_BLOCKS = 2
"""Of a prompt's beginning, that `Hash` looks at."""

STICKY_SHARE = 0.5
"""Of what seems to be left to do, presumed to be where the same key was sent last."""

MAX_BEHIND_S = 30.0
"""A replica whose queue is so much longer than the shortest gets nothing, whatever it seems to hold."""


class Policy(Protocol):
    """Chooses a replica."""

    needs_contents: bool  # whether it looks at what they hold

    def choose(
        self, request: RoutedRequest, replicas: Sequence[Replica], work_tokens: Sequence[float], sticky: Replica | None
    ) -> Replica:
        """One of the replicas, of which there is at least one.

        `work_tokens`: what each of them has to do for the request (`RoutedRequest.work_tokens`), where the policy
        needs contents; `sticky`: which of them the request's key was sent to last.
        """


class RoundRobin:
    """One after the other."""

    needs_contents = False

    def __init__(self) -> None:
        self._last = -1

    def choose(
        self, request: RoutedRequest, replicas: Sequence[Replica], work_tokens: Sequence[float], sticky: Replica | None
    ) -> Replica:
        """The next slot's; see `Policy`."""
        chosen = min(replicas, key=lambda replica: (replica.slot <= self._last, replica.slot))
        self._last = chosen.slot
        return chosen


class LeastLoaded:
    """The shortest queue in seconds, then the fewest requests."""

    needs_contents = False

    def choose(
        self, request: RoutedRequest, replicas: Sequence[Replica], work_tokens: Sequence[float], sticky: Replica | None
    ) -> Replica:
        """See `Policy`."""
        return min(replicas, key=lambda replica: (replica.queue_s, replica.num_in_flight, replica.slot))


class Hash:
    """The same beginning, or the same key, goes to the same replica, as long as it is there (rendezvous hashing)."""

    needs_contents = False

    def choose(
        self, request: RoutedRequest, replicas: Sequence[Replica], work_tokens: Sequence[float], sticky: Replica | None
    ) -> Replica:
        """See `Policy`."""
        told = request.key or repr(request.names[:HASHED_BLOCKS]).encode()
        return max(replicas, key=lambda replica: blake2b(told + replica.id.encode(), digest_size=8).digest())


class Cost:
    """The replica where the first token comes soonest: seconds in its queue, and for what it does not hold.

    Equal ones take turns, so that caches fill evenly.
    """

    needs_contents = True

    def __init__(self, max_behind_s: float = MAX_BEHIND_S) -> None:
        self._max_behind_s = max_behind_s
        self._turns: dict[int, int] = {}  # by slot, when it was chosen last
        self._num_chosen = 0

    def choose(
        self, request: RoutedRequest, replicas: Sequence[Replica], work_tokens: Sequence[float], sticky: Replica | None
    ) -> Replica:
        """See `Policy`."""
        turns = self._turns
        tokens_s = [replica.token_s for replica in replicas]
        queues_s = [replica.waiting_tokens * token_s for replica, token_s in zip(replicas, tokens_s, strict=True)]
        limit_s = min(queues_s) + self._max_behind_s
        best: Replica | None = None
        best_s, best_turn = 0.0, 0
        for replica, token_s, queue_s, work in zip(replicas, tokens_s, queues_s, work_tokens, strict=True):
            if queue_s > limit_s:
                continue
            cost_s = queue_s + (work * STICKY_SHARE if replica is sticky else work) * token_s
            if best is not None and cost_s > best_s:
                continue
            turn = turns.get(replica.slot, 0)
            if best is None or cost_s < best_s or turn < best_turn:
                best, best_s, best_turn = replica, cost_s, turn
        assert best is not None
        self._num_chosen += 1
        turns[best.slot] = self._num_chosen
        return best


POLICIES: Mapping[str, type[Policy]] = {
    "cost": Cost,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "hash": Hash,
}
