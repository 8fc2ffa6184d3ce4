"""Redis servers for tests: Debian's own, and one that does what no server should."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PROGRAM = shutil.which("redis-server") or shutil.which("valkey-server")
needs_redis = pytest.mark.skipif(PROGRAM is None, reason="redis-server is not installed: apt-get install redis-server")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@contextmanager
def redis_server(folder: Path, *options: str, port: int | None = None, tls: bool = False) -> Iterator[int]:
    """A server that keeps nothing on disk; gives its port."""
    assert PROGRAM is not None
    port = free_port() if port is None else port
    where = ["--port", "0", "--tls-port", str(port)] if tls else ["--port", str(port)]
    command = [PROGRAM, *where, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    try:
        end_s = time.monotonic() + 20
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < end_s, "the server does not begin"
            time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()


Answer = Callable[[socket.socket, list[bytes]], None]


@contextmanager
def hostile_server(answer: Answer) -> Iterator[int]:
    """A server that understands commands and answers each as `answer` likes; what that raises ends the connection."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(0.1)
    is_over = threading.Event()
    threads: list[threading.Thread] = []

    def serve(client: socket.socket) -> None:
        with client, client.makefile("rb") as lines, suppress(OSError, ValueError):
            client.settimeout(20)
            while not is_over.is_set() and (line := lines.readline()):
                words = []
                for _ in range(int(line[1:])):
                    length = int(lines.readline()[1:])
                    words.append(lines.read(length))
                    lines.read(2)
                answer(client, words)

    def accept() -> None:
        while not is_over.is_set():
            with suppress(TimeoutError):
                client, _ = listening.accept()
                threads.append(threading.Thread(target=serve, args=(client,), daemon=True))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield listening.getsockname()[1]
    finally:
        is_over.set()
        accepting.join()
        listening.close()
