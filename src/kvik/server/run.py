"""The server's life: it answers, loads its models, says so, serves, drains and ends."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvik.server.app import make_app
from kvik.server.connection import Protocol
from kvik.server.errors import ApiError
from kvik.server.listening import BACKLOG
from kvik.server.served import Models
from kvik.server.state import ServerState
from kvik.server.watch.health import watch

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
"""How long the engine's thread waits for Python's lock behind the event loop, at most; Python's own 5 ms are a step."""

SHOW_CURSOR = "\x1b[?25h"
"""To a terminal: a bar of loading may have hidden it."""

LAST_STEP_S = 1.5
"""How long the server's end waits for the end of a step."""

LAST_WORDS_S = 1.0
"""How long an answer that was ended has until its client has read the error."""


class Server(uvicorn.Server):
    """uvicorn, with a first signal that drains and a second that ends.

    While it drains it goes on listening: so health checks are answered, and what is new is refused in words.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self._state = state
        self.loop: asyncio.AbstractEventLoop | None = None  # that it runs on
        self.was_told = asyncio.Event()  # by a first signal

    def handle_exit(self, sig: int, frame: object) -> None:
        """Refuse what is new, let the rest end; a second time: at once."""
        if self._state.is_draining:
            log.warning("stopping at once")
            os._exit(128 + sig)  # nothing is torn by it, and no thread can keep it from ending
        self._state.is_draining = True
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.was_told.set)

    async def drop_unread(self) -> None:
        """For ever: end each connection whose client takes nothing, for `unread_s`, of an answer that is over.

        Closing it would not do, for that waits until all is sent.
        """
        unread_s = self._state.config.unread_s
        seen: dict[H11Protocol, tuple[int, float]] = {}  # what each had left to send, and since when it is that much
        while True:
            await asyncio.sleep(unread_s / 4)
            before, seen, now_s = seen, {}, time.monotonic()
            for connection in list(self.server_state.connections):
                assert isinstance(connection, H11Protocol)
                num_bytes = _num_unread(connection)
                if not num_bytes:
                    continue
                seen[connection] = (num_bytes, now_s)
                if before.get(connection, (0, 0.0))[0] == num_bytes:
                    seen[connection] = before[connection]
                if now_s - seen[connection][1] >= unread_s:
                    log.warning("a client has read nothing for %g s; its connection ends", unread_s)
                    connection.transport.abort()


def _num_unread(connection: H11Protocol) -> int:
    """Bytes that wait for the client; 0 while more tokens may come, for then the engine bounds what waits."""
    stream = connection.cycle.scope["state"].get("stream") if connection.cycle else None
    return 0 if stream is not None and not stream.is_done else connection.transport.get_write_buffer_size()


async def drain(state: ServerState) -> None:
    """Wait for what runs as long as it may take, then end the rest with an error."""
    drain_s = state.config.drain_s
    state.live.close()
    if state.http.num_open:
        log.info("draining: %d requests run, for up to %g s; a second signal ends them", state.http.num_open, drain_s)
    await until_answered(state, drain_s)
    if state.http.num_open:
        log.warning("ending %d requests that still run", state.http.num_open)
        error = ApiError(503, "the server stops (hint: send it again, to another or later)", code="shutting_down")
        for served in state.models:
            served.async_llm.fail_all(error)
        await until_answered(state, LAST_WORDS_S)


async def until_answered(state: ServerState, seconds: float) -> None:
    """Until no request is open, or so many seconds have passed."""
    deadline_s = time.monotonic() + seconds
    while state.http.num_open and time.monotonic() < deadline_s:
        await asyncio.sleep(0.02)


def uvicorn_config(app: ASGIApp) -> uvicorn.Config:
    """How uvicorn runs an application of kvik's."""
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=1,
        timeout_keep_alive=75,
    )


def new_server(state: ServerState) -> Server:
    """uvicorn around the application, not yet running."""
    return Server(uvicorn_config(make_app(state)), state)


async def run(
    server: Server,
    state: ServerState,
    listening: socket.socket,
    on_ready: Callable[[], None],
    loading: Future[Models] | None = None,
) -> None:
    """Serve until the server is told to exit, or a signal drains it; the engines are left to `stop`.

    Until the models that are `loading` come, it answers that they do. Raises what loading them raises.
    """
    server.loop = asyncio.get_running_loop()
    serving = asyncio.ensure_future(server.serve(sockets=[listening]))
    told = asyncio.ensure_future(server.was_told.wait())
    others: list[asyncio.Future[Any]] = [told]
    others += map(asyncio.ensure_future, (watch(state), server.drop_unread()))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        if loading is not None:
            found = asyncio.wrap_future(loading)
            await asyncio.wait((found, serving, told), return_when=asyncio.FIRST_COMPLETED)
            if found.done():
                state.models = found.result()
        if server.started and not state.is_loading:
            others.append(asyncio.ensure_future(state.live.record()))
            on_ready()
        await asyncio.wait((serving, told), return_when=asyncio.FIRST_COMPLETED)
        if told.done():
            await drain(state)
    finally:
        server.should_exit = True
        await serving
        for other in others:
            other.cancel()


def stop(state: ServerState) -> bool:
    """End all engines: whether their threads have ended."""
    state.kept.close()
    if state.events is not None:
        state.events.close()
    have_ended = [served.async_llm.stop(LAST_STEP_S) for served in state.models]
    return all(have_ended)


def in_thread(load: Callable[[], Models]) -> Future[Models]:
    """What it gives, when it does; nobody waits for its thread, which nothing can end."""
    future: Future[Models] = Future()

    def main() -> None:
        try:
            models = load()
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is raised where the future is read
            future.set_exception(error)
        else:
            future.set_result(models)

    threading.Thread(target=main, name="kvik-load", daemon=True).start()
    return future


def serve(
    state: ServerState,
    listening: socket.socket,
    *,
    load: Callable[[], Models] | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT; the state's models may come from `load`, while requests are answered already."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    loading = None if load is None else in_thread(load)
    try:
        asyncio.run(run(new_server(state), state, listening, on_ready, loading))
    finally:
        have_ended = stop(state)
    if not have_ended or state.is_loading:  # a thread in the middle of its work must not meet an interpreter that ends
        log.warning("ending in the middle of %s", "loading" if state.is_loading else "a step")
        if state.is_loading and sys.stderr.isatty():
            sys.stderr.write(SHOW_CURSOR)
        logging.shutdown()
        os._exit(0)
