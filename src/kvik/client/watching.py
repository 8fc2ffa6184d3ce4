"""Watching a kvik server: its stream of events, read again where it was broken off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from kvik.client.completions import Server
from kvik.client.http import Address, Connection, EventParser, EventTooLarge, Response
from kvik.client.live import LiveState, NotTold
from kvik.errors import RemoteError

EVENTS_PATH = "/v1/events"
MAX_TOLD_BYTES = 64 << 20
"""Of one event: a byte for each block of a large cache, and the blocks of all that runs."""

AGAIN_S = 1.5
"""Between two attempts to reach a server that was there before."""

LOST_KINDS = ("connect", "disconnected", "timeout")
LOST_STATUSES = (429, 502, 503, 504)
HINT = "see --url: servers that `kvik serve` starts can be watched"


class Watching:
    """One server and its state, as far as it was told."""

    def __init__(self, address: Address, server: Server, *, timeout_s: float) -> None:
        self.address = address
        self.state = LiveState()
        self.lost: RemoteError | None = None  # why the state is not kept up now
        self._server = server
        self._timeout_s = timeout_s

    async def read(self, num_events: int) -> None:
        """Follow so many events, and leave. Raises `RemoteError`."""
        async with aclosing(self._events()) as events:
            async for _ in events:
                if self.state.num_events >= num_events:
                    return

    async def follow(self) -> AsyncGenerator[None]:
        """Keep up the state for ever, and tell of each event, and of each break.

        Raises `RemoteError` for a server that was never there, that refuses, or that is no kvik server.
        """
        while True:
            try:
                async with aclosing(self._events()) as events:
                    async for _ in events:
                        self.lost = None
                        yield
            except RemoteError as error:
                is_lost = error.kind in LOST_KINDS or error.status in LOST_STATUSES
                if not is_lost or not self.state.num_events:
                    raise
                self.lost = error
            yield
            await asyncio.sleep(AGAIN_S)

    async def _events(self) -> AsyncGenerator[None]:
        """One stream, until it is broken off, for which it raises `RemoteError`; its end is none of its own."""
        connection = Connection(self.address, timeout_s=self._timeout_s)
        parser = EventParser(MAX_TOLD_BYTES)
        try:
            response = await self._open(connection)
            while (data := await response.next_data()) is not None:
                for name, event in parser.feed_named(data):
                    self.state.take(name, event)
                    yield
        except NotTold as error:
            raise connection.error("no kvik", f"tells of itself in no way of kvik's: {error}", HINT) from None
        except EventTooLarge:
            raise connection.error("too large", f"sent an event of more than {MAX_TOLD_BYTES:,} bytes") from None
        finally:
            connection.close()
        raise connection.error("disconnected", "ended its events, as a server that stops does")

    async def _open(self, connection: Connection) -> Response:
        try:
            response = await self._server.get(connection, EVENTS_PATH)
        except RemoteError as error:
            if error.status in (404, 405, 501):
                raise connection.error("no kvik", f"has no {EVENTS_PATH}: it answers {error.status}", HINT) from None
            raise
        kind = response.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise connection.error("no kvik", f"has no events at {EVENTS_PATH}, but {kind or 'nothing'!r:.60}", HINT)
        return response
