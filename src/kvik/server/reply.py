"""What a generation is answered with: a stream of events, or one body when all is written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kvik.server.bodies import json_response
from kvik.server.errors import api_error, client_left
from kvik.server.event_stream import EventStream, EventWriter
from kvik.server.generation import Running, unless_client_leaves
from kvik.server.state import ServerState


async def reply(
    request: Request,
    running: Running,
    headers: dict[str, str],
    *,
    writer: EventWriter | None,
    whole: Callable[[], dict[str, Any]],
) -> Response | EventStream:
    """A stream by `writer`, where there is one, else what `whole` makes; whatever it is ends when the client leaves."""
    if writer is not None:
        return EventStream(running, writer, ping_s=ServerState.of(request).config.ping_s, headers=headers)
    try:
        with running.stream:
            if await unless_client_leaves(request, asyncio.ensure_future(_whole(running))) is None:
                raise client_left()
    except Exception as error:
        raise api_error(error, running.generation.fields) from error
    finally:
        for told in running.generation.on_end:
            told(running)
    # Of a long answer with logprobs it takes a while.
    return await asyncio.to_thread(
        lambda: json_response(whole(), headers={"server-timing": running.server_timing(), **headers})
    )


async def _whole(running: Running) -> bool:
    await running.wait()
    running.completions()  # raises what went wrong
    await running.settle()
    return True
