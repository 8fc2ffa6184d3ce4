"""The sockets on which KV events leave: one that publishes, one that repeats what somebody missed.

Source of the frames: vLLM's `distributed/kv_events.py`: topic, sequence number (8 bytes, the most significant first),
MessagePack of [time, events, rank]. Who asks the replay socket for a number gets all batches from it on, then -1.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from typing import Any

import msgspec

from kvik.errors import InvalidInput
from kvik.server.settings import is_loopback

log = logging.getLogger(__name__)

MAX_QUEUED = 1024
"""Batches that wait to be sent; a step makes one at most."""

NUM_KEPT = 10_000
MAX_KEPT_BYTES = 64 << 20
"""Batches that the replay socket repeats, and their bytes."""

SEND_HIGH_WATER = 100_000
"""Batches that wait for a slow subscriber; of those behind it ZeroMQ sends it none, and it sees the gap."""

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)

CLOSE_S = 1.0
"""That the end waits for what is queued to be sent."""

ENDPOINT_HINT = "give one like tcp://127.0.0.1:5557, tcp://127.0.0.1:* or ipc:///run/kvik.events"


class EventSocket:
    """Sends batches of events in a thread of its own. Raises `InvalidInput`.

    As vLLM does, it listens at an endpoint with a `*` in it or on ipc, and connects to any other; the replay socket
    always listens.
    """

    def __init__(self, endpoint: str, replay: str | None = None, topic: str = "") -> None:
        zmq = _zmq()
        self._zmq = zmq
        self._topic = topic.encode()
        self._queue: deque[list[dict[str, Any]]] = deque()
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = 0
        self._sequence = 0
        self._is_closing = False
        self._context = zmq.Context()
        try:
            self._publisher = self._context.socket(zmq.PUB)
            self._publisher.set_hwm(SEND_HIGH_WATER)
            self.address = self._open(self._publisher, endpoint, listens="*" in endpoint or endpoint.startswith("ipc:"))
            self._replay = self._context.socket(zmq.ROUTER)
            self.replay_address = None if replay is None else self._open(self._replay, replay, listens=True)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        # A socket of ZeroMQ belongs to one thread, so that thread is woken by another one.
        self._wakes, self._woken = socket.socketpair()
        self._wakes.setblocking(False)
        self._woken.setblocking(False)
        self._thread = threading.Thread(target=self._main, name="kvik-kv-events", daemon=True)
        self._thread.start()

    @property
    def is_exposed(self) -> bool:
        """Whether others than this machine may read the events, which hold the tokens of prompts."""
        return any(not _is_local(each) for each in (self.address, self.replay_address) if each is not None)

    def put(self, events: list[dict[str, Any]]) -> bool:
        """Queue one batch, from any thread; False where too many wait."""
        if len(self._queue) >= MAX_QUEUED or self._is_closing:
            return False
        self._queue.append(events)
        self._wake()
        return True

    def close(self) -> None:
        """Send what is queued, and end; a second time does nothing."""
        if self._is_closing:
            return
        self._is_closing = True
        self._wake()
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._wakes.close()
            self._woken.close()

    def _open(self, opened: Any, endpoint: str, *, listens: bool) -> str:
        try:
            if listens:
                opened.bind(endpoint)
                return str(opened.getsockopt_string(self._zmq.LAST_ENDPOINT))
            opened.connect(endpoint)
        except self._zmq.ZMQError as error:
            raise InvalidInput(f"KV events: {endpoint!r:.120}: {error}", hint=ENDPOINT_HINT) from None
        return endpoint

    def _wake(self) -> None:
        try:
            self._wakes.send(b"\0")
        except BlockingIOError:
            """It is about to look anyway."""

    def _main(self) -> None:
        poller = self._zmq.Poller()
        poller.register(self._woken, self._zmq.POLLIN)
        poller.register(self._replay, self._zmq.POLLIN)
        while not (self._is_closing and not self._queue):
            ready = dict(poller.poll())
            if self._woken.fileno() in ready:
                self._woken.recv(4096)
            while self._queue:
                self._send(self._queue.popleft())
            if self._replay in ready:
                self._repeat(self._replay.recv_multipart())
        self._context.destroy(linger=100)

    def _send(self, events: list[dict[str, Any]]) -> None:
        payload = msgspec.msgpack.encode([time.time(), events, 0])
        self._kept.append((self._sequence, payload))
        self._kept_bytes += len(payload)
        while len(self._kept) > NUM_KEPT or self._kept_bytes > MAX_KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft()[1])
        self._publisher.send_multipart([self._topic, self._sequence.to_bytes(8, "big"), payload])
        self._sequence += 1

    def _repeat(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[2]) != 8:
            log.warning("KV events: somebody asked the replay socket for what is no sequence number")
            return
        client, empty, start = frames
        for sequence, payload in self._kept:
            if sequence >= int.from_bytes(start, "big"):
                self._replay.send_multipart([client, empty, sequence.to_bytes(8, "big"), payload])
        self._replay.send_multipart([client, empty, END_OF_REPLAY, b""])


def _zmq() -> Any:
    try:
        import zmq
    except ImportError:
        raise InvalidInput("KV events need pyzmq, which is not installed", hint="pip install 'kvik[events]'") from None
    return zmq


def _is_local(endpoint: str) -> bool:
    scheme, _, rest = endpoint.partition("://")
    return scheme == "ipc" or is_loopback(rest.rpartition(":")[0])
