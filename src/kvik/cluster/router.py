"""Sends requests to replicas by a policy, and keeps account of what each of them has."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvik.cluster.contents import Contents, Name
from kvik.cluster.policy import Policy
from kvik.cluster.routing import Replica, RoutedRequest

MAX_KEYS = 1 << 16
"""Keys whose replica is remembered."""

MIN_MEASURED_TOKENS = 64
"""Of a prompt whose time tells a replica's speed: a shorter one's is that of all else."""

KEPT_WEIGHT = 0.8
"""Of what was known before, in the moving average of a replica's speed."""


class Router:
    """Replicas, what they hold, and a policy; not for several threads. Times are the caller's, in seconds.

    Where they share a store, it is guessed to hold the `store_blocks` blocks that any of them computed last.
    """

    def __init__(self, policy: Policy, *, store_blocks: int = 0, load_share: float = 1.0) -> None:
        self.policy = policy
        self.contents = Contents()
        self._stored: Contents | None = None  # what the store holds, as slot 0
        if store_blocks:
            self._stored = Contents()
            self._stored.open(0, store_blocks)
        self._load_share = load_share
        self._replicas: list[Replica | None] = []  # by slot
        self._last_of: OrderedDict[bytes, Replica] = OrderedDict()  # by key

    @property
    def replicas(self) -> list[Replica]:
        """All of them, in order of their slots."""
        return [replica for replica in self._replicas if replica is not None]

    def add(self, replica_id: str, *, prefill_tokens_s: float, max_guessed: int | None) -> Replica:
        """A new replica. It holds up to `max_guessed` blocks, which are guessed; None: it tells what it holds."""
        free = [slot for slot, replica in enumerate(self._replicas) if replica is None]
        slot = free[0] if free else len(self._replicas)
        if not free:
            self._replicas.append(None)
        replica = self._replicas[slot] = Replica(replica_id, slot, prefill_tokens_s)
        self.contents.open(slot, max_guessed)
        return replica

    def remove(self, replica: Replica) -> None:
        """It is gone, with all that it held."""
        replica.is_open = False
        if self._replicas[replica.slot] is replica:
            self._replicas[replica.slot] = None
            self.contents.clear(replica.slot)

    def choose(self, request: RoutedRequest, without: Iterable[Replica] = ()) -> Replica | None:
        """The replica for a request, not one of `without`; None where no other is open."""
        refused = set(without)
        able = [replica for replica in self._replicas if replica is not None and replica.is_open]
        if refused:
            able = [replica for replica in able if replica not in refused]
        if not able:
            return None
        sticky = None if request.key is None else self._last_of.get(request.key)
        works = self._works(request, able) if self.policy.needs_contents else []
        return self.policy.choose(request, able, works, sticky)

    def send(self, request: RoutedRequest, replica: Replica, now_s: float) -> Ticket:
        """Note that the request goes there; whoever sends it tells the ticket how it goes on."""
        (work,) = self._works(request, [replica])
        ticket = Ticket(self, request, replica, work, now_s)
        self.contents.sent(replica.slot, request.names)
        if request.key is not None:
            self._last_of[request.key] = replica
            self._last_of.move_to_end(request.key)
            if len(self._last_of) > MAX_KEYS:
                self._last_of.popitem(last=False)
        return ticket

    def _works(self, request: RoutedRequest, replicas: Sequence[Replica]) -> list[float]:
        slots = 0
        for replica in replicas:
            slots |= 1 << replica.slot
        names, load_share = request.names, self._load_share
        num_held = self.contents.num_held(names, slots)
        num_stored = 0 if self._stored is None else self._stored.num_held(names, 1).get(0, 0)
        work_of = {count: request.work_tokens(count, num_stored, load_share) for count in {0, *num_held.values()}}
        return [work_of[num_held.get(replica.slot, 0)] for replica in replicas]

    def computed(self, replica: Replica, names: Sequence[Name], *, is_whole: bool) -> None:
        """What was sent to a replica is in its cache now; or never will be, where the request failed before that."""
        if is_whole and self._stored is not None:
            self._stored.sent(0, names)
        if self._replicas[replica.slot] is replica:
            self.contents.computed(replica.slot, names)


class Ticket:
    """A request that a replica has: counted there until it ends."""

    __slots__ = ("_has_ended", "_is_measure", "_is_waiting", "_router", "_sent_s", "_work_tokens", "replica", "request")

    def __init__(
        self, router: Router, request: RoutedRequest, replica: Replica, work_tokens: float, now_s: float
    ) -> None:
        self.request, self.replica = request, replica
        self._router, self._work_tokens, self._sent_s = router, work_tokens, now_s
        self._is_measure = work_tokens == request.num_tokens > MIN_MEASURED_TOKENS and replica.num_waiting == 0
        self._is_waiting = True
        self._has_ended = False
        replica.num_waiting += 1
        replica.waiting_tokens += work_tokens

    def first_token(self, now_s: float) -> None:
        """Its prompt is computed. Where nothing was cached and nobody waited, the time tells the replica's speed."""
        if not self._is_waiting:
            return
        self._stop_waiting(is_whole=True)
        replica = self.replica
        replica.num_running += 1
        if self._is_measure and now_s > self._sent_s:
            seen = self._work_tokens / (now_s - self._sent_s)
            replica.prefill_tokens_s = KEPT_WEIGHT * replica.prefill_tokens_s + (1 - KEPT_WEIGHT) * seen

    def end(self) -> None:
        """It is whole, or nobody waits for it any more."""
        if self._has_ended:
            return
        self._has_ended = True
        if self._is_waiting:
            self._stop_waiting(is_whole=False)
        else:
            self.replica.num_running -= 1

    def _stop_waiting(self, *, is_whole: bool) -> None:
        self._is_waiting = False
        replica = self.replica
        replica.num_waiting -= 1
        replica.waiting_tokens = replica.waiting_tokens - self._work_tokens if replica.num_waiting else 0.0
        self._router.computed(replica, self.request.names, is_whole=is_whole)
