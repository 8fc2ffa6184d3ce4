"""What fits into some memory, and what would have to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kvik.planner.memory import activation_bytes, kv_memory, table_bytes, weight_memory
from kvik.planner.shape import ModelShape
from kvik.planner.weights import FORMATS, WeightFormat

MAX_USERS = 1 << 20
MAX_DEVICES = 64


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be served."""

    shape: ModelShape
    context: int
    users: int
    prefix: int
    kv_dtype: str
    weights: WeightFormat | None  # None: as the model's file has them

    @property
    def num_bytes(self) -> int:
        """Weights (where known), keys and values, a step's intermediate results and tables."""
        rest = activation_bytes(self.shape, self.context, self.users) + table_bytes(self.shape, self.context)
        return self.weight_bytes + self.kv_bytes + rest

    @property
    def weight_bytes(self) -> int:
        """Of the weights, 0 where they are not known."""
        weights = weight_memory(self.shape, self.weights)
        return 0 if weights is None else weights.held_bytes

    @property
    def kv_bytes(self) -> int:
        """Of the cache, as the engine would allocate it."""
        return kv_memory(self.shape, self.kv_dtype, self.context, users=self.users, prefix=self.prefix).num_bytes


@dataclass(frozen=True, slots=True)
class Change:
    """Something that may be changed so that it fits."""

    what: str
    num_bytes: int  # needed then, on each device
    costs_quality: bool


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits into `memory_bytes`."""

    where: str
    memory_bytes: int
    needed_bytes: int
    largest_context: int | None  # for as many users; 0: none; None: not known, as the weights are not
    most_users: int | None  # of the same context; likewise
    change: Change | None  # the cheapest that makes it fit; None: it fits, or nothing would do
    weights_known: bool = True

    @property
    def fits(self) -> bool | None:
        """Whether all of it fits; `None` where that hangs on the weights, and it is not known how many they are."""
        if self.needed_bytes > self.memory_bytes:
            return False
        return True if self.weights_known else None

    @property
    def spare_bytes(self) -> int:
        """What is left, without the weights where they are not known; below 0, what is missing at least."""
        return self.memory_bytes - self.needed_bytes


def fit(load: Load, where: str, memory_bytes: int) -> Fit:
    """What of this load fits, and what to change if it does not."""

    def fits(other: Load) -> bool:
        return other.num_bytes <= memory_bytes

    def shorter(context: int) -> Load:
        return replace(load, context=context, prefix=min(load.prefix, max(0, context - 1)))

    known, change = weight_memory(load.shape, load.weights) is not None, None
    if known and not fits(load):
        change = next((one for one in _changes(load, memory_bytes) if one.num_bytes <= memory_bytes), None)
    return Fit(
        where=where,
        memory_bytes=memory_bytes,
        needed_bytes=load.num_bytes,
        largest_context=_largest(lambda context: fits(shorter(context)), load.shape.max_context) if known else None,
        most_users=_largest(lambda users: fits(replace(load, users=users)), MAX_USERS) if known else None,
        change=change,
        weights_known=known,
    )


def _changes(load: Load, memory_bytes: int) -> Iterator[Change]:
    """What may be changed, cheapest first: what loses least of the answers, then what serves less, then what is bought.

    Smaller keys and values come before smaller weights, and both before fewer users and shorter contexts.
    """
    small = "int8" if "int8" in load.shape.kv_dtypes else "f16"
    dtypes: list[str] = [load.kv_dtype]
    if load.kv_dtype == "f32":
        dtypes.append("f16")
    if small == "int8" and load.kv_dtype != "int8":
        dtypes.append("int8")
    now = weight_memory(load.shape, load.weights)
    smaller = [
        form
        for form in FORMATS.values()
        if now is not None
        and (weights := weight_memory(load.shape, form)) is not None
        and weights.held_bytes < now.held_bytes
    ]
    sizes: list[int] = []
    for form in (None, *smaller):
        changed = load if form is None else replace(load, weights=form)
        if form is not None and any(changed.weight_bytes >= size for size in sizes):
            continue  # a better format takes no more
        sizes.append(changed.weight_bytes)
        for dtype in dtypes:
            if form is None and dtype == load.kv_dtype:
                continue
            parts = [f"{dtype} keys and values"] if dtype != load.kv_dtype else []
            parts += [f"{form.name} weights"] if form else []
            is_lossy = "int8" in dtype or (form is not None and form.quantized)
            yield Change(" and ".join(parts), replace(changed, kv_dtype=dtype).num_bytes, is_lossy)
    for other, what in _less(load, memory_bytes):
        yield Change(what, other.num_bytes, False)
    for num_devices in range(2, MAX_DEVICES + 1):
        yield Change(f"{num_devices} such devices, each with a part", -(-load.num_bytes // num_devices), False)


def _less(load: Load, memory_bytes: int) -> Iterator[tuple[Load, str]]:
    """Fewer users, then one with a shorter context."""
    users = _largest(lambda number: replace(load, users=number).num_bytes <= memory_bytes, load.users)
    if users:
        yield replace(load, users=users), f"{users:,} users at once, the others wait" if users > 1 else "one user"
    one = replace(load, users=1, prefix=0)
    context = _largest(lambda number: replace(one, context=number).num_bytes <= memory_bytes, load.context)
    if context:
        yield replace(one, context=context), f"one user and a context of {context:,}"


def _largest(fits: Callable[[int], bool], maximum: int) -> int:
    """The largest number from 1 to `maximum` that fits, where each smaller one does too; 0 where none does."""
    low, high = 0, maximum
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
