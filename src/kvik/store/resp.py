"""A connection to Redis or Valkey that trusts nobody: every reply is bounded, and every wait has an end.

Its protocol is RESP 2, https://redis.io/docs/latest/develop/reference/protocol-spec/; only what the store needs of it.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import parse_qsl, unquote, urlsplit

from kvik.errors import InvalidInput

SCHEMES = ("redis", "rediss")
DEFAULT_PORT = 6379
MAX_LINE_BYTES = 1024
RECEIVE_BYTES = 1 << 16
PASSWORD_VARIABLE = "KVIK_STORE_PASSWORD"
_FILES = ("ca_file", "cert_file", "key_file")

Reply = bytes | int | None


class BadReply(Exception):
    """What came is no answer to what was asked; the connection is of no use any more."""


class Refused(Exception):
    """The server says that it will not."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server is, and as whom to talk to it."""

    host: str
    port: int = DEFAULT_PORT
    database: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    is_tls: bool = False
    ca_file: str | None = None  # of certificates that are trusted, in place of the system's
    cert_file: str | None = None  # what this client shows
    key_file: str | None = None

    def __str__(self) -> str:
        """Without user and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.is_tls else 'redis'}://{host}:{self.port}/{self.database}"


def parse_address(url: str) -> Address:
    """From `redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]`, or rediss:// for TLS. Raises `InvalidInput`.

    With TLS, `?ca_file=`, `cert_file=` and `key_file=` name files. A password may come from the environment instead.
    """
    hint = "write redis://HOST:PORT, or rediss://USER:PASSWORD@HOST:PORT/0?ca_file=FILE"
    try:
        parts = urlsplit(url)
        host, port, database = parts.hostname, parts.port, int(parts.path.strip("/") or 0)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise InvalidInput("store is not an address of a Redis server", hint=hint) from None
    if parts.scheme not in SCHEMES or not host or parts.fragment or not 0 <= database < 1 << 16:
        raise InvalidInput(f"store is not an address of a Redis server, but one of {parts.scheme[:20]}://", hint=hint)
    is_tls = parts.scheme == "rediss"
    for name in options:
        if name not in _FILES or not is_tls:
            raise InvalidInput(f"the store's address has {name[:40]!r}, which means nothing there", hint=hint)
    address = Address(
        host,
        port or DEFAULT_PORT,
        database,
        unquote(parts.username) if parts.username else None,
        unquote(parts.password) if parts.password else os.environ.get(PASSWORD_VARIABLE),
        is_tls,
        **options,
    )
    if is_tls:
        try:
            _tls_context(address)
        except OSError as error:
            raise InvalidInput(f"the store's certificates cannot be read: {error}", hint=hint) from None
    return address


class Connection:
    """One connection; not for several threads. Any exception but `Refused` leaves it of no use: close it.

    Deadlines are of `time.monotonic`, for all of a call: a server that sends a byte now and then does not move them.
    """

    def __init__(self, address: Address, deadline_s: float) -> None:
        self._received = bytearray()
        self._at = 0  # of what was received and not yet read
        self._socket: socket.socket = socket.create_connection((address.host, address.port), _left(deadline_s))
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.is_tls:
                self._socket = _tls_context(address).wrap_socket(self._socket, server_hostname=address.host)
            if address.password is not None:
                user = [] if address.user is None else [address.user.encode()]
                self._ask_all([b"AUTH", *user, address.password.encode()], deadline_s)
            if address.database:
                self._ask_all([b"SELECT", str(address.database).encode()], deadline_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it."""
        self._socket.close()

    @property
    def is_closed(self) -> bool:
        """Whether it was ended."""
        return self._socket.fileno() < 0

    @property
    def is_quiet(self) -> bool:
        """Whether nothing has come that nobody asked for, the end of the connection among it."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return self._at == len(self._received) and not poll.poll(0)

    def send(self, commands: Iterable[list[bytes | memoryview]], deadline_s: float) -> None:
        """Send commands; each will have one reply, in their order."""
        parts: list[bytes | memoryview] = []
        for command in commands:
            parts.append(b"*%d\r\n" % len(command))
            for word in command:
                parts += [b"$%d\r\n" % len(word), word, b"\r\n"]
        data = b"".join(parts)
        self._socket.settimeout(_left(deadline_s))
        self._socket.sendall(data)

    def reply(self, max_bytes: int, deadline_s: float) -> Reply:
        """The next reply: bytes, of this length at most, a number or nothing.

        Raises `Refused`, `BadReply`, `OSError`.
        """
        line = self._line(deadline_s)
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            raise Refused(rest[:200].decode("ascii", "replace"))
        try:
            number = int(rest) if len(rest) <= 20 else None
        except ValueError:
            number = None
        if number is None or kind not in (b":", b"$"):
            raise BadReply("a reply of no known kind")
        if kind == b":":
            return number
        if number == -1:
            return None
        if not 0 <= number <= max_bytes:
            raise BadReply(f"a reply of {number:,} bytes where {max_bytes:,} were expected")
        data = self._take(number + 2, deadline_s)
        if data[-2:] != b"\r\n":
            raise BadReply("a reply without its end")
        return data[:-2]

    def _ask_all(self, command: list[bytes | memoryview], deadline_s: float) -> None:
        self.send([command], deadline_s)
        if self.reply(MAX_LINE_BYTES, deadline_s) != b"OK":
            raise BadReply("no OK")

    def _line(self, deadline_s: float) -> bytes:
        searched = self._at
        while (end := self._received.find(b"\r\n", searched)) < 0:
            searched = max(self._at, len(self._received) - 1)
            if len(self._received) - self._at > MAX_LINE_BYTES:
                raise BadReply("a line that does not end")
            searched -= self._receive(RECEIVE_BYTES, deadline_s)
        line = bytes(self._received[self._at : end])
        self._at = end + 2
        return line

    def _take(self, count: int, deadline_s: float) -> bytes:
        while (missing := count - (len(self._received) - self._at)) > 0:
            self._receive(max(missing, RECEIVE_BYTES), deadline_s)
        data = bytes(memoryview(self._received)[self._at : self._at + count])
        self._at += count
        return data

    def _receive(self, max_bytes: int, deadline_s: float) -> int:
        """Read some more; gives how many bytes were dropped from what was read before."""
        dropped = self._at
        if dropped:
            del self._received[:dropped]
            self._at = 0
        self._socket.settimeout(_left(deadline_s))
        data = self._socket.recv(max_bytes)
        if not data:
            raise ConnectionResetError("the server has closed the connection")
        self._received += data
        return dropped


def _left(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("it took too long")
    return left_s


@lru_cache(maxsize=4)
def _tls_context(address: Address) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=address.ca_file)
    if address.cert_file is not None:
        context.load_cert_chain(address.cert_file, address.key_file)
    return context
