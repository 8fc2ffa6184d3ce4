"""The replicas as processes: begun, looked after, ended, begun again."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvik.client.http import Address, Connection
from kvik.cluster import Replica, Router
from kvik.errors import InvalidInput, RemoteError
from kvik.server.front.parent import PARENT_VARIABLE, READY

log = logging.getLogger(__name__)

_READY = re.compile(re.escape(READY).replace(r"\{\}", r"(\d+)").encode())

HEALTH_S = 1.0
"""Between two looks at a replica."""

HEALTH_TIMEOUT_S = 15.0
"""Without an answer to them, a replica counts as hung and is ended."""

FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0
"""Before a replica that ended is begun again: twice as long each time that it ends before it was ready."""

FIRST_SPEED = 1000.0
"""Prompt tokens a second, until one was measured."""

MAX_GUESSED = 1 << 14
"""Pieces of text that a replica is guessed to hold, each of 128 tokens or so."""


class Process:
    """One replica: its process, and once that is ready its place in the router."""

    def __init__(self, name: str, command: Sequence[str], router: Router) -> None:
        self.name = name
        self._command = command
        self._router = router
        self._process: asyncio.subprocess.Process | None = None
        self._is_ending = False
        self._was_ready = False  # in any of its lives
        self._drained: Replica | None = None  # its life that gets nothing new any more
        self.address: Address | None = None
        self.replica: Replica | None = None  # where it is ready

    @property
    def status(self) -> str:
        """In one word."""
        if self.replica is None:
            return "loading" if self._process is not None else "ended"
        return "ok" if self.replica.is_open else "closed"

    @property
    def pid(self) -> int | None:
        """Of its process, while there is one."""
        return None if self._process is None else self._process.pid

    async def run(self, on_ready: Callable[[], None]) -> None:
        """For ever: begin it, look after it, and begin it again when it ends.

        Raises `InvalidInput` for one that never was ready: it would never be.
        """
        pause_s = FIRST_PAUSE_S
        while not self._is_ending:
            was_ready = await self._run_once(on_ready)
            if self._is_ending:
                return
            self._was_ready = self._was_ready or was_ready
            if not self._was_ready:
                raise InvalidInput(f"{self.name} has ended before it was ready", hint="its last lines say why")
            pause_s = FIRST_PAUSE_S if was_ready else min(MAX_PAUSE_S, 2 * pause_s)
            log.warning("%s has ended; it is begun again in %.1f s", self.name, pause_s)
            await asyncio.sleep(pause_s)

    async def _run_once(self, on_ready: Callable[[], None]) -> bool:
        """One life of the process: whether it was ready at any time."""
        environment = os.environ | {PARENT_VARIABLE: str(os.getpid())}
        process = self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            start_new_session=True,  # signals of the terminal are the front's
            limit=1 << 20,
        )
        assert process.stderr is not None
        looking: asyncio.Task[None] | None = None
        try:
            while line := await _line(process.stderr):
                sys.stderr.write(f"[{self.name}] {line.decode(errors='replace')}")
                if looking is None and (found := _READY.search(line)):
                    self.address = Address("127.0.0.1", int(found[1]))
                    self.replica = self._router.add(self.name, prefill_tokens_s=FIRST_SPEED, max_guessed=MAX_GUESSED)
                    looking = asyncio.ensure_future(self._look_after(self.replica, self.address))
                    on_ready()
            await process.wait()
        finally:
            if looking is not None:
                looking.cancel()
            if self.replica is not None:
                self._router.remove(self.replica)
            self.replica = self.address = self._process = None
            if process.returncode is None:
                process.kill()
                await process.wait()
        return looking is not None

    async def _look_after(self, replica: Replica, address: Address) -> None:
        """Ask how it is; what says that it takes nothing gets nothing, what says nothing is ended."""
        connection = Connection(address, timeout_s=HEALTH_TIMEOUT_S)
        try:
            while True:
                await asyncio.sleep(HEALTH_S)
                try:
                    answer = await connection.request("GET", "/health")
                    await answer.read(1 << 20)
                    is_open = answer.status == 200
                except RemoteError as error:
                    if error.kind == "timeout":
                        log.error("%s has been silent for %g s: it is ended", self.name, HEALTH_TIMEOUT_S)
                        self._signal(signal.SIGKILL)
                    is_open = False
                replica.is_open = is_open and self._drained is not replica
        finally:
            connection.close()

    async def drain(self, seconds: float) -> None:
        """Give it nothing new, and wait as long for what it has."""
        replica = self.replica
        if replica is None:
            return
        self._drained, replica.is_open = replica, False
        deadline_s = time.monotonic() + seconds
        while replica.num_in_flight and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)

    async def restart(self, drain_s: float, patience_s: float) -> bool:
        """Drain it, end it, and wait for its next life; False where that is not ready in time."""
        before = self.replica
        await self.drain(drain_s)
        self._signal(signal.SIGTERM)
        deadline_s = time.monotonic() + patience_s
        while self.replica is None or self.replica is before:
            if time.monotonic() > deadline_s:
                return False
            await asyncio.sleep(0.05)
        return True

    async def end(self, seconds: float) -> None:
        """End it for good: it has so long for what it still has to do."""
        self._is_ending = True
        process = self._process
        if process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(seconds):
                await process.wait()
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)


async def _line(stream: asyncio.StreamReader) -> bytes:
    """The next line, or what there is of one that has no end."""
    try:
        return await stream.readline()
    except ValueError:  # longer than the limit
        return await stream.read(1 << 20)


def told(process: Process) -> dict[str, object]:
    """What /health says of a replica."""
    replica = process.replica
    return {
        "name": process.name,
        "status": process.status,
        "pid": process.pid,
        "url": None if process.address is None else str(process.address),
        "in_flight": 0 if replica is None else replica.num_in_flight,
        "queue_s": 0.0 if replica is None else round(replica.queue_s, 4),
    }
