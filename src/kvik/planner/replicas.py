"""Several processes that each serve a part of the users: what they take, and how fast they can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kvik.planner.fit import Load
from kvik.planner.speed import Roofline, speeds

MAX_REPLICAS = 64


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """Replicas that users are divided among. Each has weights, tables and a copy of the shared prefix of its own."""

    num_replicas: int
    users_each: int  # of the largest; the others have one less at most
    each_bytes: int  # of the largest
    num_bytes: int  # of all
    prefix_copies_bytes: int  # keys and values more than in one process
    same_machine_tokens_per_s: float | None  # decode, all on one machine, whose bandwidth and arithmetic they share
    own_machines_tokens_per_s: float | None  # decode, each on such a machine of its own


def plan_replicas(load: Load, num_replicas: int, roofline: Roofline | None) -> ReplicaPlan:
    """Divide the users of a load; `num_replicas` is no more than these."""
    few, num_larger = divmod(load.users, num_replicas)
    numbers: Mapping[int, int] = {few: num_replicas - num_larger, few + 1: num_larger}  # replicas by their users
    parts = {users: replace(load, users=users) for users, count in numbers.items() if count}
    largest = max(parts)
    on_one, on_own = _tokens_per_s(load, numbers, parts, roofline)
    return ReplicaPlan(
        num_replicas=num_replicas,
        users_each=largest,
        each_bytes=parts[largest].num_bytes,
        num_bytes=sum(numbers[users] * part.num_bytes for users, part in parts.items()),
        prefix_copies_bytes=sum(numbers[users] * part.kv_bytes for users, part in parts.items()) - load.kv_bytes,
        same_machine_tokens_per_s=on_one,
        own_machines_tokens_per_s=on_own,
    )


def _tokens_per_s(
    load: Load, numbers: Mapping[int, int], parts: Mapping[int, Load], roofline: Roofline | None
) -> tuple[float | None, float | None]:
    """On one machine steps of all replicas take the time that they would take one after the other."""
    if roofline is None:
        return None, None
    round_s, own = 0.0, 0.0
    for users, part in parts.items():
        found = speeds(part, roofline)
        seconds = None if found is None else found[0].seconds
        if not seconds:
            return None, None
        round_s += numbers[users] * seconds
        own += numbers[users] * users / seconds
    return load.users / round_s, own
