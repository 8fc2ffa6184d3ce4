"""Server-sent events that end when nobody reads them any more."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

from starlette.types import Receive, Scope, Send

from kvik.server.sse import left

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)


class EventAnswer(ABC):
    """The ASGI answer: what `messages` gives, until that is all or the one who reads leaves."""

    @abstractmethod
    def messages(self) -> AsyncIterator[bytes]:
        """Whole events; closed in any case."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream."""
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                await writing
        finally:
            writing.cancel()
            leaving.cancel()
            await asyncio.wait((writing, leaving))

    async def _write(self, send: Send) -> None:
        messages = self.messages()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
            async for each in messages:
                await send({"type": "http.response.body", "body": each, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await messages.aclose()  # type: ignore[attr-defined]  # it is a generator
