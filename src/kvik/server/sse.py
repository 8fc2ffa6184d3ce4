"""Server-sent events, and the end of those who read them (https://html.spec.whatwg.org/multipage/server-sent-events)."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.types import Receive

encode = msgspec.json.Encoder().encode


def event(data: Any, name: str | None = None) -> bytes:
    """One event, whose data are JSON."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + encode(data) + b"\n\n"


async def left(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
