"""The front's life: it begins its replicas, serves, restarts them one by one on SIGHUP, drains and ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvik.cluster import Cost, Router
from kvik.server.front.app import Front, FrontState
from kvik.server.front.processes import Process
from kvik.server.gate import Gate
from kvik.server.run import Server, until_answered, uvicorn_config
from kvik.server.settings import ServerConfig

log = logging.getLogger(__name__)

END_S = 10.0
"""That a replica has to end, beside the time for what it drains."""

PATIENCE_S = 600.0
"""That a replica has to be ready again, in a rolling restart."""


def serve_replicas(
    config: ServerConfig, listening: socket.socket, commands: Sequence[Sequence[str]], on_ready: Callable[[], None]
) -> None:
    """Serve through replicas that these commands begin, until SIGTERM or SIGINT."""
    router = Router(Cost())
    processes = [Process(f"replica-{at}", command, router) for at, command in enumerate(commands)]
    state = FrontState(config, router, processes)
    asyncio.run(_run(state, listening, on_ready))


async def _run(state: FrontState, listening: socket.socket, on_ready: Callable[[], None]) -> None:
    server = Server(uvicorn_config(Gate(Front(state), state, {})), state)
    loop = server.loop = asyncio.get_running_loop()
    num_ready = 0

    def ready() -> None:
        nonlocal num_ready
        num_ready += 1
        if num_ready == len(state.processes):
            on_ready()

    running = [asyncio.ensure_future(process.run(ready)) for process in state.processes]
    serving = asyncio.ensure_future(server.serve(sockets=[listening]))
    dropping = asyncio.ensure_future(server.drop_unread())
    restarting: set[asyncio.Task[None]] = set()

    def restart() -> None:
        if restarting or state.is_draining:
            log.warning("a rolling restart is under way")
            return
        task = asyncio.ensure_future(rolling_restart(state))
        restarting.add(task)
        task.add_done_callback(restarting.discard)

    loop.add_signal_handler(signal.SIGHUP, restart)
    told = asyncio.ensure_future(server.was_told.wait())
    try:
        await asyncio.wait((serving, told, *running), return_when=asyncio.FIRST_COMPLETED)
        for each in running:
            if each.done():
                each.result()  # raises why no replica can be begun
        if told.done():
            await until_answered(state, state.config.drain_s)
    finally:
        for task in restarting:
            task.cancel()
        told.cancel()
        dropping.cancel()
        await asyncio.gather(*(process.end(state.config.drain_s + END_S) for process in state.processes))
        server.should_exit = True
        with suppress(asyncio.CancelledError):
            await serving
        await asyncio.gather(*running, return_exceptions=True)


async def rolling_restart(state: FrontState) -> None:
    """Begin each replica anew, one after the other, while the others serve."""
    for process in state.processes:
        log.info("%s: restarting", process.name)
        if not await process.restart(state.config.drain_s, PATIENCE_S):
            log.error("%s is not ready after %g s: the rolling restart ends here", process.name, PATIENCE_S)
            return
    log.info("all replicas are restarted")
