"""HTTP/1.1 as uvicorn speaks it, with cheaper parts of streamed bodies."""

from __future__ import annotations

from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEAD_BYTES = 64 << 10
"""Most bytes of a request's line and headers."""

_CHUNKED = b"\r\ntransfer-encoding: chunked\r\n"


class ChunkedConnection(h11.Connection):
    """h11's connection, which frames a chunk itself.

    A part of a chunked body (RFC 9112, 7.1) changes nothing in h11's state, but checking that takes it longer than
    everything else that the server does to write a token. Beginnings and ends of answers stay h11's.
    """

    _is_chunked = False  # of the answer that is being written

    def send(self, event: h11.Event) -> Any:
        """The bytes of an event; `None` where the connection is closed instead."""
        if self._is_chunked and type(event) is h11.Data:
            data = event.data
            return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        output = super().send(event)
        self._is_chunked = output is not None and type(event) is h11.Response and _CHUNKED in output.lower()
        return output


class Protocol(H11Protocol):
    """uvicorn's protocol over such connections."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = ChunkedConnection(h11.SERVER, MAX_HEAD_BYTES)
