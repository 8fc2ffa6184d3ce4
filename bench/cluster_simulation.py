"""Replicas that compute nothing: how long each first token would take, in a simple model of `kvik serve`.

A replica computes one prompt after the other, as fast as it can; those that decode slow it down a little. Its cache
keeps the blocks that were used last. A shared store keeps more of them, which are read faster than they are computed.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles

from cluster_traces import BLOCK_TOKENS, TracedRequest
from kvik.cluster import Policy, Replica, RoutedRequest, Router, Ticket

PREFILL_TOKENS_S = 8000.0
DECODE_TOKEN_S = 0.02
DECODE_SHARE = 0.02  # by how much each sequence that decodes slows a prompt down
LOAD_SHARE = 0.1  # of the time that computing a block takes, to read it from the store


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated."""

    num_replicas: int = 8
    cache_blocks: int = 2000  # of each
    store_blocks: int = 0
    speed: float = 1.0  # the trace's hours pass so much faster
    is_exact: bool = True  # replicas tell what they hold


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out: seconds to the first token, and the share of prompt tokens that were not computed."""

    mean_s: float
    median_s: float
    p99_s: float
    hit_share: float


class Blocks:
    """Names that are kept, those used longest ago evicted first, and of one path the last block first."""

    def __init__(self, capacity: int) -> None:
        self._names: OrderedDict[int, None] = OrderedDict()
        self._capacity = capacity

    def num_held(self, names: Sequence[int]) -> int:
        """How many of the first ones are there."""
        return next((at for at, name in enumerate(names) if name not in self._names), len(names))

    def use(self, names: Sequence[int]) -> tuple[list[int], list[int]]:
        """Keep these; gives those that are new, and those evicted for them."""
        new = []
        for name in reversed(names):
            if name in self._names:
                self._names.move_to_end(name)
            else:
                self._names[name] = None
                new.append(name)
        evicted = []
        while len(self._names) > self._capacity:
            evicted.append(self._names.popitem(last=False)[0])
        return new, evicted


@dataclass(slots=True, eq=False)
class _Job:
    request: TracedRequest
    arrived_s: float
    ticket: Ticket


class _Server:
    """One simulated replica."""

    def __init__(self, setup: Setup, store: Blocks | None, replica: Replica) -> None:
        self.replica = replica
        self.cache = Blocks(setup.cache_blocks)
        self.store = store
        self.queue: deque[_Job] = deque()
        self.is_busy = False
        self.num_decoding = 0
        self.num_hit_tokens = 0

    def service_s(self, job: _Job) -> float:
        """How long the prompt takes when it is begun now."""
        request = job.request
        num_held = self.cache.num_held(request.names)
        num_stored = 0 if self.store is None else max(0, self.store.num_held(request.names) - num_held)
        num_computed = max(1, request.num_prompt_tokens - (num_held + num_stored) * BLOCK_TOKENS)
        self.num_hit_tokens += request.num_prompt_tokens - num_computed
        slowed = (1 + DECODE_SHARE * self.num_decoding) / PREFILL_TOKENS_S
        return (num_computed + LOAD_SHARE * num_stored * BLOCK_TOKENS) * slowed


def simulate(trace: Sequence[TracedRequest], policy: Policy, setup: Setup) -> Outcome:
    """Run a trace through a policy."""
    router = Router(policy, store_blocks=setup.store_blocks, load_share=LOAD_SHARE)
    store = Blocks(setup.store_blocks) if setup.store_blocks else None
    max_guessed = None if setup.is_exact else setup.cache_blocks
    servers = [
        _Server(setup, store, router.add(f"replica-{at}", prefill_tokens_s=PREFILL_TOKENS_S, max_guessed=max_guessed))
        for at in range(setup.num_replicas)
    ]
    events: list[tuple[float, int, Callable[[float], None]]] = []
    firsts_s: list[float] = []

    numbers = itertools.count()

    def at(time_s: float, do: Callable[[float], None]) -> None:
        heapq.heappush(events, (time_s, next(numbers), do))

    def begin(server: _Server, now_s: float) -> None:
        if server.is_busy or not server.queue:
            return
        server.is_busy = True
        job = server.queue.popleft()
        at(now_s + server.service_s(job), lambda then_s: computed(server, job, then_s))

    def computed(server: _Server, job: _Job, now_s: float) -> None:
        new, evicted = server.cache.use(job.request.names)
        if store is not None:
            store.use(job.request.names)
        if setup.is_exact:
            router.contents.told_stored(server.replica.slot, new)
            router.contents.told_removed(server.replica.slot, evicted)
        job.ticket.first_token(now_s)
        firsts_s.append(now_s - job.arrived_s)
        server.num_decoding += 1
        server.is_busy = False
        at(now_s + job.request.num_completion_tokens * DECODE_TOKEN_S, lambda then_s: ended(server, job))
        begin(server, now_s)

    def ended(server: _Server, job: _Job) -> None:
        job.ticket.end()
        server.num_decoding -= 1

    for request in trace:
        now_s = request.at_s / setup.speed
        while events and events[0][0] <= now_s:
            time_s, _, do = heapq.heappop(events)
            do(time_s)
        routed = RoutedRequest(request.names, request.num_prompt_tokens, BLOCK_TOKENS)
        replica = router.choose(routed)
        assert replica is not None
        server = servers[replica.slot]
        server.queue.append(_Job(request, now_s, router.send(routed, replica, now_s)))
        begin(server, now_s)
    while events:
        time_s, _, do = heapq.heappop(events)
        do(time_s)
    num_tokens = sum(request.num_prompt_tokens for request in trace)
    cuts = quantiles(firsts_s, n=100)
    return Outcome(fmean(firsts_s), cuts[49], cuts[98], sum(each.num_hit_tokens for each in servers) / num_tokens)


def speed_for(trace: Sequence[TracedRequest], load: float, num_replicas: int) -> float:
    """How much faster a trace must pass, so that computing all of it would keep the replicas busy to this share."""
    seconds = trace[-1].at_s - trace[0].at_s
    tokens_s = sum(request.num_prompt_tokens for request in trace) / seconds
    return load * num_replicas * PREFILL_TOKENS_S / tokens_s
