"""From the groups of a cache to the layers of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from kvik.cache import KVCacheSpec
from kvik.errors import InvalidInput

T = TypeVar("T")


def blocks_of_groups(spec: KVCacheSpec, group_blocks: int | Sequence[int]) -> tuple[int, ...]:
    """Blocks of each group, as many in each where a number is given. Raises `InvalidInput` for what no kernel keeps."""
    if spec.problem is not None:
        raise InvalidInput(
            f"the engine cannot keep this: {spec.problem}", hint="`kvik plan` can say what it would take"
        )
    if isinstance(group_blocks, int):
        return (group_blocks,) * len(spec.groups)
    assert len(group_blocks) == len(spec.groups)
    return tuple(group_blocks)


def by_layer(spec: KVCacheSpec, make: Callable[[int, int], T]) -> list[T]:
    """What `make` gives for a group and a layer's place in it, in the order of layers; layers may share one.

    A recent group has the layers of another one, and none of its own.
    """
    kept = [(index, group) for index, group in enumerate(spec.groups) if group.kind != "recent"]
    made = {layer: make(index, at) for index, group in kept for at, layer in enumerate(group.layers)}
    made |= {layer: made[owner] for layer, owner in spec.shared}
    return [made[layer] for layer in sorted(made)]
