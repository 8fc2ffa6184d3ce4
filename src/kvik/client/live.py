"""What a kvik server tells of its models: everything first, then what changes, kept up here as its page does."""

from __future__ import annotations

import base64
import binascii
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec

RATE_S = 5.0
"""Rates are means over the last seconds, so many."""

MISS = "miss_"
"""Begins the names of counters by miss reason."""

FREE, REUSABLE, HELD, SHARED = range(4)
STORED = 0x80
_LOOKS = bytes(SHARED if each >= 4 else HELD if each >= 2 else REUSABLE if each else FREE for each in range(STORED)) * 2

Counters = dict[str, int | float]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence of a request; times are by the server's clock, and text is None where it is not told."""

    key: int
    request_id: str = ""
    choice: int = 0
    kind: str = ""
    phase: str = "queued"
    is_own: bool = False
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    num_written_tokens: int = 0
    max_total_tokens: int | None = None
    num_preemptions: int = 0
    kv_bytes: int = 0
    miss_reason: str | None = None
    finish_reason: str | None = None
    error: str | None = None
    submitted_s: float | None = None
    begun_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    prompt: str | None = None
    written: str | None = None
    blocks: list[list[int]] = []  # of each group of layers
    first_blocks: list[int] = []  # where each group's begin among the sequence's

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.phase == "done"

    @property
    def num_blocks(self) -> int:
        """Those of all groups that it holds."""
        return sum(map(len, self.blocks))

    @property
    def time_to_first_token_s(self) -> float | None:
        """From its arrival."""
        if self.first_token_s is None or self.submitted_s is None:
            return None
        return self.first_token_s - self.submitted_s

    @property
    def time_per_token_s(self) -> float | None:
        """Of each token after the first."""
        if self.first_token_s is None or self.last_token_s is None or self.num_written_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_written_tokens - 1)


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """A group of layers, which has a pool of blocks."""

    kind: str
    layers: int
    block_bytes: int
    num_blocks: int
    window: int | None = None


class History(msgspec.Struct, frozen=True):
    """Counters of the past; the first column is the time."""

    names: list[str]
    rows: list[list[int | float]]


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What stays as it is while a model is served."""

    id: str
    is_chat: bool
    context: int
    block_size: int
    token_bytes: int
    kv_dtype: str
    num_bytes: int
    weight_bytes: int
    groups: list[Group]


class _ToldModel(Description, frozen=True, kw_only=True):
    states: list[str]
    requests: list[dict[str, Any]]
    counters: Counters
    history: History


class _ToldState(msgspec.Struct, frozen=True):
    now_s: float
    sees_text: bool
    models: list[_ToldModel]


class _ChangedModel(msgspec.Struct, frozen=True):
    id: str
    counters: Counters
    blocks: list[tuple[list[int], list[int]]]
    requests: list[dict[str, Any]]
    gone: list[int]


class _ToldChange(msgspec.Struct, frozen=True):
    now_s: float
    models: list[_ChangedModel]


_decode_state = msgspec.json.Decoder(_ToldState).decode
_decode_change = msgspec.json.Decoder(_ToldChange).decode


class NotTold(Exception):
    """An event is none of those that a kvik server tells its state by."""


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """The blocks of a group; held, reusable and free are all of them."""

    held: int
    shared: int  # of those held, by more than one
    reusable: int
    free: int


class LiveModel:
    """One model as it was last told of."""

    def __init__(self, description: Description, states: list[bytearray]) -> None:
        self.description = description
        self.states = states  # of each group, as `/v1/events` tells them
        self.requests: dict[int, Request] = {}  # by their keys
        self.counters: Counters = {}
        self._samples: deque[tuple[float, Counters]] = deque()

    @property
    def hit_rate(self) -> float | None:
        """Of all prompt tokens, those that were found in the cache."""
        queried = self.counters.get("queried_tokens", 0)
        return self.counters.get("found_tokens", 0) / queried if queried else None

    @property
    def misses(self) -> dict[str, int]:
        """How many matches ended for each reason, the commonest first."""
        found = [(name.removeprefix(MISS), int(n)) for name, n in self.counters.items() if name.startswith(MISS) and n]
        return dict(sorted(found, key=lambda reason: (-reason[1], reason[0])))

    @property
    def ordered_requests(self) -> list[Request]:
        """Those that run, those that wait, then those that have ended, of which the newest come first."""
        unfinished = [each for each in self.requests.values() if not each.is_ended]
        unfinished.sort(key=lambda each: (each.phase == "queued", each.key))
        ended = [each for each in self.requests.values() if each.is_ended]
        ended.sort(key=lambda each: (each.last_token_s or each.submitted_s or 0.0, each.key), reverse=True)
        return unfinished + ended

    def looks(self, group: int) -> bytes:
        """A byte for each block: `FREE`, `REUSABLE`, `HELD` or `SHARED`, which is held by more than one."""
        return bytes(self.states[group]).translate(_LOOKS)

    def block_counts(self, group: int) -> BlockCounts:
        """How many are in which state."""
        looks = self.looks(group)
        num_shared = looks.count(SHARED)
        return BlockCounts(looks.count(HELD) + num_shared, num_shared, looks.count(REUSABLE), looks.count(FREE))

    def rate(self, name: str) -> float | None:
        """How fast a counter has grown lately, a second; None where that is not known yet."""
        if len(self._samples) < 2:
            return None
        (first_s, first), (last_s, last) = self._samples[0], self._samples[-1]
        return (last.get(name, 0) - first.get(name, 0)) / (last_s - first_s)

    def take_counters(self, now_s: float, counters: Counters) -> None:
        """The counters as they are at a time."""
        self.counters, samples = counters, self._samples
        if samples and now_s <= samples[-1][0]:
            return
        samples.append((now_s, counters))
        while samples[0][0] < now_s - RATE_S and len(samples) > 2:
            samples.popleft()

    def take_rows(self, rows: list[dict[str, Any]]) -> None:
        """What is new of requests; what is not said of one stays as it was. Raises `NotTold`."""
        try:
            for row in rows:
                before = self.requests.get(row["key"])
                known = {} if before is None else msgspec.structs.asdict(before)
                self.requests[row["key"]] = msgspec.convert(known | row, Request)
        except (KeyError, TypeError, msgspec.ValidationError) as error:
            raise NotTold(f"a request is none: {error}") from None


@dataclass(slots=True)
class LiveState:
    """All models of a server, by their names; empty until the first event."""

    models: dict[str, LiveModel] = field(default_factory=dict)
    sees_text: bool = True
    now_s: float = 0.0  # by the server's clock, when the last event was made
    num_events: int = 0

    def take(self, name: bytes, data: bytes) -> None:
        """Follow one event; those of other names are none of this. Raises `NotTold`."""
        try:
            if name == b"state":
                self._take_state(_decode_state(data))
            elif name == b"change":
                self._take_change(_decode_change(data))
            else:
                raise NotTold(f"its name is {name!r:.40}")
        except (msgspec.DecodeError, RecursionError) as error:
            raise NotTold(str(error)) from None
        self.num_events += 1

    def _take_state(self, told: _ToldState) -> None:
        self.now_s, self.sees_text = told.now_s, told.sees_text
        self.models = {each.id: _new_model(each, told.now_s) for each in told.models}

    def _take_change(self, told: _ToldChange) -> None:
        self.now_s = told.now_s
        for change in told.models:
            model = self.models.get(change.id)
            if model is None or len(change.blocks) != len(model.states):
                raise NotTold(f"it changes {change.id!r:.80}, which is not told of so")
            for states, (block_ids, changed) in zip(model.states, change.blocks, strict=True):
                _set_states(states, block_ids, changed)
            model.take_rows(change.requests)
            for key in change.gone:
                model.requests.pop(key, None)
            model.take_counters(told.now_s, change.counters)


def _new_model(told: _ToldModel, now_s: float) -> LiveModel:
    try:
        states = [bytearray(base64.b64decode(text, validate=True)) for text in told.states]
    except binascii.Error as error:
        raise NotTold(f"states of blocks are none: {error}") from None
    if [len(each) for each in states] != [group.num_blocks for group in told.groups]:
        raise NotTold(f"{told.id!r:.80} has not as many blocks as states of some")
    names = Description.__struct_fields__
    model = LiveModel(Description(**{name: getattr(told, name) for name in names}), states)
    model.take_rows(told.requests)
    for at_s, *counts in told.history.rows:
        if now_s - 2 * RATE_S < at_s < now_s:
            model.take_counters(at_s, dict(zip(told.history.names[1:], counts, strict=False)))
    model.take_counters(now_s, told.counters)
    return model


def _set_states(states: bytearray, block_ids: list[int], changed: list[int]) -> None:
    if len(block_ids) != len(changed):
        raise NotTold(f"{len(block_ids):,} blocks have {len(changed):,} states")
    for block_id, state in zip(block_ids, changed, strict=True):
        if not (0 <= block_id < len(states) and 0 <= state < 256):
            raise NotTold(f"block {block_id} of {len(states):,} has state {state}")
        states[block_id] = state
