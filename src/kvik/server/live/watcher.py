"""What changes in one engine while somebody looks: an observer that notes it, and a copy of the state for newcomers."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from kvik.cache.block_pool import BlockPool
from kvik.cache.tables import packed
from kvik.engine.engine import Engine
from kvik.engine.events import StepEvent
from kvik.engine.sequence import Sequence
from kvik.engine.store_tier import StoreTier

if TYPE_CHECKING:
    from kvik.server.served import ServedModel

MAX_ENDED = 256
"""Requests that are told of after their end."""

MAX_FLASHES = 1024
"""Evictions, and copies, that one message names."""

MAX_PROMPT_TOKENS = 1 << 21
"""Of all requests that are told of, kept so that a whole prompt can be asked for; the oldest go first."""

MAX_REF_COUNT, STORED = 63, 0x80
TEXT_TOKENS, TEXT_LETTERS = 48, 160

_keys = itertools.count(1)

Row = dict[str, Any]


@dataclass(slots=True)
class Told:
    """A request as it was last told of."""

    tenant: str | None
    salt: str | None
    row: Row
    prompt: bytes = b""  # its token ids, an int32 each, of a request's first choice while they are kept
    blocks: list[list[int]] = field(default_factory=list)  # of each group of layers
    first_blocks: list[int] = field(default_factory=list)  # where each group's begin among the sequence's

    def whole(self) -> Row:
        """All that was told."""
        return self.row | {"blocks": self.blocks, "first_blocks": self.first_blocks}


@dataclass(slots=True)
class Change:
    """What has changed in an engine since the change before."""

    blocks: list[dict[int, int]]  # of each group, the new state of each block
    hits: dict[int, int] = field(default_factory=dict)  # requests that blocks were read back for, where others came
    rows: list[tuple[Told, Row]] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)  # keys of requests that are not told of any more
    evicted: list[int] = field(default_factory=list)
    copied: list[tuple[int, int, int]] = field(default_factory=list)  # source, target, which of the pools


def _nobody() -> None:
    """There is nobody who would want to know."""


def state_of(pool: BlockPool, block_id: int) -> int:
    """A block in one byte: its holds, twice, and 1 if its content is kept without any; `STORED` where it is on disk."""
    return min(pool.ref_count(block_id), MAX_REF_COUNT) << 1 | pool.is_named(block_id)


class ModelWatch:
    """The observer of one engine, and what it saw.

    The engine's thread notes what each step changes, with the engine's lock held. The event loop takes that a few times
    a second, behind a lock of the watch's own that is held for microseconds: it never waits for a step.
    """

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.states: list[bytearray] = []  # of all blocks, a byte each, by group; as far as it was taken
        self.told: dict[int, Told] = {}  # requests by their keys, the oldest first
        self.on_news: Callable[[], None] = _nobody  # called by the engine's thread after each step
        self._key_of: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()
        self._lock = Lock()
        self._pools: list[BlockPool] = []
        self._tier: StoreTier | None = None
        self._fresh = Change([])
        self._touched: dict[Sequence, None] = {}
        self._num_prompt_bytes = 0

    @property
    def engine(self) -> Engine:
        """That of the model."""
        return self.served.llm.engine

    def begin(self) -> None:
        """Look at everything once, and watch from now on; it may wait for a step."""
        with self.engine.lock:
            self._look_at_all()
            self.states = [bytearray(states[at] for at in range(len(states))) for states in self._fresh.blocks]
            self._fresh = Change([{} for _ in self._pools])
        self.engine.add_observer(self)

    def end(self) -> None:
        """Watch no more; it may wait for a step."""
        self.engine.remove_observer(self)
        with self.engine.lock:
            for pool in self._pools:
                pool.changed = None
            if self._tier is not None:
                self._tier.newly_stored = None
        self._tier, self._pools, self.states, self.told, self._touched = None, [], [], {}, {}
        self._key_of.clear()
        self._num_prompt_bytes = 0

    def __call__(self, event: StepEvent) -> None:
        """Note what a step changed."""
        with self._lock:
            if event.batch is not None:
                self._touched.update((item.sequence, None) for item in event.batch.items)
            self._touched.update(dict.fromkeys(event.begun))
            self._touched.update(dict.fromkeys(event.ended))
            self._touched.update(dict.fromkeys(event.preempted))
            fresh = self._fresh
            fresh.evicted += event.blocks.evicted[: MAX_FLASHES - len(fresh.evicted)]
            fresh.hits |= self.served.hits.latest
            twins, copies = self.engine.cache.twins, event.blocks.copied[: MAX_FLASHES - len(fresh.copied)]
            fresh.copied += [(copy.source, copy.target, twins.pool_index(copy.group)) for copy in copies]
            self._note_blocks()
        self.on_news()

    def look_if_idle(self) -> None:
        """Note what has changed without a step, such as pins that ended; nothing where that would have to wait."""
        if self.engine.lock.try_to_take():
            with self.engine.lock.take(), self._lock:
                self._note_blocks()

    def _look_at_all(self) -> None:
        cache = self.engine.cache
        self._pools = cache.twins.pools
        for pool in self._pools:
            pool.changed = set()
        self._tier = self.engine.tier
        if self._tier is not None:
            self._tier.newly_stored = deque()
        self._fresh = Change([{at: self._state(pool, at) for at in range(pool.num_blocks)} for pool in self._pools])

    def _note_blocks(self) -> None:
        if self._pools and self._pools[0] is not self.engine.cache.pool:  # it was reset, and has new ones
            hits = self._fresh.hits
            self._look_at_all()
            self._fresh.hits = hits
        for pool, states in zip(self._pools, self._fresh.blocks, strict=True):
            if pool.changed:
                states.update((block_id, self._state(pool, block_id)) for block_id in pool.changed)
                pool.changed.clear()
        while self._tier is not None and self._tier.newly_stored:  # it grows meanwhile, in the writer's thread
            block_id = self._tier.newly_stored.popleft()
            self._fresh.blocks[0][block_id] = self._state(self._pools[0], block_id)

    def _state(self, pool: BlockPool, block_id: int) -> int:
        """That of a block; the first group's also has whether it is stored, as far as the tier knows."""
        state = state_of(pool, block_id)
        if self._tier is None or pool is not self._pools[0]:
            return state
        digest = self.engine.cache.tree.digest_of(block_id)
        return state if digest is None or not self._tier.is_stored(digest) else state | STORED

    def take(self) -> Change:
        """What is new since the last time, for the event loop; `states` and `told` are then as new."""
        with self._lock:
            change, self._fresh = self._fresh, Change([{} for _ in self._pools])
            touched, self._touched = self._touched, {}
        for states, changed in zip(self.states, change.blocks, strict=True):
            for block_id, state in changed.items():
                states[block_id] = state
        unfinished = list(self.engine.scheduler.unfinished)
        touched.update((each, None) for each in unfinished if each not in self._key_of)
        for sequence in touched:
            self._tell(sequence, change)
        num_ended = len(self.told) - len(unfinished)
        if num_ended > MAX_ENDED:
            ended = [key for key, told in self.told.items() if told.row["phase"] == "done"]
            change.gone += ended[: num_ended - MAX_ENDED]
            for key in change.gone:
                self._num_prompt_bytes -= len(self.told.pop(key).prompt)
            change.rows = [(known, row) for known, row in change.rows if row["key"] in self.told]
        return change

    def _tell(self, sequence: Sequence, change: Change) -> None:
        key = self._key_of.get(sequence)
        if key is not None and key not in self.told:  # its end was told, and is forgotten
            return
        held = self.engine.cache.twins.of_table(sequence.table)
        blocks, first_blocks = [list(one.block_ids) for one in held], [one.first for one in held]
        row = self._row(sequence, is_waiting=not blocks[0])
        if key is None:
            key = self._key_of[sequence] = next(_keys)
            row |= self._fixed(sequence)
            self._keep_prompt(sequence, key)
        known = self.told[key]
        row["key"] = key
        known.row |= row
        if known.blocks != blocks or known.first_blocks != first_blocks:
            known.blocks, known.first_blocks = blocks, first_blocks
            row |= {"blocks": blocks, "first_blocks": first_blocks}
        change.rows.append((known, row))

    def _keep_prompt(self, sequence: Sequence, key: int) -> None:
        prompt = b"" if sequence.branch else packed(sequence.request.prompt_ids)
        self.told[key] = Told(self.served.tenants.get(sequence), sequence.request.salt, {}, prompt)
        self._num_prompt_bytes += len(prompt)
        for each in self.told.values():
            if self._num_prompt_bytes <= 4 * MAX_PROMPT_TOKENS:
                break
            self._num_prompt_bytes -= len(each.prompt)
            each.prompt = b""

    def _fixed(self, sequence: Sequence) -> Row:
        """What stays as it is."""
        request = sequence.request
        return {
            "request_id": request.request_id,
            "choice": sequence.branch,
            "kind": request.kind,
            "num_prompt_tokens": sequence.num_prompt_tokens,
            "max_total_tokens": request.max_total_tokens,
            "prompt": self._text(list(request.prompt_ids[-TEXT_TOKENS:])),
        }

    def _text(self, token_ids: list[int]) -> str:
        return self.engine.model.tokenizer.decode(token_ids, skip_special=False)[-TEXT_LETTERS:]

    def _row(self, sequence: Sequence, *, is_waiting: bool) -> Row:
        costs = sequence.costs
        phase = "decode" if costs.first_token_s is not None else "prefill"
        if sequence.finish_reason is not None:
            phase = "done"
        elif is_waiting:
            phase = "queued"
        return {
            "phase": phase,
            "num_cached_tokens": costs.num_cached_tokens,
            "num_computed_tokens": costs.num_computed_tokens,
            "num_written_tokens": sequence.num_completion_tokens,
            "kv_bytes": costs.kv_bytes,
            "num_preemptions": costs.num_preemptions,
            "miss_reason": None if costs.miss_reason is None else costs.miss_reason.name.lower(),
            "submitted_s": costs.submitted_s,
            "begun_s": costs.begun_s,
            "first_token_s": costs.first_token_s,
            "last_token_s": costs.last_token_s,
            "finish_reason": sequence.finish_reason,
            "error": None if sequence.error is None else type(sequence.error).__name__,
            "written": "".join(sequence.text.parts[-TEXT_TOKENS:])[-TEXT_LETTERS:],
        }

    def description(self) -> dict[str, Any]:
        """What never changes of it."""
        engine, spec = self.engine, self.engine.kv_spec
        num_full_layers = sum(spec.groups[group].num_layers for group in spec.full_groups)
        full: dict[str, Any] = {"kind": "full", "layers": num_full_layers, "block_bytes": spec.block_bytes}
        windows = [
            {
                "kind": "window",
                "window": each.spec.window,
                "layers": each.spec.num_layers,
                "block_bytes": each.block_bytes,
            }
            for each in engine.cache.twins.groups
        ]
        return {
            "id": self.served.id,
            "is_chat": self.served.llm.is_chat_model,
            "context": engine.model.context,
            "block_size": spec.block_size,
            "token_bytes": spec.token_bytes,
            "kv_dtype": spec.dtype,
            "num_bytes": self.served.llm.cache.num_bytes,
            "weight_bytes": engine.model.decoder.weights.num_bytes,
            "groups": [
                {**told, "num_blocks": len(states)} for told, states in zip([full, *windows], self.states, strict=True)
            ],
        }


def now_s() -> float:
    """The clock of all times in rows."""
    return time.perf_counter()
