"""The server's life: it binds, says so, serves, drains and ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn

from kvik.errors import InvalidInput
from kvik.server.app import make_app
from kvik.server.state import ServerState

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
"""How long the engine's thread waits for Python's lock behind the event loop, at most; Python's own 5 ms are a step."""

BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `InvalidInput`."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, proto)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise InvalidInput(
            f"cannot listen on {host}, port {port}: {error.strerror}", hint="choose another with --port or --host"
        ) from error
    return listening


class _Server(uvicorn.Server):
    """uvicorn, with a first signal that drains and a second that ends."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self._state = state

    def handle_exit(self, sig: int, frame: object) -> None:
        """Refuse what is new, let the rest end; a second time: at once."""
        if self._state.is_draining:
            log.warning("stopping at once")
            self.force_exit = True
            self.should_exit = True
            return
        self._state.is_draining = True
        log.info(
            "draining: up to %g s for what runs; the same signal again ends it at once", self._state.config.drain_s
        )
        self.should_exit = True


def serve(state: ServerState, listening: socket.socket, *, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    config = uvicorn.Config(
        make_app(state),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=max(1, int(state.config.drain_s)) if state.config.drain_s else 0,
        h11_max_incomplete_event_size=64 << 10,
        timeout_keep_alive=75,
    )
    server = _Server(config, state)

    async def main() -> None:
        serving = asyncio.ensure_future(server.serve(sockets=[listening]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        if server.started:
            on_ready()
        try:
            await serving
        finally:
            state.kept.close()
            for served in state.models:
                await served.async_llm.close()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
    signal.signal(signal.SIGINT, signal.default_int_handler)
