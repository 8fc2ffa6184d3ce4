"""Cache breakpoints: what a prompt has up to a place stays in the cache for a time, to the token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvik.cache import packed
from kvik.engine.sequence import Sequence as Written
from kvik.errors import CacheTooSmall, InvalidInput
from kvik.server.cache.pins import Pin, PinTooLarge, parse_ttl
from kvik.server.generation import Generation, Running, give_back_leases
from kvik.server.state import ServerState

DEFAULT_TTL = "30m"
MAX_WRITTEN = 4
"""Breakpoints that one request writes; the implicit one, which is what the prefix cache does anyway, is one of them."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The end of a part of a message, where the prompt is to be kept up to."""

    message: int  # of the prompt's
    part: int  # 0 where the content is plain text
    param: str  # of the request, such as `messages[0].content[1]`
    ttl: str | None = None


FindEnds = Callable[[Sequence[tuple[int, int]]], Sequence[int | None]]
"""How many of the prompt's tokens stand before the end of each part (message, part); None where nobody knows."""


def with_breakpoints(
    state: ServerState,
    tenant: str | None,
    generation: Generation,
    marks: Sequence[Mark] = (),
    find_ends: FindEnds | None = None,
    *,
    explicit: bool = False,
    ttl: str | None = None,
) -> Generation:
    """The generation, going on from the longest breakpoint that its prompt begins with, and writing those of its own.

    `marks` are in the order of the prompt; `find_ends` is called where there are any. With `explicit` there is no
    implicit breakpoint, and without marks no caching at all. Raises `ApiError`.
    """
    if len(generation.prompts) != 1:
        return generation
    state.kept.pins.sweep()
    default_ttl = DEFAULT_TTL if ttl is None else ttl
    parse_ttl(default_ttl, "prompt_cache_options.ttl")
    ttls = [default_ttl if mark.ttl is None else mark.ttl for mark in marks]
    times_s = [parse_ttl(each, mark.param) for each, mark in zip(ttls, marks, strict=True)]
    options = generation.options.copy()
    if explicit and not marks:
        options["share"] = False
        return replace(generation, options=options)
    lease = options.get("lease")
    if options.get("use_cache", True) and (lease is None or not lease.num_tokens):
        tokens = packed(generation.prompts[0][:-1])
        pin = state.kept.pins.find(generation.served, options.get("salt"), tokens)
        if pin is not None:
            options["lease"] = pin.lease
    if not marks:
        return replace(generation, options=options)
    assert find_ends is not None
    num_skipped = max(0, len(marks) - (MAX_WRITTEN if explicit else MAX_WRITTEN - 1))
    ends = find_ends([(mark.message, mark.part) for mark in marks[num_skipped:]])
    found = [
        Breakpoint(mark.param, each, ttl_s, end)
        for mark, each, ttl_s, end in zip(marks, ttls, times_s, [*([None] * num_skipped), *ends], strict=True)
    ]
    for skipped in found[:num_skipped]:
        skipped.status = "skipped"
    writer = _Writer(state, tenant, found)
    is_held = options.get("hold", False)  # by a session, which gives it back itself
    options["hold"] = True
    return replace(
        generation,
        options=options,
        on_whole=[writer.write, *generation.on_whole],
        on_end=generation.on_end if is_held else [*generation.on_end, give_back_leases],
        extras=[*generation.extras, writer.extras],
    )


@dataclass(slots=True)
class Breakpoint:
    """One of a request's, and what became of it."""

    param: str
    ttl: str
    ttl_s: float
    position: int | None  # tokens of the prompt before it
    status: str = "not_found"
    pin: Pin | None = None
    expires_at: int | None = None

    def told(self) -> dict[str, Any]:
        """What the answer says of it."""
        return {
            "param": self.param,
            "status": self.status,
            "position": self.position,
            "ttl": self.ttl,
            "expires_at": self.expires_at,
        }


class _Writer:
    """Writes the breakpoints of one request when its answer is whole."""

    def __init__(self, state: ServerState, tenant: str | None, breakpoints: Sequence[Breakpoint]) -> None:
        self._state = state
        self._tenant = tenant
        self._breakpoints = breakpoints

    async def write(self, running: Running) -> None:
        """Pin what was computed, and count what was new."""
        await asyncio.to_thread(self._write, running)
        self._state.kept.watch()
        written: dict[str, int] = {}
        counted = running.stream.sequences[0].costs.num_cached_tokens
        for each in self._breakpoints:
            if each.status == "written" and each.position is not None:
                written[each.ttl] = written.get(each.ttl, 0) + max(0, each.position - counted)
                counted = max(counted, each.position)
        running.written_by_ttl = written

    def extras(self, running: Running) -> dict[str, Any]:
        """What became of each."""
        return {"prompt_cache_breakpoints": [each.told() for each in self._breakpoints]}

    def _write(self, running: Running) -> None:
        for each in self._breakpoints:
            if each.position is not None:
                each.status = self._status(running, running.branches[0], each)
        for each in self._breakpoints:
            if each.pin is not None and not each.pin.num_tokens:  # those behind it have pushed it out
                each.status = "over_limit"
            elif each.pin is not None:
                each.expires_at = int(time.time() + each.pin.expires_s - self._state.clock())

    def _status(self, running: Running, branch: Written, each: Breakpoint) -> str:
        pins, served, salt = self._state.kept.pins, running.served, branch.request.salt
        assert each.position is not None
        known = pins.same(served, salt, packed(branch.request.prompt_ids[: each.position]))
        if known is not None:
            pins.refresh(known, each.ttl_s)
            each.pin = known
            return "kept"
        if branch.lease is None or branch.lease.num_tokens < each.position:
            return "not_cached"
        try:
            each.pin = pins.add(
                branch.lease,
                each.position,
                kind="breakpoint",
                served=served,
                tenant=self._tenant,
                salt=salt,
                ttl_s=each.ttl_s,
            )
        except PinTooLarge:
            return "over_limit"
        except CacheTooSmall:
            return "no_room"
        except InvalidInput:  # of a model with windows, where not even a block is full
            return "too_short"
        each.position = len(each.pin.tokens) // 4
        return "written"
