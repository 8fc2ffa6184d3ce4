"""`/v1/race`: one prompt answered without the KV cache and with it, side by side, as `kvik race` does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from threading import Event
from typing import Annotated, Any

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvik.cache import KVCacheSpec
from kvik.config import SamplingParams
from kvik.measure.lanes import RaceLane, compare, make_lanes, run_race
from kvik.models.work import StepWork
from kvik.server.bodies import read_body
from kvik.server.cache.match_route import MAX_PROMPT, token_ids_of
from kvik.server.errors import ApiError, api_error
from kvik.server.fields import Body
from kvik.server.live.event_answer import EventAnswer
from kvik.server.openai.chat_input import ChatMessage
from kvik.server.served import ServedModel
from kvik.server.sse import event
from kvik.server.state import ServerState

MAX_COMPUTED = 1 << 16
"""Tokens that the lane without the cache may compute."""

INTERVAL_S = 0.1
"""Between two messages."""

MIN_KV_BYTES = 1 << 20

Lanes = tuple[RaceLane, RaceLane]


class RaceRequest(Body, frozen=True, kw_only=True):
    """What both lanes answer, greedily."""

    model: str | None = None
    prompt: Annotated[str, Meta(max_length=MAX_PROMPT)] | None = None
    messages: list[ChatMessage] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=512)] = 64


async def race(request: Request) -> Response | RaceAnswer:
    """Answer a prompt without the cache and with it, and stream what each lane has and what it took."""
    state = ServerState.of(request)
    body = await read_body(request, RaceRequest)
    served = state.models.get(body.model)
    if state.config.read_only:
        raise ApiError(403, "this server can be watched, not raced", code="read_only")
    if state.live.racing.locked():
        raise ApiError(429, "a race is on already (hint: try again when it is over)", code="rate_limit_exceeded")
    await state.live.racing.acquire()
    try:
        lanes = await asyncio.to_thread(_lanes, served, body)
    except BaseException as error:
        state.live.racing.release()
        if isinstance(error, Exception):
            raise api_error(error, frozenset(RaceRequest.__struct_fields__)) from error
        raise
    return RaceAnswer(state, lanes)


def _lanes(served: ServedModel, body: RaceRequest) -> Lanes:
    prompt_ids = token_ids_of(served, body.prompt, body.messages)
    num_prompt, num_written = len(prompt_ids), body.max_tokens
    num_computed = num_prompt * num_written + num_written * (num_written - 1) // 2
    if num_computed > MAX_COMPUTED:
        raise ApiError(
            400,
            f"without the cache {num_written:,} tokens after {num_prompt:,} take {num_computed:,} computed tokens, a"
            f" race may take {MAX_COMPUTED:,} (hint: lower max_tokens, or shorten the prompt)",
            code="work_limit_exceeded",
            param="max_tokens",
        )
    kv_bytes = race_kv_bytes(served.llm.engine.kv_spec, num_prompt + num_written)
    params = SamplingParams(max_tokens=num_written, ignore_eos=True)
    return make_lanes(served.llm, prompt_ids, params, kv_memory=kv_bytes)


def race_kv_bytes(spec: KVCacheSpec, num_tokens: int) -> int:
    """Enough for one sequence of so many tokens, and a few more blocks."""
    return max(MIN_KV_BYTES, 4 * spec.held_bytes(num_tokens + spec.block_size))


class RaceAnswer(EventAnswer):
    """`lanes` as they go, and a `verdict`, which has them too."""

    def __init__(self, state: ServerState, lanes: Lanes) -> None:
        self._state = state
        self._lanes = lanes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream; when it ends, the lanes are still, and another race may begin."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._state.live.racing.release()

    async def messages(self) -> AsyncIterator[bytes]:
        """Messages until both are done."""
        loop, news, is_over = asyncio.get_running_loop(), asyncio.Event(), Event()
        shown_s = 0.0

        def show() -> None:
            nonlocal shown_s
            if time.monotonic() - shown_s >= INTERVAL_S:
                shown_s = time.monotonic()
                loop.call_soon_threadsafe(news.set)

        def should_stop() -> bool:
            return is_over.is_set() or self._state.is_draining

        running = asyncio.ensure_future(asyncio.to_thread(run_race, self._lanes, show, should_stop))
        running.add_done_callback(lambda _: news.set())
        try:
            while not running.done():
                yield event(self._told(), "lanes")
                await news.wait()
                news.clear()
            await running
            verdict = compare(*self._lanes)
            yield event({**self._told(), **asdict(verdict), "is_same": verdict.is_same}, "verdict")
        finally:
            is_over.set()
            await asyncio.wait((running,))

    def _told(self) -> dict[str, Any]:
        return {"lanes": [_told(lane) for lane in self._lanes]}


def _told(lane: RaceLane) -> dict[str, Any]:
    work = sum((cost.work for cost in list(lane.costs)), StepWork())
    return {
        "name": lane.name,
        "text": lane.sequence.text.text,
        "num_prompt_tokens": lane.sequence.num_prompt_tokens,
        "num_tokens": lane.num_tokens,
        "num_computed_tokens": work.num_tokens,
        "multiply_adds": work.multiply_adds,
        "read_bytes": work.read_bytes,
        "kv_bytes": lane.kv_kept_bytes,
        "seconds": lane.elapsed_s,
        "first_token_s": lane.time_to_first_token_s,
    }
