"""The server's address: taken before anything that takes time, so that nobody is refused meanwhile."""

from __future__ import annotations

import socket

from kvik.errors import InvalidInput

BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at this address; whoever comes waits until it is served. Raises `InvalidInput`."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
    except OSError as error:
        raise _no_address(host, port, error) from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise _no_address(host, port, error) from error
    return bound


def _no_address(host: str, port: int, error: OSError) -> InvalidInput:
    return InvalidInput(
        f"cannot listen on {host}, port {port}: {error.strerror}", hint="choose another with --port or --host"
    )
