"""A store that machines share: Redis or Valkey, which may be slow, lie, hang or be gone; see docs/store.md."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress

from kvik.cache.digest import Digest
from kvik.store.base import Fault, StoredBlock, StoreStats
from kvik.store.entry import BadEntry, decode, encode, entry_bytes
from kvik.store.resp import Address, BadReply, Connection, Refused

log = logging.getLogger(__name__)

PREFIX = b"kvik:1:"
"""What every key begins with; an ACL needs no more than `~kvik:1:*`."""

CONNECT_S = 1.0
WRITE_S = 5.0
READ_S = 1.0
"""For a path of blocks where nobody knows yet how long computing them would take."""

BATCH = 256
"""Names that are asked for at once."""

WINDOW = 4
"""Blocks that are asked for before the first of them has come."""

MAX_FAILURES = 3
"""In a row, after which the store is left alone for `PAUSE_S`."""

PAUSE_S = 30.0

_FAILURES = (OSError, ssl.SSLError, BadReply, Refused, BadEntry)


class Breaker:
    """Whether it is worth while to ask: after some failures in a row it is not, until a while has passed."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._num_failures = 0
        self._closed_until_s = 0.0
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether nothing is to be asked now."""
        return self._num_failures >= MAX_FAILURES and time.monotonic() < self._closed_until_s

    def succeed(self) -> None:
        """It went well."""
        with self._lock:
            if self._num_failures >= MAX_FAILURES:
                log.info("%s: it works again", self._what)
            self._num_failures = 0

    def fail(self, error: Exception) -> None:
        """It did not; who reads the log hears of it once."""
        with self._lock:
            self._num_failures += 1
            self._closed_until_s = time.monotonic() + PAUSE_S
            if self._num_failures == MAX_FAILURES:
                told = str(error) or type(error).__name__
                log.warning("%s: left alone for %.0f s at a time, for it fails: %s", self._what, PAUSE_S, told)


class RedisStore:
    """Blocks of one model and format at `kvik:1:<scope>:<digest>`; the key is that of the blocks' MAC.

    What is evicted, and when, is the server's own affair (`maxmemory-policy allkeys-lru`).
    """

    def __init__(self, address: Address, scope: Digest, *, num_tokens: int, payload_bytes: int, key: bytes) -> None:
        assert key, "whoever may write to a shared store could change answers"
        self.stats = StoreStats()
        self.address = address
        self._scope = scope
        self._key = key
        self._prefix = PREFIX + scope.hex().encode() + b":"
        self._entry_bytes = entry_bytes(num_tokens, payload_bytes)
        self._reading, self._writing = Breaker(f"{address}, reading"), Breaker(f"{address}, writing")
        self._free: list[Connection] = []
        self._is_closing = False
        self._lock = threading.Lock()

    def close(self) -> None:
        """Keep no connections any more; see `Store`."""
        with self._lock:
            self._is_closing = True
            for connection in self._free:
                connection.close()
            self._free.clear()

    def greet(self) -> None:
        """See whether the server answers, and say so where it does not: it may come later."""
        if self._ask([b"PING"]) is Fault.UNREADABLE:
            log.warning("%s does not answer: nothing is shared until it does", self.address)

    def get(self, digest: Digest) -> StoredBlock | Fault:
        """A block, or why there is none; see `Store`."""
        return next(self.read([digest], None))

    def read(self, digests: Sequence[Digest], seconds: float | None) -> Generator[StoredBlock | Fault, None, None]:
        """Blocks in order, and a fault where they end too soon; see `Store`.

        First it asks how many of them there are, then for those, several at a time. Time in which nobody wants the
        next one does not count.
        """
        if self._reading.is_open:
            self.stats.faults[Fault.UNREADABLE] += 1
            yield Fault.UNREADABLE
            return
        left_s = READ_S if seconds is None else seconds
        num_given, num_sent, fault = 0, 0, Fault.MISSING
        try:
            started_s = time.monotonic()
            with self._connection(min(left_s, CONNECT_S)) as connection:
                wanted = digests[: self._num_existing(connection, digests, started_s + left_s)]
                left_s -= time.monotonic() - started_s
                while num_given < len(wanted):
                    started_s = time.monotonic()
                    deadline_s = started_s + left_s
                    sent = wanted[num_sent : num_given + WINDOW]
                    connection.send([[b"GET", self._name_of(digest)] for digest in sent], deadline_s)
                    num_sent += len(sent)
                    data = connection.reply(self._entry_bytes, deadline_s)
                    left_s -= time.monotonic() - started_s
                    if data is None:  # evicted meanwhile
                        break
                    if not isinstance(data, bytes):
                        raise BadReply("no block")
                    block = decode(data, self._scope, wanted[num_given], self._key)
                    num_given += 1
                    self.stats.num_hits += 1
                    self.stats.read_bytes += len(data)
                    yield block
                if num_sent > num_given:
                    connection.close()
            self._reading.succeed()
        except BadEntry as error:
            fault = error.fault
            self._fail(self._reading, error)
            log.warning("%s: a block is not used: %s", self.address, fault)
            self.delete(digests[num_given])
        except _FAILURES as error:
            fault = Fault.UNREADABLE
            self._fail(self._reading, error)
        if num_given < len(digests):
            self.stats.faults[fault] += 1
            yield fault

    def put(self, block: StoredBlock) -> bool:
        """Keep a block; see `Store`."""
        if self._writing.is_open:
            return False
        data = b"".join(encode(block, self._scope, self._key))
        if self._ask([b"SET", self._name_of(block.digest), data, b"NX"]) is Fault.UNREADABLE:
            return False
        self.stats.num_written += 1
        self.stats.written_bytes += len(data)
        return True

    def exists(self, digest: Digest) -> bool:
        """Whether it is worth while to ask; see `Store`."""
        return not self._reading.is_open

    def exists_many(self, digests: Sequence[Digest]) -> int:
        """How many of the first ones exist, as the server says; see `Store`."""
        deadline_s = time.monotonic() + READ_S
        with suppress(*_FAILURES), self._connection(READ_S) as connection:
            return self._num_existing(connection, digests, deadline_s)
        return 0

    def delete(self, digest: Digest) -> bool:
        """Forget a block; see `Store`."""
        return self._ask([b"DEL", self._name_of(digest)]) == 1

    def used(self, digests: Sequence[Digest]) -> None:
        """Touch them, the last one first; see `Store`."""
        for at in range(len(digests), 0, -BATCH):
            names = [self._name_of(digest) for digest in reversed(digests[max(0, at - BATCH) : at])]
            if self._writing.is_open or self._ask([b"TOUCH", *names]) is Fault.UNREADABLE:
                return

    def tidy(self) -> None:
        """Nothing: the server does it."""

    def _name_of(self, digest: Digest) -> bytes:
        return self._prefix + digest.hex().encode()

    def _num_existing(self, connection: Connection, digests: Sequence[Digest], deadline_s: float) -> int:
        count = 0
        while count < len(digests):
            asked = digests[count : count + BATCH]
            connection.send([[b"EXISTS", self._name_of(digest)] for digest in asked], deadline_s)
            replies = [connection.reply(0, deadline_s) for _ in asked]
            num_there = next((at for at, reply in enumerate(replies) if reply != 1), len(asked))
            count += num_there
            if num_there < len(asked):
                break
        return count

    def _ask(self, command: list[bytes | memoryview]) -> bytes | int | Fault | None:
        deadline_s = time.monotonic() + WRITE_S
        try:
            with self._connection(CONNECT_S) as connection:
                connection.send([command], deadline_s)
                reply = connection.reply(1024, deadline_s)
        except _FAILURES as error:
            self._fail(self._writing, error)
            return Fault.UNREADABLE
        self._writing.succeed()
        return reply

    def _fail(self, breaker: Breaker, error: Exception) -> None:
        self.stats.num_errors += 1
        breaker.fail(error)

    @contextmanager
    def _connection(self, seconds: float) -> Generator[Connection, None, None]:
        """A connection that nobody else uses; one that was not used to its end is closed."""
        connection = self._take_free() or Connection(self.address, time.monotonic() + seconds)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if self._is_closing:
                connection.close()
            elif not connection.is_closed:
                self._free.append(connection)

    def _take_free(self) -> Connection | None:
        while True:
            with self._lock:
                if not self._free:
                    return None
                connection = self._free.pop()
            if connection.is_quiet:
                return connection
            connection.close()  # as servers do to who is idle
