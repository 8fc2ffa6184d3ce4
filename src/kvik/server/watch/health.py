"""Whether the server and its engines live: for load balancers, and for streams that would wait for ever."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Literal, get_args

from starlette.requests import Request
from starlette.responses import Response

from kvik.errors import EngineHung
from kvik.server.bodies import json_response
from kvik.server.errors import RETRY_AFTER_S
from kvik.server.served import ServedModel
from kvik.server.state import ServerState

log = logging.getLogger(__name__)

Condition = Literal["ok", "full", "loading", "draining", "hung", "dead"]

WATCH_S = 1.0
"""How often engines are looked after."""

SLOWEST = 15e9
"""Bytes of weights times tokens that the slowest machine gets through in a second, before any step was measured."""


def hang_limit_s(served: ServedModel, hang_s: float) -> float:
    """How long one step may take: a step is bounded by the token budget, and so is its time on this machine."""
    engine = served.llm.engine
    token_s = engine.runner.step_bytes(1, 1) / SLOWEST
    if engine.prefill_token_s is not None:
        token_s = 4 * engine.prefill_token_s
    return max(hang_s, token_s * engine.config.token_budget)


def condition_of(served: ServedModel, hang_s: float) -> Condition:
    """How its engine is."""
    if not served.is_healthy:
        return "dead"
    return "hung" if served.async_llm.silent_s > hang_limit_s(served, hang_s) else "ok"


def condition(state: ServerState) -> tuple[Condition, dict[str, Condition]]:
    """How the server is, and each of its models."""
    found = {served.id: condition_of(served, state.config.hang_s) for served in state.models}
    own: Condition = "draining" if state.is_draining else "loading" if state.is_loading else "ok"
    return max((own, *found.values()), key=get_args(Condition).index), found


async def health(request: Request) -> Response:
    """Whether it lives: 200, or 503 while the models are loaded or the server drains, or an engine is dead or hangs."""
    return _answer(*condition(ServerState.of(request)))


async def ready(request: Request) -> Response:
    """Whether a new request to any model would be taken: 503 also where a model's queue is full."""
    state = ServerState.of(request)
    status, found = condition(state)
    for served in state.models:
        if found[served.id] == "ok" and served.llm.engine.scheduler.is_full:
            found[served.id] = "full"
            status = "full" if status == "ok" else status
    return _answer(status, found)


async def decode_health(request: Request) -> Response:
    """As `/health`, and 503 also where completions have begun and none gets a token; a long prompt is no stall."""
    state = ServerState.of(request)
    status, found = condition(state)
    for served in state.models:
        last_s, limit_s = served.meter.last_token_s, hang_limit_s(served, state.config.hang_s)
        if served.meter.is_decoding and last_s is not None and time.perf_counter() - last_s > limit_s:
            status = found[served.id] = "hung"
    return _answer(status, found)


def _answer(status: Condition, models: dict[str, Condition]) -> Response:
    is_well = status == "ok"
    headers = {"cache-control": "no-store"} | ({} if is_well else {"retry-after": str(RETRY_AFTER_S)})
    return json_response({"status": status, "models": models}, 200 if is_well else 503, headers)


async def watch(state: ServerState) -> None:
    """For ever: end the streams of an engine that hangs, and say so once.

    Where this wakes far too late, the whole process stood still (a container that was paused, a laptop that slept), and
    its steps could not end either: their time begins again.
    """
    told: set[str] = set()
    interval_s = min(WATCH_S, state.config.hang_s / 4)
    looked_s, resumed_s = time.monotonic(), -math.inf
    while True:
        await asyncio.sleep(interval_s)
        now_s = time.monotonic()
        if now_s - looked_s > 3 * interval_s:
            resumed_s = now_s
        looked_s = now_s
        for served in state.models:
            is_excused = now_s - resumed_s < hang_limit_s(served, state.config.hang_s)
            if is_excused or condition_of(served, state.config.hang_s) != "hung":
                told.discard(served.id)
                continue
            silent_s = served.async_llm.silent_s
            if served.id not in told:
                log.critical("%s: the engine hangs: its step takes %.0f s already", served.id, silent_s)
                told.add(served.id)
            served.async_llm.fail_all(
                EngineHung(
                    f"the engine has shown no life for {silent_s:.0f} s", hint="the server must be started again"
                )
            )
