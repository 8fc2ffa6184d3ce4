"""What a server keeps between requests, each for a time and within a bound: pins, sessions, answers to compare with."""

from __future__ import annotations

import asyncio
import time

from kvik.server.cache.pins import Clock, Pins
from kvik.server.cache.remembered import ResponseMemory
from kvik.server.cache.sessions import Sessions
from kvik.server.settings import ServerConfig

SWEEP_S = 15.0


class Kept:
    """All of it. What has had its time goes when a request looks, and every `SWEEP_S` while there is anything."""

    def __init__(self, config: ServerConfig, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self.pins = Pins(config.pin_share, clock)
        self.sessions = Sessions(self.pins, config.max_sessions, clock)
        self.responses = ResponseMemory(config.max_remembered, config.max_remembered_tokens)
        self._timer: asyncio.TimerHandle | None = None

    def sweep(self) -> None:
        """Drop what has had its time."""
        self.pins.sweep()
        self.sessions.sweep()

    def watch(self) -> None:
        """Look again later, as long as there is something to drop; on the event loop."""
        if self._timer is None and (len(self.pins) or len(self.sessions)):
            self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._tick)

    def close(self) -> None:
        """Give everything back."""
        if self._timer is not None:
            self._timer.cancel()
        self.sessions.close()
        self.pins.close()

    def _tick(self) -> None:
        self._timer = None
        self.sweep()
        self.watch()
