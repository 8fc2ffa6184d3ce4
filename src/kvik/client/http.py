"""A small HTTP/1.1 client: one connection, one request at a time, bodies that are read as they come.

Everything a server sends is bounded: h11 bounds its headers, and whoever reads a body bounds that.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

import h11

from kvik.client.chunks import BadChunk, ChunkedBody
from kvik.errors import InvalidInput, RemoteError

CONNECT_S = 10.0
READ_BYTES = 1 << 16
MAX_URL_LENGTH = 2048
MAX_EVENT_BYTES = 1 << 20

URL_HINT = "give one like http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is; paths of requests follow `prefix`."""

    host: str
    port: int
    prefix: str = ""
    is_tls: bool = False

    @property
    def authority(self) -> str:
        """Host and port, as the Host header has them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.is_tls else 'http'}://{self.authority}{self.prefix}"


def parse_url(url: str) -> Address:
    """The server's address; a `/v1` at its end is left out. Raises `InvalidInput`, which never repeats a password."""
    if len(url) > MAX_URL_LENGTH or not (url.isascii() and url.isprintable()) or " " in url:
        raise InvalidInput(f"--url has {len(url):,} characters, and some that no URL has, or too many", hint=URL_HINT)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidInput(f"--url is not a URL: {error}", hint=URL_HINT) from None
    if parts.username is not None or parts.password is not None:
        raise InvalidInput("--url has a user name or a password in it", hint="give a key by KVIK_API_KEY")
    _check_parts(url, parts)
    is_tls = parts.scheme == "https"
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Address(host or "", port or (443 if is_tls else 80), prefix, is_tls)


def _check_parts(url: str, parts: SplitResult) -> None:
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInput(f"--url is {url!r:.80}, which is not an HTTP address", hint=URL_HINT)
    if parts.query or parts.fragment:
        raise InvalidInput(f"--url is {url!r:.80}, with a query in it", hint=URL_HINT)


class Connection:
    """Opened when it is first used and kept between requests; a failed request closes it, the next one opens it again.

    `timeout_s` is the longest silence that is borne; None bears any.
    """

    def __init__(self, address: Address, *, timeout_s: float | None) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._http = h11.Connection(h11.CLIENT)
        self._body: ChunkedBody | None = None  # of the answer that is being read, where it comes in chunks
        self._is_kept = True  # the server takes another request after this answer
        self._has_answered = False  # a byte came since the last request

    async def request(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Response:
        """Send a request and wait for the head of its answer. Raises `RemoteError`."""
        is_kept = self._writer is not None and not self._is_stale()
        try:
            try:
                head = await self._exchange(method, path, headers or {}, body)
            except RemoteError as error:
                # A server may close a connection just when it is to be used again: then it has not seen the request.
                if not is_kept or self._has_answered or error.kind != "disconnected":
                    raise
                self.close()
                head = await self._exchange(method, path, headers or {}, body)
        except BaseException:
            self.close()
            raise
        return Response(self, head)

    def close(self) -> None:
        """Leave at once; an answer that is under way ends for the server as a disconnect."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = self._body = None

    def finish(self) -> None:
        """After a whole answer: keep the connection where both sides can."""
        if self._body is not None:
            self._body, self._http = None, h11.Connection(h11.CLIENT)
            if not self._is_kept:
                self.close()
        elif self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        else:
            self.close()

    async def next_event(self) -> Any:
        """What h11 makes of the bytes that come. Raises `RemoteError`."""
        assert self._reader is not None
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                if self._reader.at_eof():
                    raise self.error("disconnected", "closed the connection before its answer was whole") from None
                raise self.error("bad HTTP", f"does not speak HTTP/1.1: {error}") from None
            if event is not h11.NEED_DATA:
                return event
            data = await self._read()
            self._has_answered |= bool(data)
            self._http.receive_data(data)

    async def next_data(self) -> bytes | None:
        """Bytes of the body as they came; None at its end. Raises `RemoteError`."""
        body = self._body
        if body is None:
            event = await self.next_event()
            return bytes(event.data) if isinstance(event, h11.Data) else None
        while True:
            try:
                data = body.take()
            except BadChunk as error:
                raise self.error("bad HTTP", f"does not speak HTTP/1.1: it sent {error}") from None
            if data:
                return data
            if body.is_over:
                return None
            if not (data := await self._read()):
                raise self.error("disconnected", "closed the connection before its answer was whole")
            body.receive(data)

    async def _read(self) -> bytes:
        """What comes next; nothing at the end of the connection. Raises `RemoteError`."""
        assert self._reader is not None
        try:
            if self.timeout_s is None:
                return await self._reader.read(READ_BYTES)
            async with asyncio.timeout(self.timeout_s):
                return await self._reader.read(READ_BYTES)
        except TimeoutError:
            raise self.error("timeout", f"was silent for {self.timeout_s:g} s") from None
        except OSError as error:
            raise self.error("disconnected", f"broke off: {_reason(error)}") from None

    def error(self, kind: str, what: str, hint: str = "") -> RemoteError:
        """One about this server."""
        hints = {
            "timeout": "raise --timeout, or ask for less at once",
            "disconnected": "see the server's own log for why",
        }
        hint = hint or hints.get(kind, "see that an OpenAI-compatible server listens at this address")
        return RemoteError(f"{self.address} {what}", hint=hint, kind=kind)

    def _is_stale(self) -> bool:
        assert self._reader is not None
        return self._reader.at_eof() or self._http.our_state is not h11.IDLE

    async def _exchange(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> h11.Response:
        if self._writer is None or self._is_stale():
            await self._open()
        self._has_answered = False
        await self._send(method, path, headers, body)
        while not isinstance(event := await self.next_event(), h11.Response):
            if not isinstance(event, h11.InformationalResponse):
                raise self.error("bad HTTP", "sent no answer")
        self._note_body(method, event)
        return event

    def _note_body(self, method: str, head: h11.Response) -> None:
        """Where it comes in chunks, h11 has done its part."""
        fields = {bytes(name): bytes(value).lower() for name, value in head.headers}
        if method != "HEAD" and fields.get(b"transfer-encoding") == b"chunked" and head.status_code >= 200:
            self._body = ChunkedBody(self._http.trailing_data[0])
            self._is_kept = fields.get(b"connection") != b"close" and head.http_version == b"1.1"

    async def _open(self) -> None:
        self.close()
        self._http = h11.Connection(h11.CLIENT)
        tls = ssl.create_default_context() if self.address.is_tls else None
        try:
            async with asyncio.timeout(CONNECT_S if self.timeout_s is None else min(CONNECT_S, self.timeout_s)):
                self._reader, self._writer = await asyncio.open_connection(
                    self.address.host, self.address.port, ssl=tls, limit=READ_BYTES
                )
        except TimeoutError:
            hint = "see that the server runs and that no firewall stands between"
            raise self.error("connect", "does not answer", hint) from None
        except OSError as error:  # those of TLS and of names too
            hint = "start the server, for example with `kvik serve`, or give its --url"
            raise self.error("connect", f"cannot be reached: {_reason(error)}", hint) from None

    async def _send(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> None:
        assert self._writer is not None
        fields = {"host": self.address.authority, "accept-encoding": "identity", **headers}
        if body:
            fields["content-length"] = str(len(body))
        head = h11.Request(method=method, target=self.address.prefix + path, headers=list(fields.items()))
        sent = (self._http.send(head) or b"") + body
        if body:
            self._http.send(h11.Data(data=body))
        self._writer.write(sent + (self._http.send(h11.EndOfMessage()) or b""))
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._writer.drain()
        except TimeoutError:
            raise self.error("timeout", f"took nothing for {self.timeout_s:g} s") from None
        except OSError as error:
            raise self.error("disconnected", f"broke off: {_reason(error)}") from None


class Response:
    """The head of an answer, and its body as it comes."""

    def __init__(self, connection: Connection, head: h11.Response) -> None:
        self.status = head.status_code
        self.headers = {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers}
        self._connection = connection

    async def next_data(self) -> bytes | None:
        """Bytes of the body as they came; None at its end, after which the connection takes the next request."""
        try:
            data = await self._connection.next_data()
            if data is not None:
                return data
        except BaseException:
            self._connection.close()
            raise
        self._connection.finish()
        return None

    async def read(self, max_bytes: int) -> bytes:
        """The whole body. Raises `RemoteError` for a longer one."""
        body = bytearray()
        while (data := await self.next_data()) is not None:
            body += data
            if len(body) > max_bytes:
                self._connection.close()
                raise self._connection.error("too large", f"sent more than {max_bytes:,} bytes")
        return bytes(body)


class EventTooLarge(Exception):
    """A server-sent event has more bytes than its reader takes."""


class EventParser:
    """Server-sent events: name and data of each, from bytes as they come. Other fields and comments are skipped."""

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._name = b""  # of an event that has no end yet
        self._rest = b""  # of a line that has no end yet
        self._data: list[bytes] = []  # lines of an event that has no end yet
        self._num_bytes = 0  # of those

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that end in `data`. Raises `EventTooLarge`."""
        return [data for _, data in self.feed_named(data)]

    def feed_named(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """The same events with their names, empty where they have none. Raises `EventTooLarge`."""
        lines = (self._rest + data if self._rest else data).split(b"\n")
        self._rest = lines.pop()
        events = []
        for line in lines:
            if line.endswith(b"\r"):
                line = line[:-1]
            if not line:
                if self._data:
                    events.append((self._name, b"\n".join(self._data)))
                self._name, self._data, self._num_bytes = b"", [], 0
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
                self._num_bytes += len(line)
            elif line.startswith(b"event:"):
                self._name = line[6:].removeprefix(b" ")
        if len(self._rest) + self._num_bytes > self._max_bytes:
            raise EventTooLarge
        return events


def _reason(error: OSError) -> str:
    """In the system's words."""
    if isinstance(error, ssl.SSLError) or not error.errno or error.errno < 0:
        return error.strerror or str(error) or type(error).__name__
    return os.strerror(error.errno)
